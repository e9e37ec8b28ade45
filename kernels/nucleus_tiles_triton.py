"""Which tiles of the logits a certified backward computes, in Triton: nuclei ordered so as to fill whole tiles.

A block of rows needs the columns of its union, any subset of the vocabulary. One order of the columns
serves all blocks of a call: by the smallest block that needs a column, small ones first. Unions of growing
size are nearly nested (what a peaked row needs, flat rows need too), so each block's columns come out
nearly contiguous. Rows follow their blocks, large ones first, without those that have no coefficient. So
the n×V logits fall into pieces, ``unit`` × ``tile``, that are nearly all needed or not needed at all, and
every later step works on dense tiles. On states of a language model at 1.6 and 1.1 nats of entropy (V =
32000), pieces of 128×256 hold 5 and 14 % more entries than unions of 128 rows; in the order of the
vocabulary they would hold 2.9 and 5.2 times as many.

Everything is decided on the device. Sizes: n rows, V columns, B blocks, U units, C tiles. Passes: two over the
masks, four over the (U, C) flags.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nucleus import WORD_BITS

KEY_BLOCKS, KEY_WORDS = 16, 4  # of the masks, that one program reads at a time
LIST_STEP = 1024  # flags that one program turns into list entries at a time
_WORD_BITS = tl.constexpr(WORD_BITS)


class Lists(NamedTuple):
    """Which chunks of ``most`` each row has: the tiles in which a unit has pieces, or the units of a tile."""

    entries: Tensor  # (rows, most) int32: the chunks, ascending; what lies past the row's number is not written
    starts: Tensor  # (rows, most + 1) int32: how many of them lie before chunk k; the last is their number


class Tiles(NamedTuple):
    """The new order of blocks, rows and columns, and the pieces to compute."""

    unit: int  # rows of a piece
    tile: int  # columns of a piece
    masks: Tensor  # (B, words) int32, in the old order
    ranks: Tensor  # (B,) int64: which block stands at each place of the new order
    sizes: Tensor  # (B,) int32: columns of the block at each place; V: all of them; 0: none of its rows count
    source: Tensor  # (U·unit,) int32 row of hidden, −1 for padding
    blocks: Tensor  # (U·unit,) int32 place of the row's block, ascending; −1 for padding
    grad: Tensor  # (U·unit,) float32, 0 for padding
    lse: Tensor  # (U·unit,) float32
    labels: Tensor  # (U·unit,) int32, −1 where the label is no column
    columns: Tensor  # (C·tile,) int32 column of the vocabulary, −1 for padding
    flags: Tensor  # (U, C) int8: 1 for a piece to compute
    of_unit: Lists  # (U, C)
    of_tile: Lists  # (C, U)


@triton.jit(do_not_specialize=["n", "V", "height"])
def _order_rows_kernel(
    order, places, rows, grad, lse, labels, new_source, new_blocks, new_grad, new_lse, new_labels,
    n, V, height, UNIT: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * UNIT + tl.arange(0, UNIT)
    old = tl.load(order + out, mask=out < n, other=0)
    coefficient = tl.load(grad + old, mask=out < n, other=0.0)
    kept = coefficient != 0.0
    tl.store(new_grad + out, coefficient)
    tl.store(new_lse + out, tl.load(lse + old, mask=kept, other=0.0))
    tl.store(new_source + out, tl.load(rows + old, mask=kept, other=-1).to(tl.int32))
    place = tl.load(places + old // height, mask=kept, other=-1)
    tl.store(new_blocks + out, place.to(tl.int32))
    label = tl.load(labels + old, mask=kept, other=-1)
    tl.store(new_labels + out, tl.where((label >= 0) & (label < V), label, -1).to(tl.int32))


@triton.jit
def _block_words(masks, ranks, sizes, block, word, inside, V, width):
    """Words ``word`` of the union of the block at place ``block``, 0 where not ``inside``."""
    size = tl.load(sizes + block)
    bits = tl.load(masks + tl.load(ranks + block) * width + word, mask=inside & (size > 0), other=0)
    return tl.where(size == V, -1, bits)


@triton.jit
def block_needs(masks, ranks, sizes, block, columns, V, width):
    """Whether the union of the block at place ``block`` has each of ``columns``; −1 is in none."""
    word = _block_words(masks, ranks, sizes, block, columns >> 5, columns >= 0, V, width)
    return (((word >> (columns & 31)) & 1) != 0) & (columns >= 0)


@triton.jit(do_not_specialize=["V", "width", "count", "padded"])
def _keys_kernel(
    masks, ranks, sizes, keys, V, width, count, padded, BLOCKS: tl.constexpr, WORDS: tl.constexpr
):
    """keys[v]: the last place, that of the smallest block, that needs column v; −1 if none does."""
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    bits = tl.arange(0, _WORD_BITS)
    key = tl.full([WORDS, _WORD_BITS], -1, tl.int32)
    for first in range(0, count, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        known = block < count
        size = tl.load(sizes + block, mask=known, other=0)[:, None]
        rank = tl.load(ranks + block, mask=known, other=0)[:, None]
        word = tl.load(
            masks + rank * width + words[None, :],
            mask=(words < width)[None, :] & (size > 0),
            other=0,
        )
        word = tl.where(size == V, -1, word)
        needed = ((word[:, :, None] >> bits[None, None, :]) & 1) != 0
        key = tl.maximum(key, tl.max(tl.where(needed, block[:, None, None], -1), axis=0))
    v = words[:, None] * _WORD_BITS + bits[None, :]
    tl.store(keys + v, tl.where(v < V, key, -1), mask=v < padded)


@triton.jit
def block_range(blocks):
    """First and last place among ``blocks``, (0, −1) if all are padding."""
    last = tl.max(blocks, axis=0)
    return tl.min(tl.where(blocks < 0, last + 1, blocks), axis=0), last


@triton.jit(do_not_specialize=["V", "width", "tiles"])
def _flags_kernel(
    masks, ranks, sizes, blocks, columns, flags, V, width, tiles,
    UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, unit = tl.program_id(0), tl.program_id(1)
    v = tl.load(columns + tile * TILE + tl.arange(0, TILE))
    first, last = block_range(tl.load(blocks + unit * UNIT + tl.arange(0, UNIT)))
    flag = 0
    for block in range(first, last + 1):
        needed = block_needs(masks, ranks, sizes, block, v, V, width)
        flag = tl.maximum(flag, tl.max(needed.to(tl.int32), axis=0))
    tl.store(flags + unit * tiles + tile, flag)


@triton.jit(do_not_specialize=["most"])
def _lists_kernel(flags, entries, starts, most, row_stride, chunk_stride, STEP: tl.constexpr):
    row = tl.program_id(0)
    count = 0
    for first in range(0, most, STEP):
        chunks = first + tl.arange(0, STEP)
        inside = chunks < most
        flag = tl.load(flags + row * row_stride + chunks * chunk_stride, mask=inside, other=0)
        flag = flag.to(tl.int32)
        before = count + tl.cumsum(flag, axis=0) - flag
        tl.store(starts + row * (most + 1) + chunks, before, mask=inside)
        tl.store(entries + row * most + before, chunks, mask=flag != 0)
        count += tl.sum(flag, axis=0)
    tl.store(starts + row * (most + 1) + most, count)


def arrange(
    grad: Tensor,  # (n,) float32
    lse: Tensor,  # (n,) float32
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n,) int64
    masks: Tensor,  # (B, words) int32
    counts: Tensor,  # (B,) int32
    vocab: int,
    height: int,
    unit: int,
    tile: int,
) -> Tiles:
    """Order rows and columns and list the pieces; all tensors contiguous, ``height`` rows to a block."""
    n, (count, width), device = grad.numel(), masks.shape, grad.device

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    idle = grad == 0
    padded_idle = torch.nn.functional.pad(idle, (0, count * height - n), value=True)
    sizes = counts.masked_fill(padded_idle.view(count, height).all(dim=1), 0)
    sizes, ranks = torch.sort(sizes, descending=True, stable=True)
    places = torch.empty_like(ranks)
    places[ranks] = torch.arange(count, device=device)
    place = places.unsqueeze(1).expand(-1, height).reshape(-1)[:n]
    order = torch.argsort(place.masked_fill(idle, count), stable=True)

    units, tiles = triton.cdiv(n, unit), triton.cdiv(vocab, tile)
    source, blocks, new_labels = new(units * unit), new(units * unit), new(units * unit)
    new_grad, new_lse = (new(units * unit, dtype=torch.float32) for _ in range(2))
    _order_rows_kernel[(units,)](
        order, places, rows, grad, lse, labels, source, blocks, new_grad, new_lse, new_labels,
        n, vocab, height, UNIT=unit, num_warps=4,
    )  # fmt: skip
    keys, span = new(tiles * tile), KEY_WORDS * WORD_BITS
    _keys_kernel[(triton.cdiv(tiles * tile, span),)](
        masks, ranks, sizes, keys, vocab, width, count, tiles * tile,
        BLOCKS=KEY_BLOCKS, WORDS=KEY_WORDS, num_warps=4,
    )  # fmt: skip
    columns = torch.argsort(keys, descending=True, stable=True)
    columns = torch.where(columns < vocab, columns, -1).to(torch.int32)
    flags = new(units, tiles, dtype=torch.int8)
    _flags_kernel[(tiles, units)](
        masks, ranks, sizes, blocks, columns, flags, vocab, width, tiles,
        UNIT=unit, TILE=tile, num_warps=1,
    )  # fmt: skip
    return Tiles(
        unit, tile, masks, ranks, sizes, source, blocks, new_grad, new_lse, new_labels, columns,
        flags, _lists(flags), _lists(flags.t()),
    )  # fmt: skip


def _lists(flags: Tensor) -> Lists:
    """Of the rows of ``flags`` (rows, most)."""
    rows, most = flags.shape
    entries, starts = (
        torch.empty((rows, most + more), dtype=torch.int32, device=flags.device) for more in (0, 1)
    )
    _lists_kernel[(rows,)](
        flags, entries, starts, most, *flags.stride(), STEP=LIST_STEP, num_warps=4
    )
    return Lists(entries, starts)
