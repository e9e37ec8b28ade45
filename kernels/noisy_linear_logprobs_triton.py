"""Triton backend of ``noisy_linear_logprobs``: the same two functions as ``noisy_linear_logprobs_torch``, its
reference.

Dtypes and devices are those of ``linear_logprobs_triton``; the generator has the dtype of ``hidden`` or
float32. The kernels are in ``noisy_linear_logprobs_forward_triton`` and
``noisy_linear_logprobs_backward_triton``; nothing here reads from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunking
from .linear_logprobs_triton import supported, target_for
from .logit_transform import LogitTransform
from .noise import Needed, Noise, NoisyForward, NoisyGradients
from .noisy_linear_logprobs_backward_triton import launch_backward
from .noisy_linear_logprobs_forward_triton import launch_forward

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
) -> NoisyForward:
    """Noisy log-prob and lse of every kept row, and the clean log-prob, float32 nats."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_forward(
            hidden, weight, bias, labels, rows, transform, noise, want_clean,
            target, chunking.budget_bytes(hidden.device),
        )  # fmt: skip


def backward(
    grad: Tensor,  # (n,) d loss / d noisy log-prob
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    lse: Tensor,  # (n,) float32
    transform: LogitTransform,
    noise: Noise,
    needed: Needed,
) -> NoisyGradients:
    """Exact gradients in the dtypes of the inputs; a product not needed is not made."""
    target = target_for(hidden, weight)
    with torch.cuda.device_of(hidden):
        return launch_backward(
            grad.float(), hidden, weight, bias, labels, rows, lse, transform, noise, needed,
            target, chunking.budget_bytes(hidden.device),
        )  # fmt: skip
