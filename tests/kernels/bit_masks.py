"""Bit masks of the certified backward, made from plain ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.kernels import nucleus


def pack(mask: Tensor) -> Tensor:
    """(n, V) bool → (n, words) int32."""
    n, vocab = mask.shape
    padding = nucleus.words(vocab) * nucleus.WORD_BITS - vocab
    if padding:
        mask = torch.nn.functional.pad(mask, (0, padding))
    # Eight bytes 0 or 1 are one int64; the product collects them as bits, first byte lowest, in the top byte.
    groups = mask.contiguous().view(torch.int64) * 0x0102040810204080
    return (groups >> 56).to(torch.uint8).view(n, -1).view(torch.int32)
