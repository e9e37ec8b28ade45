"""Triton backend of ``linear_logprobs``: the same two functions as ``linear_logprobs_torch``, its reference.

float32, bfloat16 and float16 on CUDA devices of compute capability 8.0 and above, and on CPU tensors where
``TRITON_INTERPRET=1`` was set when Triton was loaded. The kernels are in ``linear_logprobs_forward_triton``,
``linear_logprobs_backward_triton`` and ``matmul_triton``; nothing here reads from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunking, tile_configs
from .linear_logprobs_backward_triton import launch_backward
from .linear_logprobs_forward_triton import launch_forward
from .linear_logprobs_torch import ForwardResult
from .logit_transform import LogitTransform
from .precision import TRITON_DTYPES


def supported(hidden: Tensor, weight: Tensor) -> str | None:
    """None if these kernels can take the call, else the reason why not."""
    if hidden.dtype not in TRITON_DTYPES:
        return f"dtype {hidden.dtype} is not one of {[str(dtype) for dtype in TRITON_DTYPES]}"
    if weight.dtype != hidden.dtype:
        return f"weight has dtype {weight.dtype} and hidden {hidden.dtype}"
    return tile_configs.unsupported(hidden.device)


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64; a row whose label is outside [0, V) becomes NaN
    rows: Tensor | None,  # (n,) int64 into hidden, or None: all of them
    transform: LogitTransform,
    want_stats: bool,
) -> ForwardResult:
    """Log-prob and lse of every kept row, float32 nats; ValueError where ``supported`` gives a reason."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_forward(
            hidden, weight, bias, labels, rows, transform, want_stats,
            target, chunking.budget_bytes(hidden.device),
        )  # fmt: skip


def backward(
    grad: Tensor,  # (n,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor | None,  # (n,)
    lse: Tensor,  # (n,) float32
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Exact gradients (N, H), (V, H), (V,) in the dtypes of the inputs; a product not needed is not made.

    With ``last_columns`` dW is (V, last_columns), of so many last columns of the weight, and costs accordingly.
    """
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_backward(
            grad.float(), hidden, weight, bias, labels, rows, lse, transform,
            need_hidden, need_weight, need_bias and bias is not None,
            target, chunking.budget_bytes(hidden.device), last_columns,
        )  # fmt: skip


def target_for(hidden: Tensor, weight: Tensor) -> tile_configs.Target:
    """The device as the tile table knows it; ValueError where ``supported`` gives a reason."""
    reason = supported(hidden, weight)
    if reason is not None:
        raise ValueError(f"backend: got 'triton', but {reason}; use 'torch' or 'auto'")
    return tile_configs.target(hidden.device)
