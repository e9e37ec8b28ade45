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
CPU_BUDGET_BYTES = 80 * MIB
# Several element-wise passes stream over a tile: on a CPU it pays to keep it near the last-level cache.
CPU_TILE_BYTES = 8 * MIB
# Of a product that is made beside where it goes, a quarter more with its terms (``products_torch``).
CPU_PRODUCT_BYTES = 4 * MIB
ALIGNMENT = 64
MAX_GROUP_ROWS = 4096  # of the certified backward: beyond it, products no longer gain


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


def plan_noisy_tile(
    n: int, vocab: int, width: int, device: torch.device, dtype: torch.dtype
) -> Tile:
    """For σ and its draw beside the logits: a quarter as wide, in whole counters of the draw."""
    tile = plan_tile(n, vocab, width, device, dtype)
    return tile._replace(cols=min(vocab, -(-tile.cols // 16) * 4))


class CertifiedForwardPlan(NamedTuple):
    """How the certified forward walks its rows."""

    chunk_rows: int  # whose logits over the whole vocabulary are held
    tile_rows: int  # that a pass takes at a time, so that they stay in the cache
    window_rows: int  # that are sorted together: whole blocks, whose bit masks are held
    product_cols: int  # of the head that a product takes at a time


class CertifiedPlan(NamedTuple):
    """How the certified backward walks blocks and columns."""

    group_rows: int  # rows of whole blocks whose products are made together
    piece_cols: int  # of a group's columns gathered at a time
    slice_cols: int  # columns whose wide dW is held, where it cannot be summed up in place


def plan_certified_forward(
    n: int,
    vocab: int,
    width: int,
    height: int,
    device: torch.device,
    dtype: torch.dtype,
    narrow: bool,
) -> CertifiedForwardPlan:
    """Of sixteenths of the budget three for the masks of a window, of two at most, and a tile; one for a
    product before it is part of a chunk; one for a slice of a head that is widened where it is ``narrow`` (of
    lower precision than ``dtype``); the rest for a chunk.

    Windows are equal, and so are the chunks of a window and the tiles of a chunk: a short one multiplies
    slowly. On a CPU a slice of any head is multiplied at a time, which stays in the cache.
    """
    sixteenth = budget_bytes(device) // 16
    row = vocab * dtype.itemsize
    window = max(1, 2 * sixteenth // (-(-vocab // 32) * 4 * height)) * height
    window = -(-n // max(1, -(-n // window)))
    window = max(1, min(n, -(-window // height) * height))
    chunk = max(1, (11 if narrow else 12) * sixteenth // (row + width * dtype.itemsize))
    chunk = max(1, -(-window // max(1, -(-window // chunk))))
    masks = -(-vocab // 32) * 4 * window
    tile = max(1, min(chunk, max(sixteenth, 3 * sixteenth - masks) // row))
    tile = -(-chunk // -(-chunk // tile))
    cols = vocab
    if narrow or device.type == "cpu":
        cols = max(1, min(vocab, sixteenth // (width * dtype.itemsize)))
    return CertifiedForwardPlan(chunk, tile, window, cols)


def plan_certified_backward(
    vocab: int,
    width: int,
    height: int,
    device: torch.device,
    dtype: torch.dtype,
    tiles: int = 1,
) -> CertifiedPlan:
    """Of eighths of the budget one each for a group's rows of H and for their dH, half of one each for gathered
    rows of W, for the same widened, for those of dW, for ``tiles`` tiles of the size of the logits, for a
    product beside where it goes and for the group's unions at a byte per column, three for a slice of dW.
    """
    eighth = budget_bytes(device) // 8
    rows = max(1, eighth // (width * dtype.itemsize))
    blocks = max(1, min(min(rows, MAX_GROUP_ROWS) // height, eighth // 2 // vocab))
    group = blocks * height
    piece = max(1, min(rows // 2, eighth // 2 // (tiles * group * dtype.itemsize)))
    return CertifiedPlan(group, piece, max(1, 3 * rows // 32) * 32)


def spans(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices that cover range(length) in steps of ``step``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _aligned(count: int) -> int:
    return max(1, count - count % ALIGNMENT if count > ALIGNMENT else count)
