"""Nuclei of the certified backward: which entries of a softmax row count, and which columns a block recomputes.

Row i has a nucleus S_i = {v : z_iv ≥ threshold_i} whose complement holds d_i ≤ tol of the probability. Rows
are sorted by nucleus size and cut into blocks; a block's columns C are the union of its rows' nuclei and
labels, a bit mask over the vocabulary. There the backward computes the exact gradient, elsewhere nothing:

    dz_iv = c_i·(1[v = y_i] − p_iv) for v ∈ C, else 0     ‖error of dz_i‖₁ = |c_i|·Σ_{v ∉ C} p_iv ≤ tol·|c_i|

The kept probabilities are not scaled up to sum to one: that would double the bound and, as it moves the largest
entries of every row the same way, make the error of dW up to ten times larger (docs/performance.md).

This file holds the masks, in plain tensor operations that read nothing from the device: ``gather_blocks`` makes
them from the rows' masks (Triton has kernels of its own for that), ``column_mask`` reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WORD_BITS = 32
# A block whose union reaches this share of the vocabulary takes all of it: gathering would cost more.
DENSE_SHARE = 0.75

# Rows of a block: the taller, the fewer masks and, on CUDA, the fuller the tiles, but the larger the unions.
BLOCK_ROWS = {"cpu": 64, "cuda": 128}


class Nuclei(NamedTuple):
    """What a forward decides for its backward: block b holds the rows at places b·height to (b+1)·height."""

    order: Tensor  # (n,) int64: which kept row stands at each place
    columns: Tensor  # (blocks, words) int32: bit v % 32 of word v // 32 says that the block recomputes column v
    counts: Tensor  # (blocks,) int32: how many columns that are; V for a dense block
    dropped: Tensor  # (n,) d_i as the forward measured it, ≤ tol, in the order of the kept rows


class Allowance(NamedTuple):
    """What one shard of a vocabulary may leave out of each row, which hangs on the row's lse over all shards.

    A forward asks while it has the rows' logits, some rows at a time, and the shards exchange their lse then.
    So all of them must ask for the same rows: each plans as if it were the widest.
    """

    widest: int  # columns of the widest shard
    # Places of R rows and their (R,) lse over the shard → (R,) share of the *shard's* probability that may go.
    # From 1 on the row needs no column of the shard.
    of_rows: Callable[[slice, Tensor], Tensor]


def words(vocab: int) -> int:
    """int32 words that hold one bit per column."""
    return -(-vocab // WORD_BITS)


def block_rows(device: torch.device) -> int:
    """Rows of a block on ``device``."""
    return BLOCK_ROWS["cuda" if device.type == "cuda" else "cpu"]


def block_count(rows: int, device: torch.device) -> int:
    """Blocks that ``rows`` rows make."""
    return -(-rows // block_rows(device))


def gather_blocks(
    masks: Tensor,  # (n, words) int32, rows of one window: nucleus and label of each
    sizes: Tensor,  # (n,) nucleus sizes
    height: int,
    vocab: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort a window's rows by nucleus size and unite them: order (n,), columns (blocks, words), counts."""
    order = torch.argsort(sizes, stable=True)
    n, width = masks.shape
    columns = masks.new_empty(-(-n // height), width)
    for b in range(len(columns)):  # one at a time: the masks are not held twice
        union = masks[order[b * height : (b + 1) * height]]
        while len(union) > 1:
            half = len(union) // 2
            if len(union) % 2:
                union[0] |= union[-1]
            union[:half] |= union[half : 2 * half]
            union = union[:half]
        columns[b] = union[0]
    counts = popcount(columns).sum(dim=1, dtype=torch.int32)
    return order, columns, counts.masked_fill(counts >= DENSE_SHARE * vocab, vocab)


def popcount(words_: Tensor) -> Tensor:
    """Number of set bits of each int32, as int32."""
    # Arithmetic shifts copy the sign: each mask below also drops those copies.
    x = words_ - ((words_ >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return (x + (x >> 16)) & 0x3F


def column_mask(columns: Tensor, vocab: int) -> Tensor:
    """(blocks, words) int32 → (blocks, V) bool."""
    bits = torch.arange(8, dtype=torch.uint8, device=columns.device)
    spread = (columns.contiguous().view(torch.uint8).unsqueeze(-1) >> bits).bitwise_and_(1)
    return spread.view(torch.bool).view(columns.shape[0], -1)[:, :vocab]
