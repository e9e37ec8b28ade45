"""Triton backend of ``linear_logprobs`` with the certified backward: the two functions of ``certified_torch``.

Dtypes and devices are those of ``linear_logprobs_triton``. The kernels are in ``certified_forward_triton``,
``nucleus_tiles_triton`` and ``certified_backward_triton``; nothing here reads from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunking
from .certified_backward_triton import launch_backward
from .certified_forward_triton import launch_forward
from .linear_logprobs_torch import ForwardResult
from .linear_logprobs_triton import supported, target_for
from .logit_transform import LogitTransform
from .nucleus import Allowance, Nuclei, block_rows

__all__ = ["backward", "forward", "supported"]


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64; a row whose label is outside [0, V) becomes NaN
    rows: Tensor | None,  # (n,) int64 into hidden, or None: all of them
    transform: LogitTransform,
    want_stats: bool,
    tol: float,  # > 0
    allowance: Allowance | None = None,
) -> tuple[ForwardResult, Nuclei]:
    """What ``linear_logprobs_triton.forward`` returns, and the nuclei for ``tol``, or for ``allowance``."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_forward(
            hidden, weight, bias, labels, rows, transform, want_stats, tol,
            target, chunking.budget_bytes(hidden.device), allowance,
        )  # fmt: skip


def backward(
    grad: Tensor,  # (n,) float32; rows here and below in block order
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,) int64 into hidden, each at most once
    lse: Tensor,  # (n,) float32
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    low_memory: bool,
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (N, H), (V, H), (V,) in the dtypes of the inputs, from each block's columns.

    With ``last_columns`` dW is (V, last_columns), of so many last columns of the weight, and costs accordingly.
    """
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_backward(
            grad.float(), hidden, weight, bias, labels, rows, lse, columns, counts, block_rows(hidden.device),
            transform, need_hidden, need_weight, need_bias and bias is not None, low_memory,
            target, chunking.budget_bytes(hidden.device), last_columns,
        )  # fmt: skip
