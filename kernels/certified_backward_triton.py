"""Certified backward of ``linear_logprobs`` in Triton: the exact gradient on the columns of each block's union.

    dz_iv = c_i·(1[v = y_i] − exp(z_iv − lse_i))·dz/du for v in the union of row i's block, else 0
    dH = dz·W       dW = dzᵀ·H       db = Σ_i dz_i

``nucleus_tiles_triton`` orders rows and columns so that what is needed falls into whole tiles, called
pieces. For batches of units (rows) and slices of tiles (columns), ``_dz_pieces_kernel`` makes the pieces of
dz in a workspace, and ``_products_kernel`` both products: an output tile goes through the pieces of its rows,
or of its columns, in ascending order and is summed up in registers, however many blocks that takes. No
atomics and one order of summation: results repeat to the bit. Nothing is read from the device. Launches cover
the worst case; programs without a piece return at once.

    n ≤ V    one batch: dW is written once, dH is summed over slices in float32, n·H elements
    n > V    batches outside: dW is summed over them in float32, V·H elements, dH over the slices of a batch
    one of dH and dW alone, or both with ``low_memory``: dH in batches, then dW and db in slices, each summed
    over the other dimension

Sums are made only where more than one part is summed; a float32 gradient is its own. But for the sums of the
first two lines everything stays within ``budget`` bytes. Cost: 3ρ products of n×V×H, 4ρ with ``low_memory``, ρ
the share of (row, column) pairs in pieces. Passes over memory: dz written once and read once per product; a
sum in and out once for each part in which its row or column has pieces. dz is rounded and scaled as in
``linear_logprobs_backward_triton``.
"""

from __future__ import annotations

import math
from itertools import product, starmap
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunking import spans
from .linear_logprobs_backward_triton import power_of_two_scale
from .logit_transform import LogitTransform
from .logits_triton import contiguous, place, raw_tile, scale_factors, tanh
from .matmul_triton import split_columns
from .nucleus_tiles_triton import Tiles, arrange, block_needs, block_range
from .precision_triton import dot, round_to
from .tile_configs import GROUP_ROWS, Target, TileConfig, tile_config

LISTS_SHARE = (
    8  # one part in so many of the budget is for what is not dz or a sum: the arrays of ``Tiles``
)
GROUP = 8  # tiles of rows that go through the columns of a product together
SUM_ROWS, SUM_COLS = 64, 64


@triton.jit(
    do_not_specialize=["V", "words", "tiles", "first_row", "first_col", "row_tiles", "col_tiles"]
)
def _dz_pieces_kernel(
    hidden, weight, bias, masks, ranks, sizes, source, blocks, grad, lse, labels, columns, flags, scale, dz,
    V, H, words, tiles, first_row, first_col, row_tiles, col_tiles,
    hidden_row, hidden_col, weight_row, weight_col, inner, outer, factor, dz_row,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = place(tl.program_id(0), row_tiles, col_tiles, GROUP)
    new_rows = row_tile * ROWS + tl.arange(0, ROWS)
    new_cols = col_tile * COLS + tl.arange(0, COLS)
    unit, tile = (first_row + row_tile * ROWS) // UNIT, (first_col + col_tile * COLS) // TILE
    if tl.load(flags + unit * tiles + tile) == 0:
        return
    rows = first_row + new_rows
    cols = tl.load(columns + first_col + new_cols)
    hidden_rows = tl.maximum(tl.load(source + rows), 0).to(tl.int64)
    z = raw_tile(
        hidden, weight, bias, hidden_rows, tl.maximum(cols, 0), V, H,
        hidden_row, hidden_col, weight_row, weight_col, HAS_BIAS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    label = tl.load(labels + rows)
    row_lse = tl.load(lse + rows)
    coefficient = tl.load(grad + rows) * factor * tl.load(scale)
    if SOFTCAP:
        bent = tanh(z * inner)
        z = bent * outer
    else:
        z *= outer
    d = tl.where(cols[None, :] == label[:, None], 1.0, 0.0) - tl.exp(z - row_lse[:, None])
    if SOFTCAP:
        d *= 1.0 - bent * bent
    d = tl.where((coefficient != 0.0)[:, None], d * coefficient[:, None], 0.0)  # padding has 0
    # Nearly always one block: rows without a coefficient leave gaps that the next block's fill.
    block = tl.load(blocks + rows)
    first, last = block_range(block)
    for current in range(first, last + 1):
        needed = block_needs(masks, ranks, sizes, current, cols, V, words)
        d = tl.where((block == current)[:, None] & ~needed[None, :], 0.0, d)
    out = dz + new_rows.to(tl.int64)[:, None] * dz_row + new_cols[None, :]
    tl.store(out, round_to(d, dz.dtype.element_ty))


@triton.jit
def _add_pieces(
    pid, row_tiles, a, a_row, a_col, row_index, first_row, b, b_row, b_col, inner_index, N,
    entries, starts, chunks, first_chunk, last_chunk, out, partial, unscale,
    SUM: tl.constexpr, IN_PLACE: tl.constexpr, ROW_CHUNK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of out[row_index] = a·b[inner_index], summed over those chunks of a's columns that are pieces.

    a's rows are places ``first_row`` … of ``row_index``, ROW_CHUNK to a list; its columns are the chunks from
    ``first_chunk`` to ``last_chunk`` − 1, of which a list has some. With SUM the list's earlier chunks are in
    ``partial``, a row for each row of a, or in ``out`` itself if IN_PLACE, and the sum goes there too unless
    the list ends here. Index −1 is padding.
    """
    row_tile, col_tile = place(pid, row_tiles, tl.cdiv(N, COLS), GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    list_row = (first_row + row_tile * ROWS) // ROW_CHUNK
    starts += list_row * (chunks + 1)
    start, stop = tl.load(starts + first_chunk), tl.load(starts + last_chunk)
    if start < stop:
        cols = col_tile * COLS + tl.arange(0, COLS)
        depth = tl.arange(0, DEPTH)
        inside = (cols < N)[None, :]
        a_ptrs = a + rows.to(tl.int64)[:, None] * a_row + depth.to(tl.int64)[None, :] * a_col
        b_ptrs = b + cols.to(tl.int64)[None, :] * b_col
        entries += list_row * chunks + start
        STEPS: tl.constexpr = CHUNK // DEPTH
        steps = (stop - start) * STEPS
        # Loads that wait for loads are not pipelined, nor is a loop that hands a value on unchanged: where a
        # step lies is read two steps ahead, and which rows of b it takes one step ahead.
        begin = first_chunk * CHUNK
        inner_place = tl.load(entries) * CHUNK
        inner = tl.load(inner_index + inner_place + depth)
        a_offset = (inner_place - begin).to(tl.int64) * a_col
        inner_place = (
            tl.load(entries + 1 // STEPS, mask=steps > 1, other=0) * CHUNK + 1 % STEPS * DEPTH
        )
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for step in range(0, steps):
            a_tile = tl.load(a_ptrs + a_offset)
            b_tile = tl.load(
                b_ptrs + inner.to(tl.int64)[:, None] * b_row,
                mask=(inner >= 0)[:, None] & inside, other=0.0,
            )  # fmt: skip
            acc = dot(a_tile, b_tile, acc)
            inner = tl.load(inner_index + inner_place + depth)
            a_offset = (inner_place - begin).to(tl.int64) * a_col
            ahead = step + 2
            inner_place = tl.load(entries + ahead // STEPS, mask=ahead < steps, other=0) * CHUNK
            inner_place += ahead % STEPS * DEPTH
        target = tl.load(row_index + first_row + rows)
        kept_rows = target >= 0
        target = target.to(tl.int64)
        if SUM:
            begun, ended = start > 0, stop == tl.load(starts + chunks)
            sum_rows = target if IN_PLACE else rows.to(tl.int64)
        # A quarter at a time, as in ``matmul_triton``.
        quarters = split_columns(acc, ROWS, COLS)
        for i in tl.static_range(4):
            part = quarters[i]
            cols = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
            kept = kept_rows[:, None] & (cols < N)[None, :]
            if SUM:
                sum_ptrs = partial + sum_rows[:, None] * N + cols[None, :]
                part += tl.load(sum_ptrs, mask=kept & begun, other=0.0)
                tl.store(sum_ptrs, part, mask=kept & (not ended))
                kept &= ended
            part *= tl.load(unscale)
            out_ptrs = out + target[:, None] * N + cols[None, :]
            tl.store(out_ptrs, round_to(part, out.dtype.element_ty), mask=kept)


@triton.jit(
    do_not_specialize=[
        "units",
        "tiles",
        "first_unit",
        "last_unit",
        "first_tile",
        "last_tile",
        "unit_programs",
    ]
)
def _products_kernel(
    dz, dz_row, hidden, hidden_row, hidden_col, weight, weight_row, weight_col, source, columns, H, K,
    unit_entries, unit_starts, tile_entries, tile_starts,
    units, tiles, first_unit, last_unit, first_tile, last_tile, unit_programs,
    d_hidden, hidden_sum, d_weight, weight_sum, unscale,
    HIDDEN: tl.constexpr, WEIGHT: tl.constexpr, SUM_HIDDEN: tl.constexpr, SUM_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < unit_programs:
        if HIDDEN:
            _add_pieces(
                pid, (last_unit - first_unit) * (UNIT // ROWS), dz, dz_row, 1,
                source, first_unit * UNIT, weight, weight_row, weight_col, columns, H,
                unit_entries, unit_starts, tiles, first_tile, last_tile, d_hidden, hidden_sum, unscale,
                SUM_HIDDEN, IN_PLACE, UNIT, TILE, ROWS, COLS, DEPTH, GROUP,
            )  # fmt: skip
    else:
        if WEIGHT:
            _add_pieces(
                pid - unit_programs, (last_tile - first_tile) * (TILE // ROWS), dz, 1, dz_row,
                columns, first_tile * TILE, hidden, hidden_row, hidden_col, source, K,
                tile_entries, tile_starts, units, first_unit, last_unit, d_weight, weight_sum, unscale,
                SUM_WEIGHT, IN_PLACE, TILE, UNIT, ROWS, COLS, DEPTH, GROUP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["units", "first_unit", "last_unit", "first_tile"])
def _column_sums_kernel(
    dz, columns, entries, starts, unscale, d_bias, units, first_unit, last_unit, first_tile, dz_row,
    UNIT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first_col = tl.program_id(0) * COLS
    tile = first_tile + first_col // TILE
    starts += tile * (units + 1)
    start, stop = tl.load(starts + first_unit), tl.load(starts + last_unit)
    if start == stop:
        return
    new_cols = first_col + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for entry in range(start, stop):
        first_row = (tl.load(entries + tile * units + entry) - first_unit) * UNIT
        for within in range(0, UNIT, ROWS):
            new_rows = (first_row + within + tl.arange(0, ROWS)).to(tl.int64)
            total += tl.load(dz + new_rows[:, None] * dz_row + new_cols[None, :]).to(tl.float32)
    cols = tl.load(columns + first_tile * TILE + new_cols)
    old = tl.load(d_bias + cols, mask=cols >= 0, other=0.0)
    tl.store(d_bias + cols, old + tl.sum(total, axis=0) * tl.load(unscale), mask=cols >= 0)


class Call(NamedTuple):
    """What every launch of a backward has in common: operands, their tiles and configurations."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    scale: Tensor
    unscale: Tensor
    tiles: Tiles
    logits_config: TileConfig
    product_config: TileConfig


class Part(NamedTuple):
    """What the workspace holds at a time: pieces of these units and tiles."""

    units: slice
    tiles: slice


def launch_backward(
    grad: Tensor,  # (n,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n,) int64, without repetition
    lse: Tensor,  # (n,) float32
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    height: int,  # rows of a block
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    low_memory: bool,
    target: Target,
    budget: int,  # bytes of workspace
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,) in their dtypes; None where not needed.

    With ``last_columns`` that of the weight is (V, last_columns), of so many of its last columns.
    """
    n, (vocab, width) = labels.numel(), weight.shape
    d_hidden = hidden.new_zeros(hidden.shape) if need_hidden else None
    trained = width if last_columns is None else last_columns
    d_weight = weight.new_zeros(vocab, trained) if need_weight else None
    d_bias = weight.new_zeros(vocab, dtype=torch.float32) if need_bias else None
    if n > 0 and (need_hidden or need_weight or need_bias):
        use = "pieces" if transform.softcap is None else "pieces softcap"
        configs = [tile_config(u, target, hidden, weight) for u in (use, "matmul")]
        logits, products = configs
        # Whole tiles of every kernel; all are powers of two. The gradient of a sum comes with stride 0.
        arranged = arrange(
            grad.contiguous(), lse.contiguous(), labels.contiguous(), rows.contiguous(),
            columns.contiguous(), counts.contiguous(), vocab, height,
            unit=max(logits.rows, products.rows, products.depth),
            tile=max(logits.cols, products.rows, products.depth),
        )  # fmt: skip
        scales = power_of_two_scale(grad, transform.linear_factor)
        call = Call(hidden, weight, contiguous(bias), transform, *scales, arranged, *configs)
        space = budget - budget // LISTS_SHARE
        if need_hidden and (need_weight or need_bias) and not low_memory:
            _sweep(call, space, True, n <= vocab, d_hidden, d_weight, d_bias)
        else:
            if need_hidden:
                _sweep(call, space, True, False, d_hidden, None, None)
            if need_weight or need_bias:
                _sweep(call, space, False, False, None, d_weight, d_bias)
    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _sweep(
    call: Call,
    space: int,
    by_rows: bool,  # batches outside, slices inside; or the other way round
    whole: bool,  # the outer dimension is not cut, and its sum is not counted against ``space``
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Add up the gradients that are not None over all parts of dz."""
    t, dtype, width = call.tiles, call.hidden.dtype, call.hidden.shape[1]
    units, tiles = t.flags.shape
    sizes = (units, t.unit), (tiles, t.tile)
    outer, inner = sizes if by_rows else sizes[::-1]
    sum_bytes = 0 if whole or dtype == torch.float32 else 4 * width
    parts = plan_sweep(outer, inner, dtype.itemsize, sum_bytes, space, whole)
    batch, part = parts if by_rows else parts[::-1]
    batches, slices = list(spans(units, batch)), list(spans(tiles, part))
    dz = call.hidden.new_empty(batch * t.unit, part * t.tile)
    hidden_sum = _float32_sum(d_hidden, len(slices), batch * t.unit)
    weight_sum = _float32_sum(d_weight, len(batches), (tiles if by_rows else part) * t.tile)
    in_order = (
        product(batches, slices) if by_rows else ((u, s) for s, u in product(slices, batches))
    )
    for p in starmap(Part, in_order):
        _dz_pieces(call, p, dz)
        if d_hidden is not None or d_weight is not None:
            columns_sum = weight_sum
            if by_rows and weight_sum is not None and weight_sum is not d_weight:
                columns_sum = weight_sum[p.tiles.start * t.tile :]
            add_products(call, p, dz, d_hidden, hidden_sum, d_weight, columns_sum)
        if d_bias is not None:
            add_column_sums(call, p, dz, d_bias)


def _float32_sum(gradient: Tensor | None, parts: int, rows: int) -> Tensor | None:
    """Where the rows of ``gradient`` are summed up over ``parts``; None where nothing is to be summed."""
    if gradient is None or parts == 1 or gradient.dtype == torch.float32:
        return None if parts == 1 else gradient
    return gradient.new_empty(rows, gradient.shape[1], dtype=torch.float32)


def plan_sweep(
    outer: tuple[int, int],  # units or tiles, rows or columns in each
    inner: tuple[int, int],
    itemsize: int,
    sum_bytes: int,  # of the sum of one row, or column, of the outer dimension
    space: int,
    whole: bool,
) -> tuple[int, int]:
    """How many of ``outer`` and ``inner`` make a part whose dz and sum fit ``space`` bytes; at least one each.

    What is summed outside the registers passes through memory n·V·H·(1/rows + 1/columns) times: least if the
    part is as long inside as the square that fills the space.
    """
    (outer_count, outer_size), (inner_count, inner_size) = outer, inner
    most = outer_count
    if not whole:
        side = min(max(inner_size, math.isqrt(space // itemsize)), inner_count * inner_size)
        most = space // ((side * itemsize + sum_bytes) * outer_size)
    part = _even(outer_count, most)
    length = part * outer_size
    return part, _even(
        inner_count, (space - length * sum_bytes) // (length * inner_size * itemsize)
    )


def _even(count: int, most: int) -> int:
    """Size of the parts, ``most`` at most but at least 1, of the fewest and most equal that make ``count``."""
    return triton.cdiv(count, triton.cdiv(count, max(1, min(count, most))))


def _dz_pieces(call: Call, p: Part, dz: Tensor) -> None:
    """The pieces of ``p``, scaled; what lies outside the pieces is not written."""
    config, transform, t = call.logits_config, call.transform, call.tiles
    row_tiles = (p.units.stop - p.units.start) * (t.unit // config.rows)
    col_tiles = (p.tiles.stop - p.tiles.start) * (t.tile // config.cols)
    inner, outer = scale_factors(transform)
    _dz_pieces_kernel[(row_tiles * col_tiles,)](
        call.hidden, call.weight, call.bias, t.masks, t.ranks, t.sizes, t.source, t.blocks, t.grad, t.lse,
        t.labels, t.columns, t.flags, call.scale, dz, *call.weight.shape, t.masks.shape[1], t.flags.shape[1],
        p.units.start * t.unit, p.tiles.start * t.tile, row_tiles, col_tiles,
        *call.hidden.stride(), *call.weight.stride(), inner, outer, transform.linear_factor, dz.stride(0),
        HAS_BIAS=call.bias is not None, SOFTCAP=transform.softcap is not None, UNIT=t.unit, TILE=t.tile,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def add_products(
    call: Call,
    p: Part,
    dz: Tensor,
    d_hidden: Tensor | None,
    hidden_sum: Tensor | None,
    d_weight: Tensor | None,
    weight_sum: Tensor | None,
) -> None:
    """What the pieces of ``p`` add to dH and dW; None is not made. dH's programs, the longest, start first."""
    config, t, width = call.product_config, call.tiles, call.hidden.shape[1]
    trained = width if d_weight is None else d_weight.shape[1]  # the weight's last columns
    sums = (hidden_sum, d_hidden), (weight_sum, d_weight)
    unit_programs = tile_programs = 0
    if d_hidden is not None:
        unit_programs = (p.units.stop - p.units.start) * (t.unit // config.rows)
        unit_programs *= triton.cdiv(width, config.cols)
    if d_weight is not None:
        tile_programs = (p.tiles.stop - p.tiles.start) * (t.tile // config.rows)
        tile_programs *= triton.cdiv(trained, config.cols)
    _products_kernel[(unit_programs + tile_programs,)](
        dz, dz.stride(0), call.hidden[:, width - trained :], *call.hidden.stride(),
        call.weight, *call.weight.stride(), t.source, t.columns, width, trained,
        *t.of_unit, *t.of_tile, *t.flags.shape,
        p.units.start, p.units.stop, p.tiles.start, p.tiles.stop, unit_programs,
        d_hidden, hidden_sum, d_weight, weight_sum, call.unscale,
        HIDDEN=d_hidden is not None, WEIGHT=d_weight is not None,
        SUM_HIDDEN=hidden_sum is not None, SUM_WEIGHT=weight_sum is not None,
        IN_PLACE=any(s is not None and s is gradient for s, gradient in sums), UNIT=t.unit, TILE=t.tile,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def add_column_sums(call: Call, p: Part, dz: Tensor, d_bias: Tensor) -> None:
    """What the pieces of ``p`` add to db."""
    t = call.tiles
    rows, cols = min(SUM_ROWS, t.unit), min(SUM_COLS, t.tile)
    _column_sums_kernel[((p.tiles.stop - p.tiles.start) * t.tile // cols,)](
        dz, t.columns, *t.of_tile, call.unscale, d_bias,
        t.flags.shape[0], p.units.start, p.units.stop, p.tiles.start, dz.stride(0),
        UNIT=t.unit, TILE=t.tile, ROWS=rows, COLS=cols, num_warps=4,
    )  # fmt: skip
