"""The one place that knows how large a chunk of logits may be.

A chunk is a ``rows × cols`` tile of the N×V logits. The workspace around it is bounded by a budget that depends
on the device alone, so the extra memory of the operation grows neither with the batch nor with the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

MIB = 1024 * 1024
CUDA_BUDGET_BYTES = 512 * MIB
CPU_BUDGET_BYTES = 64 * MIB
# Several element-wise passes stream over a tile: on a CPU it pays to keep it near the last-level cache.
CPU_TILE_BYTES = 8 * MIB
ALIGNMENT = 64


class Tile(NamedTuple):
    """Shape of the largest tile of logits that is ever held."""

    rows: int
    cols: int


def budget_bytes(device: torch.device) -> int:
    """Upper bound, in bytes, on the workspace of one call on ``device``."""
    return CUDA_BUDGET_BYTES if device.type == "cuda" else CPU_BUDGET_BYTES


def plan_tile(n: int, vocab: int, width: int, device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for n rows, ``vocab`` columns and hidden size ``width``, logits held in ``dtype``.

    Counted against the budget are two tiles (the logits and one temporary of their size) and, for the rows and
    for the columns of the tile, two blocks of width H: the gathered or upcast operand and its gradient.
    """
    budget = budget_bytes(device) // dtype.itemsize
    tile_elements = budget // 2 if device.type == "cuda" else CPU_TILE_BYTES // dtype.itemsize
    # The square tile that fills the budget: 2 s² + 4 s H = budget.
    side = _aligned(int(math.sqrt(width * width + budget / 2) - width))

    def fill(other: int) -> int:
        room = (budget - 2 * other * width) // (2 * other + 2 * width)
        return _aligned(min(room, tile_elements // other))

    rows = max(1, min(n, side))
    cols = min(vocab, fill(rows))
    if cols == vocab:  # a narrow head leaves room for more rows
        rows = max(1, min(n, fill(cols)))
    return Tile(rows, cols)


def spans(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover range(length) in steps of ``step``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _aligned(count: int) -> int:
    return max(1, count - count % ALIGNMENT if count > ALIGNMENT else count)
