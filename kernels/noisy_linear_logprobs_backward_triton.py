"""Exact backward of ``noisy_linear_logprobs`` in Triton, one slice of the vocabulary at a time.

    dz̃_iv = c_i·(1[v = y_i] − p̃_iv)      p̃_iv = exp(z̃_iv − lse_i)      c_i = d loss / d log p_i
    dσ = dz̃∘ε            dU = dσᵀ·X      ds = Σ_i dσ_i      dX = dσ·U      (dA = dXᵀ·H, dH += dX·A)
    dz = dz̃·dz/du        dW = dzᵀ·H      db = Σ_i dz_i      dH = dz·W

For each slice ``_noisy_gradients_kernel`` makes the noisy logits again and writes dσ, dz or both to a
workspace, then ``matmul_triton`` makes the products that are wanted. Where only the generator is trained dz is
not written, and with full rank dU is the only product: three of n×V×H with the logits, and a draw. Gradients of
the vocabulary are finished within their slice and written once; those of the rows are summed over slices in
float32 (``GradientSums``).

Shapes: hidden (N, H), weight (V, H), U (V, R), n kept rows. Within ``budget`` bytes: the workspace, padded to
whole tiles, and the parts of a slice of U where U has to be split. Beside it n·H of the kept rows, n·R of X,
and the sums. Passes over memory per slice: dσ and dz written once, read once per product. They are held in the
dtype of ``hidden``, rounded and scaled as in ``linear_logprobs_backward_triton``; |ε| < 8 is part of the bound
that sets the scale, which costs float16's dz three of its lowest powers of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logprobs_backward_triton import power_of_two_scale
from .logit_transform import LogitTransform
from .logits_triton import contiguous, local_labels, operands, place, scale_factors
from .matmul_triton import matmul, split_finely
from .noise import Needed, Noise, NoisyGradients
from .noisy_gradients_torch import GradientSums, project
from .noisy_logits_triton import (
    column_operand,
    noisy_logits,
    plan_columns,
    product_tiles,
    row_operand,
    terms,
)
from .philox_triton import NORMAL_BOUND, draw_tile, key_words
from .precision import full_precision
from .precision_triton import round_to
from .tile_configs import GROUP_ROWS, Target, bulk_copies, tile_config, vocabulary_splits

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(
    do_not_specialize=[
        "n", "V", "first_col", "key0", "key1", "row_blocks", "splits", "tiles", "tiles_per_split"
    ]
)  # fmt: skip
def _noisy_gradients_kernel(
    hidden, weight, bias, x, noise_weight, noise_bias, labels, tokens, lse, grad, scale, d_sigma, dz,
    n, V, H, R, hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
    first_col, key0, key1, inner, outer, factor, out_row, row_blocks, splits, tiles, tiles_per_split,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    SIGMA: tl.constexpr, MODEL: tl.constexpr, BULK: tl.constexpr, LOW_RANK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(H > 0)
    tl.assume(R > 0)
    PART: tl.constexpr = COLS // 8
    block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    kept = rows < n
    first_tile = split * tiles_per_split
    stop_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    label = local_labels(labels, rows, n, first_col, V)
    # The lowest label that is still to come among these rows; V: none.
    next_label = tl.min(tl.where(label >= first_tile * COLS, label, V))
    row_lse = tl.load(lse + rows, mask=kept, other=0.0) * _LOG2_E
    # Rows past n have coefficient 0.
    coefficient = tl.load(grad + rows, mask=kept, other=0.0) * tl.load(scale)
    # Flattened with the loop over H: the next tile's operands are on their way while this one is written.
    for tile in tl.range(first_tile, stop_tile, flatten=BULK):
        z, sigma = product_tiles(
            hidden, weight, x, noise_weight, block * ROWS, tile * COLS, n, V, H, R,
            hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
            BULK, LOW_RANK, SPLIT, ROWS, COLS, DEPTH,
        )  # fmt: skip
        raw_parts = split_finely(z, ROWS, COLS)
        sigma_parts = split_finely(sigma, ROWS, COLS)
        for i in tl.static_range(8):
            first = tile * COLS + i * PART
            token = tl.load(tokens + rows, mask=kept & (first < V), other=0)  # as in the forward
            epsilon = draw_tile(token, first_col + first, key0, key1, ROWS, PART)
            cols = first + tl.arange(0, PART)
            noisy, _, bent = noisy_logits(
                raw_parts[i], sigma_parts[i], epsilon, bias, noise_bias, cols, cols < V, inner, outer, _LOG2_E,
                HAS_BIAS, HAS_NOISE_BIAS, SOFTCAP,
            )  # fmt: skip
            d = tl.exp2(noisy - row_lse[:, None]) * -coefficient[:, None]
            if next_label < first + PART:
                d = tl.where(cols[None, :] == label[:, None], d + coefficient[:, None], d)
                next_label = tl.min(tl.where(label >= first + PART, label, V))
            # A row without a coefficient adds nothing, whatever its lse is; the products read what is past V.
            counts = (coefficient != 0.0)[:, None] & (cols < V)[None, :]
            at = rows.to(tl.int64)[:, None] * out_row + cols[None, :]
            if SIGMA:
                tl.store(
                    d_sigma + at,
                    round_to(tl.where(counts, d * epsilon, 0.0), d_sigma.dtype.element_ty),
                )
            if MODEL:
                d *= factor
                if SOFTCAP:
                    d *= 1.0 - bent * bent
                tl.store(dz + at, round_to(tl.where(counts, d, 0.0), dz.dtype.element_ty))


def launch_backward(
    grad: Tensor,  # (n,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n,) int64
    lse: Tensor,  # (n,) float32
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

    # The gradient of a sum comes with stride 0.
    grad, lse, labels, tokens = (t.contiguous() for t in (grad, lse, labels, noise.tokens))
    bias, noise_bias = contiguous(bias), contiguous(noise.bias)
    kept = hidden.index_select(0, rows)
    with full_precision(hidden.device):
        x = row_operand(kept, project(hidden, rows, noise))
    read = (kept, weight, x) if products > 1 else (kept, weight, x, noise.weight)
    config, bulk = tile_config("noisy", target, *read), bulk_copies(target, *read)
    # Whole tiles both of the kernel that writes dσ and dz and of all products that read them, either way.
    matrices = (kept, weight, noise.weight if products == 1 else x, x[:, :rank])
    product_configs = [tile_config("matmul", target, matrix) for matrix in matrices]
    step = max(max(c.rows, c.depth) for c in product_configs)
    row_step, col_step = max(config.rows, step), max(config.cols, step)
    padded_rows = triton.cdiv(n, row_step) * row_step
    written = of_sigma + of_model
    columns, room = plan_columns(
        vocab, col_step, kept, noise, budget, written * padded_rows * hidden.dtype.itemsize
    )
    longest = triton.cdiv(columns[0].stop, col_step) * col_step
    workspace = iter(kept.new_empty(written, padded_rows, longest))
    d_sigma_room = next(workspace) if of_sigma else None
    dz_room = next(workspace) if of_model else None

    def add_products(
        d: Tensor,  # (n, C) dσ or dz of the columns v
        of_rows: Tensor,  # (n, ·) X or the kept rows of hidden
        of_columns: Tensor,  # (C, ·) U or weight
        v: slice,
        rows_sum: Tensor | None,  # (n, ·), added to
        columns_gradient: Tensor | None,  # (V, ·), written
        columns_sum: Tensor | None,  # (V,), written
    ) -> None:
        def product(a: Tensor, b: Tensor, out: Tensor, **options: Tensor) -> None:
            matmul(
                a, b, out, tile_config("matmul", target, b), bulk_copies(target, b), target.processors,
                **options,
            )  # fmt: skip

        if columns_gradient is not None:
            product(d.t(), of_rows, columns_gradient[v], alpha=unscale)
        if columns_sum is not None:
            columns_sum[v] = d.sum(dim=0, dtype=torch.float32) * unscale
        if rows_sum is not None:
            product(d, of_columns, rows_sum, addend=rows_sum)

    inner, outer = scale_factors(transform)
    scale, unscale = power_of_two_scale(grad, max(NORMAL_BOUND, abs(transform.linear_factor)))
    row_blocks = padded_rows // config.rows
    for v in columns:
        u = column_operand(noise.weight[v], room, products)
        tiles = triton.cdiv(triton.cdiv(len(u), col_step) * col_step, config.cols)
        splits = vocabulary_splits(row_blocks, tiles, target.processors) if bulk else tiles
        _noisy_gradients_kernel[(row_blocks * splits,)](
            *operands(config, bulk, kept, weight[v]), None if bias is None else bias[v],
            *operands(config, bulk, x, u), None if noise_bias is None else noise_bias[v],
            labels, tokens, lse, grad, scale, d_sigma_room, dz_room,
            n, len(u), width, x.shape[1], *kept.stride(), *weight.stride(), *x.stride(), *u.stride(),
            u.shape[1] // products, v.start, *key_words(noise.seed), inner, outer * math.log2(math.e),
            transform.linear_factor, longest, row_blocks, splits, tiles, triton.cdiv(tiles, splits),
            HAS_BIAS=bias is not None, HAS_NOISE_BIAS=noise_bias is not None,
            SOFTCAP=transform.softcap is not None, SIGMA=of_sigma, MODEL=of_model,
            BULK=bulk, LOW_RANK=noise.projection is not None, SPLIT=products == 2,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if d_sigma_room is not None:
            add_products(
                d_sigma_room[:n, : len(u)], x[:, :rank], u[:, :rank], v,
                sums.dx, whole.get("noise_weight"), whole.get("noise_bias"),
            )  # fmt: skip
        if dz_room is not None:
            add_products(
                dz_room[:n, : len(u)], kept, weight[v], v,
                sums.dh, whole.get("weight"), whole.get("bias"),
            )  # fmt: skip
    for total in {id(t): t for t in (sums.dh, sums.dx) if t is not None}.values():
        total *= unscale
    with full_precision(hidden.device):
        return sums.finish()
