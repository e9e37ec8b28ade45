"""Triton backend of ``noisy_linear_logprobs`` with the certified backward: what ``certified_noisy_torch`` has.

Dtypes and devices are those of ``noisy_linear_logprobs_triton``. The kernels are in
``certified_noisy_forward_triton`` and ``certified_noisy_backward_triton``; nothing here reads from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunking
from .certified_noisy_backward_triton import launch_backward
from .certified_noisy_forward_triton import launch_forward
from .linear_logprobs_triton import supported, target_for
from .logit_transform import LogitTransform
from .noise import Needed, Noise, NoisyForward, NoisyGradients
from .nucleus import Nuclei, block_rows

__all__ = ["backward", "forward", "supported"]


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64; a row whose label is outside [0, V) becomes NaN
    rows: Tensor,  # (n,) int64 into hidden
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
    tol: float,  # > 0
) -> tuple[NoisyForward, Nuclei]:
    """What ``noisy_linear_logprobs_triton.forward`` returns, and the nuclei for ``tol``."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_forward(
            hidden, weight, bias, labels, rows, transform, noise, want_clean, tol,
            target, chunking.budget_bytes(hidden.device),
        )  # fmt: skip


def backward(
    grad: Tensor,  # (n,) d loss / d noisy log-prob; rows here and below, and noise.tokens, in block order
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,) int64 into hidden, each at most once
    lse: Tensor,  # (n,) float32
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    transform: LogitTransform,
    noise: Noise,
    needed: Needed,
) -> NoisyGradients:
    """Gradients in the dtypes of the inputs, from each block's columns."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_backward(
            grad.float(), hidden, weight, bias, labels, rows, lse, columns, counts, block_rows(hidden.device),
            transform, noise, needed, target, chunking.budget_bytes(hidden.device),
        )  # fmt: skip
