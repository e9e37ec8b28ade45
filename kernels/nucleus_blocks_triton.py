"""Blocks of rows of similar nucleus size, in Triton: ``nucleus.gather_blocks`` without a copy of the masks.

The kernel reads every mask once, where it lies: a quarter of the memory traffic of plain tensor operations and
a third of their memory, so that three times as many rows can be sorted together. That pays up to some
thousands: on states of a language model at 1.6 nats of entropy, blocks of 128 rows out of 2560, 5120 and 10240
touch 15.5, 14.6 and 14.5 % of the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nucleus import DENSE_SHARE, popcount

ROWS, WORDS = 8, 128  # masks and their words that a program has under way


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["n", "height", "width"])
def _unite_kernel(masks, order, columns, n, height, width, ROWS: tl.constexpr, WORDS: tl.constexpr):
    first = tl.program_id(0) * height
    words = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    there = (words < width)[None, :]
    union = tl.zeros([ROWS, WORDS], tl.int32)
    last = tl.minimum(first + height, n)
    for start in range(first, last, ROWS):
        places = start + tl.arange(0, ROWS)
        kept = places < last
        rows = tl.load(order + places, mask=kept, other=0)
        mask = masks + rows[:, None] * width + words[None, :]
        union |= tl.load(mask, mask=kept[:, None] & there, other=0)
    out = columns + tl.program_id(0).to(tl.int64) * width + words
    tl.store(out, tl.reduce(union, 0, _or), mask=words < width)


def gather_blocks(
    masks: Tensor,  # (n, words) int32, rows of one window: nucleus and label of each
    sizes: Tensor,  # (n,) integer: nucleus sizes
    height: int,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``nucleus.gather_blocks`` returns."""
    order = torch.argsort(sizes, stable=True)
    n, width = masks.shape
    blocks = triton.cdiv(n, height)
    columns = torch.empty((blocks, width), dtype=torch.int32, device=masks.device)
    _unite_kernel[(blocks, triton.cdiv(width, WORDS))](
        masks, order, columns, n, height, width, ROWS=ROWS, WORDS=WORDS, num_warps=4
    )
    counts = popcount(columns).sum(dim=1, dtype=torch.int32)
    return order, columns, counts.masked_fill(counts >= DENSE_SHARE * vocab, vocab)
