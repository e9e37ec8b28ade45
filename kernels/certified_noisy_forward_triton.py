"""Forward of the certified backward under noise, in Triton: log-probs of z̃ = z + σ∘ε, and their nuclei.

As ``certified_forward_triton``, whose codes, table and kernels serve the noisy logits as they serve clean ones;
only the kernel that makes the logits is another, with the two accumulators of ``noisy_logits_triton``. Where
the clean log-probs are wanted, two more planes of the table take peak and total of each panel of z, and
``_clean_kernel`` joins them.

Cost: two products, of n×V×H and n×V×R, and a draw. Of ``budget`` bytes a quarter is for the parts of U where it
has to be split, slice by slice for every chunk of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .certified_forward_triton import (
    MERGE_PANELS,
    MERGE_ROWS,
    Codes,
    choose_columns,
    plan_rows,
    write_panel,
)
from .logit_transform import LogitTransform
from .logits_triton import contiguous, local_labels, operands, place, scale_factors
from .matmul_triton import join_columns, split_finely
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
from .nucleus import Nuclei, block_rows
from .philox_triton import draw_tile, key_words
from .precision import full_precision
from .tile_configs import GROUP_ROWS, Target, bulk_copies, tile_config

PARTS_SHARE = 4  # one part in so many of the budget is for the parts of U


@triton.jit
def _write_clean(
    z, first, rows, kept, label, table, plane, at, label_logits, V, PANEL: tl.constexpr
):
    """Peak and total of a panel of z, planes 2 and 3 of the table, and the label's logit."""
    cols = first + tl.arange(0, PANEL)
    z = tl.where((cols < V)[None, :], z, float("-inf"))
    here = (label >= first) & (label < first + PANEL)
    if tl.max(here.to(tl.int32), axis=0) != 0:
        found = tl.where(cols[None, :] == label[:, None], z, 0.0)
        tl.store(label_logits + rows, tl.sum(found, axis=1), mask=here)
    peak = tl.max(z, axis=1)
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(table + 2 * plane + at, peak, mask=kept)
    tl.store(table + 3 * plane + at, tl.sum(tl.exp(z - reference[:, None]), axis=1), mask=kept)


@triton.jit(
    do_not_specialize=[
        "n", "V", "first_col", "first_panel", "panels", "key0", "key1", "row_blocks", "tiles", "programs"
    ]
)  # fmt: skip
def _noisy_codes_kernel(
    hidden, weight, bias, x, noise_weight, noise_bias, labels, tokens,
    codes, table, label_logits, rivals, clean_label_logits,
    n, V, H, R, hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
    first_col, first_panel, panels, key0, key1, inner, outer, row_blocks, tiles, programs,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, CLEAN: tl.constexpr,
    BULK: tl.constexpr, LOW_RANK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The V columns from ``first_col`` of the vocabulary on, which are the panels from ``first_panel`` on."""
    tl.assume(H > 0)
    tl.assume(R > 0)
    PART: tl.constexpr = COLS // 8
    PANEL: tl.constexpr = COLS // 2
    plane = n.to(tl.int64) * panels
    for tile in tl.range(tl.program_id(0), row_blocks * tiles, programs, flatten=BULK):
        row_block, col_block = place(tile, row_blocks, tiles, GROUP)
        z, sigma = product_tiles(
            hidden, weight, x, noise_weight, row_block * ROWS, col_block * COLS, n, V, H, R,
            hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
            BULK, LOW_RANK, SPLIT, ROWS, COLS, DEPTH,
        )  # fmt: skip
        raw_parts = split_finely(z, ROWS, COLS)
        sigma_parts = split_finely(sigma, ROWS, COLS)
        rows = row_block * ROWS + tl.arange(0, ROWS)
        kept = rows < n
        label = local_labels(labels, rows, n, first_col, V)
        at = rows.to(tl.int64) * panels + first_panel + 2 * col_block
        token = tl.load(tokens + rows, mask=kept, other=0)
        for panel in tl.static_range(2):
            noisy = ()
            clean = ()
            for i in tl.static_range(4 * panel, 4 * panel + 4):
                first = col_block * COLS + i * PART
                cols = first + tl.arange(0, PART)
                epsilon = draw_tile(token, first_col + first, key0, key1, ROWS, PART)
                noisy_part, clean_part, _ = noisy_logits(
                    raw_parts[i], sigma_parts[i], epsilon, bias, noise_bias, cols, cols < V, inner, outer, 1.0,
                    HAS_BIAS, HAS_NOISE_BIAS, SOFTCAP,
                )  # fmt: skip
                noisy += (noisy_part,)  # type: ignore[assignment]
                clean += (clean_part,)  # type: ignore[assignment]
            first = col_block * COLS + panel * PANEL
            if CLEAN:
                _write_clean(
                    join_columns(clean, ROWS, PANEL), first, rows, kept, label, table, plane, at + panel,
                    clean_label_logits, V, PANEL,
                )  # fmt: skip
            write_panel(
                join_columns(noisy, ROWS, PANEL), first, rows, kept, label, codes, table, plane, at + panel,
                label_logits, rivals, V, False, PANEL,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n", "V", "panels"])
def _clean_kernel(
    table, labels, label_logits, logps, n, V, panels, ROWS: tl.constexpr, STEP: tl.constexpr
):
    """logps from planes 2 and 3 of the table."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    kept = rows < n
    plane = n.to(tl.int64) * panels
    start = table + 2 * plane + rows.to(tl.int64) * panels
    items = tl.arange(0, STEP)[None, :]
    peak = tl.full([ROWS, STEP], float("-inf"), tl.float32)
    for first in range(0, panels, STEP):
        inside = kept & (first + items < panels)
        peak = tl.maximum(peak, tl.load(start + first + items, mask=inside, other=float("-inf")))
    peak = tl.max(peak, axis=1)[:, None]
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([ROWS, STEP], tl.float32)
    for first in range(0, panels, STEP):
        inside = kept & (first + items < panels)
        m = tl.load(start + first + items, mask=inside, other=float("-inf"))
        total += tl.exp(m - reference) * tl.load(
            start + plane + first + items, mask=inside, other=0.0
        )
    label = local_labels(labels, rows, n, 0, V)
    label_logit = tl.load(label_logits + rows, mask=kept & (label >= 0), other=float("nan"))
    logp = (label_logit - peak) - tl.log(tl.sum(total, axis=1)[:, None])
    tl.store(logps + rows, tl.where(logp > 0.0, 0.0, logp), mask=kept)


def launch_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor,  # (n,) int64
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
    tol: float,  # > 0
    target: Target,
    budget: int,  # bytes of workspace
) -> tuple[NoisyForward, Nuclei]:
    """Run the kernels chunk by chunk; a label outside [0, V) makes its row's log-probs NaN."""
    n, (vocab, width) = labels.numel(), weight.shape
    bias, noise_bias = contiguous(bias), contiguous(noise.bias)
    low_rank, products = noise.projection is not None, terms(hidden.dtype, noise)
    itemsize = hidden.dtype.itemsize
    rank, joined = noise.weight.shape[1], operand_width(hidden.dtype, noise)
    # Gathered rows lie next to each other, and so do their X, wherever they come from.
    row_width = width + (-(-4 * rank // itemsize) + joined if low_rank else 0)
    like = hidden.new_empty(1, width)
    read = [like, weight]
    if products == 1:
        read += [hidden.new_empty(1, rank), noise.weight]
    config, bulk = tile_config("noisy certified", target, *read), bulk_copies(target, *read)
    of_parts = budget // PARTS_SHARE if products > 1 else 0
    columns, room = plan_columns(vocab, config.cols, like, noise, of_parts)
    plan = plan_rows(
        n, vocab, row_width, hidden.dtype, block_rows(hidden.device), config, budget - of_parts
    )
    clean_logps = hidden.new_empty(n, dtype=torch.float32) if want_clean else None
    clean_label_logits = hidden.new_empty(plan.chunk, dtype=torch.float32)
    panels = 2 * triton.cdiv(vocab, config.cols)
    inner, outer = scale_factors(transform)

    def write_codes(r: slice, labels: Tensor, out: Codes) -> None:
        count, tokens = len(labels), noise.tokens[r].contiguous()
        kept = hidden.index_select(0, rows[r])
        with full_precision(hidden.device):
            x = row_operand(kept, project(hidden, rows[r], noise))
        row_blocks = triton.cdiv(count, config.rows)
        for v in columns:
            u = column_operand(noise.weight[v], room, products)
            tiles = triton.cdiv(len(u), config.cols)
            programs = min(row_blocks * tiles, target.processors) if bulk else row_blocks * tiles
            _noisy_codes_kernel[(programs,)](
                *operands(config, bulk, kept, weight[v]), None if bias is None else bias[v],
                *operands(config, bulk, x, u), None if noise_bias is None else noise_bias[v],
                labels, tokens, *out, clean_label_logits,
                count, len(u), width, x.shape[1], *kept.stride(), *weight.stride(), *x.stride(), *u.stride(),
                u.shape[1] // products, v.start, v.start // (config.cols // 2), panels,
                *key_words(noise.seed), inner, outer, row_blocks, tiles, programs,
                HAS_BIAS=bias is not None, HAS_NOISE_BIAS=noise_bias is not None,
                SOFTCAP=transform.softcap is not None, CLEAN=want_clean,
                BULK=bulk, LOW_RANK=low_rank, SPLIT=products == 2,
                ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        if clean_logps is not None:
            _clean_kernel[(triton.cdiv(count, MERGE_ROWS),)](
                out.table, labels, clean_label_logits, clean_logps[r], count, vocab, panels,
                ROWS=MERGE_ROWS, STEP=MERGE_PANELS, num_warps=4,
            )  # fmt: skip

    planes = 4 if want_clean else 2
    result, nuclei = choose_columns(labels, vocab, False, tol, plan, config, planes, write_codes)
    return NoisyForward(result.logps, result.lse, clean_logps), nuclei
