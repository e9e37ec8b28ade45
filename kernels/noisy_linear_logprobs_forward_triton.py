"""Forward of ``noisy_linear_logprobs`` in Triton: log p_y = z̃_y − log Σ_v exp(z̃_v), z̃ = z + σ∘ε.

As in ``linear_logprobs_forward_triton``, a program owns ROWS rows and one split of the vocabulary, and keeps
per row only running values, written once per split and joined by the same second kernel: peak, total and the
label's logit, in base 2. A tile has two accumulators (``noisy_logits_triton``) and goes through the noise and
the sums an eighth at a time. With ``want_clean`` the running values of z are kept beside those of z̃.

Shapes: hidden (N, H), weight (V, H), U (V, R), n kept rows, S splits; partial results (3 or 6, S, n) float32.
σ, ε and logits are never written. Two products, of n×V×H and n×V×R, and a draw. Within ``budget`` bytes: half
for kept rows next to each other with their X, an eighth for partial results, the rest for the parts of a slice
of U where U has to be split. Passes over memory: as there, with U read like weight; to split it, U is read and
written once more.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunking import spans
from .linear_logprobs_forward_triton import merge_partials, raise_peak
from .logit_transform import LogitTransform
from .logits_triton import contiguous, local_labels, operands, place, scale_factors
from .matmul_triton import split_finely
from .noise import Noise, NoisyForward
from .noisy_gradients_torch import project
from .noisy_logits_triton import (
    column_operand,
    noisy_logits,
    operand_width,
    plan_columns,
    product_tiles,
    row_operand,
    terms,
)
from .philox_triton import draw_tile, key_words
from .precision import full_precision
from .tile_configs import GROUP_ROWS, Target, bulk_copies, tile_config, vocabulary_splits

PARTIALS_SHARE = 8  # one part in so many of the budget is for partial results
WHOLE_ROWS = 256  # rows go in parts of multiples of this, which every tile's height divides

_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(
    do_not_specialize=[
        "n", "V", "first_col", "key0", "key1", "row_blocks", "splits", "tiles_per_split", "plane"
    ],
    do_not_specialize_on_alignment=["labels", "tokens", "partials"],
)  # fmt: skip
def _noisy_partials_kernel(
    hidden, weight, bias, x, noise_weight, noise_bias, labels, tokens, partials,
    n, V, H, R, hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
    first_col, key0, key1, inner, outer, row_blocks, splits, tiles_per_split, plane,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, CLEAN: tl.constexpr,
    BULK: tl.constexpr, LOW_RANK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(H > 0)
    tl.assume(R > 0)
    PART: tl.constexpr = COLS // 8
    block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    kept = rows < n
    first_tile = split * tiles_per_split
    stop_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(V, COLS))
    label = local_labels(labels, rows, n, first_col, V)
    # The lowest label that is still to come among these rows; V: none.
    next_label = tl.min(tl.where(label >= first_tile * COLS, label, V))
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    if CLEAN:
        clean_peak = tl.full([ROWS], float("-inf"), tl.float32)
        clean_total = tl.zeros([ROWS], tl.float32)
        clean_label_logit = tl.zeros([ROWS], tl.float32)
    # Flattened with the loop over H: the next tile's operands are on their way while this one is summed up.
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
            # Loaded here, with a mask that keeps it here: held across the products, tokens and what of Philox
            # hangs on them alone would take registers that the accumulators need.
            token = tl.load(tokens + rows, mask=kept & (first < V), other=0)
            epsilon = draw_tile(token, first_col + first, key0, key1, ROWS, PART)
            cols = first + tl.arange(0, PART)
            noisy, clean, _ = noisy_logits(
                raw_parts[i], sigma_parts[i], epsilon, bias, noise_bias, cols, cols < V, inner, outer, _LOG2_E,
                HAS_BIAS, HAS_NOISE_BIAS, SOFTCAP,
            )  # fmt: skip
            noisy = tl.where((cols < V)[None, :], noisy, float("-inf"))
            if CLEAN:
                clean = tl.where((cols < V)[None, :], clean, float("-inf"))
            if next_label < first + PART:
                label = local_labels(labels, rows, n, first_col, V)
                # The label's logit is taken from the very numbers that enter the sum, so log p ≤ 0.
                here = cols[None, :] == label[:, None]
                label_logit += tl.sum(tl.where(here, noisy, 0.0), axis=1)
                if CLEAN:
                    clean_label_logit += tl.sum(tl.where(here, clean, 0.0), axis=1)
                next_label = tl.min(tl.where(label >= first + PART, label, V))
            peak, drop, shifted = raise_peak(peak, noisy)
            total = tl.exp2(drop) * total + tl.sum(tl.exp2(shifted), axis=1)
            if CLEAN:
                clean_peak, drop, shifted = raise_peak(clean_peak, clean)
                clean_total = tl.exp2(drop) * clean_total + tl.sum(tl.exp2(shifted), axis=1)
    out = partials + (split * n + rows)
    tl.store(out, peak, mask=kept)
    tl.store(out + plane, total, mask=kept)
    tl.store(out + 2 * plane, label_logit, mask=kept)
    if CLEAN:
        out += 3 * plane
        tl.store(out, clean_peak, mask=kept)
        tl.store(out + plane, clean_total, mask=kept)
        tl.store(out + 2 * plane, clean_label_logit, mask=kept)


def launch_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n,) int64
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
    target: Target,
    budget: int,  # bytes of workspace
) -> NoisyForward:
    """Run the kernels; a label outside [0, V) makes its row's log-probs NaN."""
    n = labels.numel()
    logps, lse, clean_logps = (
        torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    result = NoisyForward(logps, lse, clean_logps if want_clean else None)
    bias, noise = contiguous(bias), noise._replace(bias=contiguous(noise.bias))
    width, itemsize = hidden.shape[1], hidden.dtype.itemsize
    row_bytes = width * itemsize
    if noise.projection is not None:
        row_bytes += 4 * len(noise.projection) + operand_width(hidden.dtype, noise) * itemsize
    most = max(1, budget // 2 // row_bytes)
    for part in spans(n, most - most % WHOLE_ROWS if most > WHOLE_ROWS else most):
        _launch_rows(
            hidden, weight, bias, labels[part].contiguous(), rows[part], transform,
            noise._replace(tokens=noise.tokens[part].contiguous()), target, budget - budget // 2,
            NoisyForward(*(None if x is None else x[part] for x in result)),  # type: ignore[arg-type]
        )  # fmt: skip
    return result


def _launch_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    transform: LogitTransform,
    noise: Noise,
    target: Target,
    budget: int,  # bytes for partial results and the parts of U
    result: NoisyForward,  # of these n rows, written
) -> None:
    n, (vocab, width) = labels.numel(), weight.shape
    kept = hidden.index_select(0, rows)
    with full_precision(hidden.device):
        x = row_operand(kept, project(hidden, rows, noise))
    low_rank, products = noise.projection is not None, terms(hidden.dtype, noise)
    # Parts are always aligned; where there are none the kernels read U itself.
    read = (kept, weight, x) if products > 1 else (kept, weight, x, noise.weight)
    config, bulk = tile_config("noisy", target, *read), bulk_copies(target, *read)
    planes = 3 if result.clean_logps is None else 6
    of_partials = 2 * budget // PARTIALS_SHARE  # the rows took half
    columns, room = plan_columns(vocab, config.cols, kept, noise, budget - of_partials)
    most_splits = max(1, of_partials // (4 * planes * n * len(columns)))
    row_blocks = triton.cdiv(n, config.rows)
    tiles = [triton.cdiv(v.stop - v.start, config.cols) for v in columns]
    splits = [
        min(vocabulary_splits(row_blocks, count, target.processors), most_splits) for count in tiles
    ]
    splits = [triton.cdiv(t, triton.cdiv(t, s)) for t, s in zip(tiles, splits, strict=True)]
    partials = kept.new_empty(planes, sum(splits), n, dtype=torch.float32)
    inner, outer = scale_factors(transform)
    place_of_split = 0
    for v, tile_count, split_count in zip(columns, tiles, splits, strict=True):
        u = column_operand(noise.weight[v], room, products)
        _noisy_partials_kernel[(row_blocks * split_count,)](
            *operands(config, bulk, kept, weight[v]), None if bias is None else bias[v],
            *operands(config, bulk, x, u), None if noise.bias is None else noise.bias[v],
            labels, noise.tokens, partials[:, place_of_split:],
            n, len(u), width, x.shape[1], *kept.stride(), *weight.stride(), *x.stride(), *u.stride(),
            u.shape[1] // products, v.start, *key_words(noise.seed), inner, outer * math.log2(math.e),
            row_blocks, split_count, triton.cdiv(tile_count, split_count), partials.stride(0),
            HAS_BIAS=bias is not None, HAS_NOISE_BIAS=noise.bias is not None,
            SOFTCAP=transform.softcap is not None, CLEAN=result.clean_logps is not None,
            BULK=bulk, LOW_RANK=low_rank, SPLIT=products == 2,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        place_of_split += split_count
    merge_partials(partials[:3], labels, result.logps, result.lse, vocab=vocab)
    if result.clean_logps is not None:
        merge_partials(
            partials[3:], labels, result.clean_logps, torch.empty_like(result.lse), vocab=vocab
        )
