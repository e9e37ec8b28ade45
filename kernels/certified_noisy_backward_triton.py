"""Certified backward of ``noisy_linear_logprobs`` in Triton: the exact gradients on the columns of the unions.

    dz̃_iv = c_i·(1[v = y_i] − exp(z̃_iv − lse_i)) for v in the union of row i's block, else 0
    dσ = dz̃∘ε            dU = dσᵀ·X      ds = Σ_i dσ_i      dX = dσ·U      (dA = dXᵀ·H, dH += dX·A)
    dz = dz̃·dz/du        dW = dzᵀ·H      db = Σ_i dz_i      dH = dz·W

Rows and columns are ordered into pieces as in ``certified_backward_triton``, whose products and column sums
take dσ with X and U as they take dz with H and W. Slices of the new order of columns are walked; for each
``_noisy_pieces_kernel`` makes the pieces of dσ, dz or both in a workspace. Gradients of the vocabulary are
written once, those of the rows are summed over slices in float32, in place.

Columns are neighbours no longer, so each draw takes a counter of its own, four where neighbours share one. The
parts of U, where it has to be split, are made for the columns of a slice in their new order. Cost: ρ times the
exact backward, ρ the share of (row, column) pairs in pieces. Memory as in the exact backward, and where dH is
wanted of a generator of full rank a second float32 n·H.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .certified_backward_triton import LISTS_SHARE, Call, Part, add_column_sums, add_products
from .linear_logprobs_backward_triton import power_of_two_scale
from .logit_transform import LogitTransform
from .logits_triton import add_product, contiguous, place, scale_factors
from .matmul_triton import split_finely
from .noise import Needed, Noise, NoisyGradients
from .noisy_gradients_torch import GradientSums, project
from .noisy_logits_triton import (
    column_operand,
    noise_product,
    noisy_logits,
    plan_columns,
    row_operand,
    terms,
)
from .nucleus_tiles_triton import arrange, block_needs, block_range
from .philox_triton import NORMAL_BOUND, draw_columns, key_words
from .precision import full_precision
from .precision_triton import round_to
from .tile_configs import GROUP_ROWS, Target, tile_config

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(
    do_not_specialize=["V", "words", "tiles", "first_col", "row_tiles", "col_tiles", "key0", "key1"]
)  # fmt: skip
def _noisy_pieces_kernel(
    hidden, weight, bias, x, noise_weight, noise_bias, tokens, masks, ranks, sizes, source, blocks, grad, lse,
    labels, columns, noise_columns, flags, scale, d_sigma, dz,
    V, H, R, words, tiles, first_col, row_tiles, col_tiles,
    hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
    key0, key1, inner, outer, factor, out_row,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMA: tl.constexpr, MODEL: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Column k of the new order is ``columns[k]`` of the vocabulary and row ``noise_columns[k]`` of U."""
    PART: tl.constexpr = COLS // 8
    row_tile, col_tile = place(tl.program_id(0), row_tiles, col_tiles, GROUP)
    unit, tile = row_tile * ROWS // UNIT, (first_col + col_tile * COLS) // TILE
    if tl.load(flags + unit * tiles + tile) == 0:
        return
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    new_cols = first_col + col_tile * COLS + tl.arange(0, COLS)
    kept_rows = tl.maximum(tl.load(source + rows), 0).to(tl.int64)
    z = add_product(
        tl.zeros([ROWS, COLS], tl.float32), hidden, weight, kept_rows,
        tl.maximum(tl.load(columns + new_cols), 0), H, hidden_row, hidden_col, weight_row, weight_col, DEPTH,
    )  # fmt: skip
    sigma = noise_product(
        tl.zeros([ROWS, COLS], tl.float32), x, noise_weight, kept_rows,
        tl.maximum(tl.load(noise_columns + new_cols), 0), R,
        x_row, x_col, noise_row, noise_col, low_part, SPLIT, DEPTH,
    )  # fmt: skip
    token = tl.load(tokens + kept_rows)
    label = tl.load(labels + rows)
    row_lse = tl.load(lse + rows) * _LOG2_E
    coefficient = tl.load(grad + rows) * tl.load(scale)
    # Nearly always one block: rows without a coefficient leave gaps that the next block's fill.
    block = tl.load(blocks + rows)
    first_block, last_block = block_range(block)
    raw_parts = split_finely(z, ROWS, COLS)
    sigma_parts = split_finely(sigma, ROWS, COLS)
    for i in tl.static_range(8):
        out_cols = col_tile * COLS + i * PART + tl.arange(0, PART)
        cols = tl.load(columns + first_col + out_cols)
        epsilon = draw_columns(token[:, None], tl.maximum(cols, 0)[None, :], key0, key1)
        noisy, _, bent = noisy_logits(
            raw_parts[i], sigma_parts[i], epsilon, bias, noise_bias, cols, cols >= 0, inner, outer, _LOG2_E,
            HAS_BIAS, HAS_NOISE_BIAS, SOFTCAP,
        )  # fmt: skip
        d = tl.where(cols[None, :] == label[:, None], 1.0, 0.0)
        d = (d - tl.exp2(noisy - row_lse[:, None])) * coefficient[:, None]
        # Padding of either kind adds nothing.
        counts = (coefficient != 0.0)[:, None] & (cols >= 0)[None, :]
        for current in range(first_block, last_block + 1):
            needed = block_needs(masks, ranks, sizes, current, cols, V, words)
            counts &= (block != current)[:, None] | needed[None, :]
        at = rows.to(tl.int64)[:, None] * out_row + out_cols[None, :]
        if SIGMA:
            d_sigma_part = tl.where(counts, d * epsilon, 0.0)
            tl.store(d_sigma + at, round_to(d_sigma_part, d_sigma.dtype.element_ty))
        if MODEL:
            d *= factor
            if SOFTCAP:
                d *= 1.0 - bent * bent
            tl.store(dz + at, round_to(tl.where(counts, d, 0.0), dz.dtype.element_ty))


def launch_backward(
    grad: Tensor,  # (n,) float32; rows here and below in block order
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
    noise: Noise,
    needed: Needed,
    target: Target,
    budget: int,  # bytes of workspace
) -> NoisyGradients:
    """The gradients that are wanted, in the dtypes of the inputs."""
    n, (vocab, width) = labels.numel(), weight.shape
    sums = GradientSums(hidden, weight, bias, rows, noise, needed)
    if n == 0:
        return sums.finish()
    whole, rank, products = sums.whole, noise.weight.shape[1], terms(hidden.dtype, noise)
    of_sigma = sums.dx is not None or "noise_weight" in whole or "noise_bias" in whole
    of_model = sums.dh is not None or "weight" in whole or "bias" in whole
    # The two products that a generator of full rank adds to dH are summed apart.
    dx = torch.zeros_like(sums.dx) if sums.dx is not None and sums.dx is sums.dh else sums.dx

    bias, noise_bias, tokens = contiguous(bias), contiguous(noise.bias), noise.tokens.contiguous()
    kept = hidden.index_select(0, rows)
    with full_precision(hidden.device):
        x = row_operand(kept, project(hidden, rows, noise))
    read = (kept, weight, x) if products > 1 else (kept, weight, x, noise.weight)
    config = tile_config("noisy pieces", target, *read)
    model_config = tile_config("matmul", target, kept, weight)
    of_u = noise.weight if products == 1 else x
    noise_config = tile_config("matmul", target, x[:, :rank], of_u[:, :rank])
    # Whole tiles of every kernel; all are powers of two. The gradient of a sum comes with stride 0.
    sides = [max(c.rows, c.depth) for c in (model_config, noise_config)]
    t = arrange(
        grad.contiguous(), lse.contiguous(), labels.contiguous(), torch.arange(n, device=rows.device),
        columns.contiguous(), counts.contiguous(), vocab, height,
        unit=max(config.rows, *sides), tile=max(config.cols, *sides),
    )  # fmt: skip
    units, tiles = t.flags.shape
    written = of_sigma + of_model
    slices, room = plan_columns(
        tiles * t.tile, t.tile, kept, noise, budget - budget // LISTS_SHARE,
        written * units * t.unit * kept.dtype.itemsize,
    )  # fmt: skip
    workspace = iter(kept.new_empty(written, units * t.unit, slices[0].stop))
    d_sigma = next(workspace) if of_sigma else None
    dz = next(workspace) if of_model else None
    scale, unscale = power_of_two_scale(grad, max(NORMAL_BOUND, abs(transform.linear_factor)))
    column_sums: dict[str, Tensor] = {
        name: kept.new_zeros(vocab, dtype=torch.float32)
        for name in ("bias", "noise_bias")
        if name in whole
    }

    def add_gradients(
        call: Call,
        p: Part,
        d: Tensor,
        of_columns: Call,
        rows_gradient: Tensor | None,  # (n, ·) float32
        columns_gradient: str,
        columns_sum: str,
    ) -> None:
        """``of_columns``: ``call``, or what takes its place where it is U's parts that are read."""
        rows_sum = rows_gradient if len(slices) > 1 else None
        if rows_gradient is not None:
            add_products(of_columns, p, d, rows_gradient, rows_sum, None, None)
        if columns_gradient in whole:
            add_products(call, p, d, None, None, whole[columns_gradient], None)
        if columns_sum in whole:
            add_column_sums(call, p, d, column_sums[columns_sum])

    model = Call(kept, weight, None, transform, scale, unscale, t, config, model_config)
    generator = model._replace(
        hidden=x[:, :rank], weight=noise.weight[:, :rank], product_config=noise_config
    )
    inner, outer = scale_factors(transform)
    for c in slices:
        p = Part(slice(0, units), slice(c.start // t.tile, c.stop // t.tile))
        u, noise_columns, of_parts = noise.weight, t.columns, generator
        if room is not None:
            u = column_operand(noise.weight, room, products, t.columns[c])
            local = torch.arange(-c.start, len(t.columns) - c.start, device=rows.device)
            noise_columns = torch.where(t.columns >= 0, local, -1).to(torch.int32)
            of_parts = generator._replace(
                weight=u[:, :rank], tiles=t._replace(columns=noise_columns)
            )
        row_tiles, col_tiles = units * t.unit // config.rows, (c.stop - c.start) // config.cols
        _noisy_pieces_kernel[(row_tiles * col_tiles,)](
            kept, weight, bias, x, u, noise_bias, tokens, t.masks, t.ranks, t.sizes, t.source, t.blocks, t.grad,
            t.lse, t.labels, t.columns, noise_columns, t.flags, scale, d_sigma, dz,
            vocab, width, x.shape[1], t.masks.shape[1], tiles, c.start, row_tiles, col_tiles,
            *kept.stride(), *weight.stride(), *x.stride(), *u.stride(), u.shape[1] // products,
            *key_words(noise.seed), inner, outer * math.log2(math.e), transform.linear_factor, slices[0].stop,
            HAS_BIAS=bias is not None, HAS_NOISE_BIAS=noise_bias is not None,
            SOFTCAP=transform.softcap is not None, SIGMA=of_sigma, MODEL=of_model, SPLIT=products == 2,
            UNIT=t.unit, TILE=t.tile,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if d_sigma is not None:
            add_gradients(generator, p, d_sigma, of_parts, dx, "noise_weight", "noise_bias")
        if dz is not None:
            add_gradients(model, p, dz, model, sums.dh, "weight", "bias")
    for name, total in column_sums.items():
        whole[name].copy_(total)
    if dx is not None and sums.dx is not None and dx is not sums.dx:
        sums.dx += dx
    with full_precision(hidden.device):
        return sums.finish()
