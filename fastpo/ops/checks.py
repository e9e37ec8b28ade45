"""Checks of values, not only of shapes: made on a CPU always, on a device under ``FASTPO_CHECK=1`` alone.

Looking at a value on a device waits for it, so there a wrong one shows in the result unless it is asked for.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def check_everything() -> bool:
    """Whether ``FASTPO_CHECK=1`` asks for checks that wait for the device."""
    return os.environ.get("FASTPO_CHECK") == "1"


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Raise unless ``cu_seqlens`` (B + 1,) are the bounds of B consecutive segments of ``tokens`` tokens.

    Raises:
        TypeError: not int32 or int64.
        ValueError: another shape; bounds that do not start at 0, that decrease, or that exceed ``tokens``.
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (B + 1,)")
    if torch.compiler.is_compiling() or not (cu_seqlens.device.type == "cpu" or check_everything()):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > tokens or sorted(bounds) != bounds:
        shown = bounds if len(bounds) <= 8 else [*bounds[:4], "…", *bounds[-3:]]
        raise ValueError(
            f"cu_seqlens: got {shown}, expected bounds that rise from 0 to at most {tokens}, "
            "the number of tokens"
        )
