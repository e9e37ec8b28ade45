"""Forward of ``linear_logprobs`` in Triton: log p_y = z_y − log Σ_v exp(z_v), and statistics of the softmax.

Two kernels. ``_partials_kernel``: a program owns ROWS rows and one split of the vocabulary, makes the split's
logits tile by tile (``logits_triton``) and keeps per row only running values, written once per split. They are
in base 2, the hardware's own: with y = z·log2 e,

    peak m = max y    total s = Σ 2^(y − m)    label's y
    with statistics also: moment Σ (y − m)·2^(y − m)    sum Σ t    rival: max y_v over v < label

``_merge_kernel`` joins the splits of a row: lse = ln 2·M + log Σ_k s_k·2^(m_k − M) with M = max m_k. The label
is the argmax if its logit is M and its rival is smaller, as of equal logits the lowest id wins.

Shapes: hidden (N, H), weight (V, H), n kept rows, S splits; partial results (3 or 6, S, n) float32. Passes over
memory: weight once per group of row blocks, hidden once per split (both mostly from the L2 cache), partial
results once out and once in. Logits are never written. One product of n×V×H.

Kept rows that a list names are first copied next to each other, at most ``budget`` bytes of them at a time:
bulk copies cannot gather, and 4·n·H bytes moved are little beside 2·n·V·H operations. The sums take 8
instructions per logit, 11 with statistics. Labels are not in that: they are looked for only in tiles that hold
one of the program's rows' labels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunking
from .linear_logprobs_torch import ForwardResult
from .logit_transform import LogitTransform
from .logits_triton import (
    contiguous,
    dense_tile,
    local_labels,
    operands,
    place,
    scale_factors,
    tanh,
)
from .tile_configs import GROUP_ROWS, Target, bulk_copies, tile_config, vocabulary_splits

MERGE_ROWS = 128
_LN_2 = tl.constexpr(math.log(2))
# Where y − m is below this its power of 2 is zero in float32, and so must be its share of the moment.
_NEVER = tl.constexpr(-200.0)


@triton.jit
def raise_peak(peak, z):
    """(peak of all so far and of z, how far below it the old one lies, z relative to it), for rows of z."""
    new_peak = tl.maximum(peak, tl.max(z, axis=1))
    # Where all logits so far are −inf (a bias may forbid tokens), any finite reference gives 2^y = 0.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    drop = tl.where(peak == float("-inf"), 0.0, peak - reference)
    return new_peak, drop, z - reference[:, None]


@triton.jit(do_not_specialize=["n", "V", "row_blocks", "splits", "tiles_per_split"])
def _partials_kernel(
    hidden, weight, bias, labels, partials,
    n, V, H, hidden_row, hidden_col, weight_row, weight_col, inner, outer,
    row_blocks, splits, tiles_per_split,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr, BULK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(H > 0)
    block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    first_tile = split * tiles_per_split
    stop_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(V, COLS))
    label = local_labels(labels, rows, n, 0, V)
    # The lowest label that is still to come among these rows; V: none.
    next_label = tl.min(tl.where(label >= first_tile * COLS, label, V))
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    if STATS:
        moment = tl.zeros([ROWS], tl.float32)
        logit_sum = tl.zeros([ROWS], tl.float32)
        rival = tl.full([ROWS], float("-inf"), tl.float32)
    # Flattened with the loop over H: the next tile's operands are on their way while this one is summed up.
    for tile in tl.range(first_tile, stop_tile, flatten=BULK):
        first, stop = tile * COLS, tile * COLS + COLS
        u = dense_tile(
            hidden, weight, bias, block * ROWS, first, n, V, H, hidden_row, hidden_col, weight_row, weight_col,
            BULK, HAS_BIAS, ROWS, COLS, DEPTH,
        )  # fmt: skip
        if SOFTCAP:
            u = tanh(u * inner)
        if STATS:
            logit_sum += tl.sum(u, axis=1)
        # Scale and mask are one multiply-add per logit: what is added hangs on the column alone.
        z = u * outer + tl.where(tl.arange(0, COLS) < V - first, 0.0, float("-inf"))[None, :]
        cols = first + tl.arange(0, COLS)
        if next_label < stop:
            # The label's logit is taken from the very numbers that enter the sum, so log p ≤ 0.
            label_logit += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), axis=1)
            if STATS:
                lower = tl.where(cols[None, :] < label[:, None], z, float("-inf"))
                here = (label >= first) & (label < stop)
                rival = tl.where(here, tl.maximum(peak, tl.max(lower, axis=1)), rival)
            next_label = tl.min(tl.where(label >= stop, label, V))
        peak, drop, shifted = raise_peak(peak, z)
        decay = tl.exp2(drop)
        weights = tl.exp2(shifted)
        if STATS:
            spread = tl.maximum(shifted, _NEVER)  # no 0·(−inf)
            moment = decay * (moment + total * drop) + tl.sum(weights * spread, axis=1)
        total = decay * total + tl.sum(weights, axis=1)
    plane = splits.to(tl.int64) * n
    out = partials + split.to(tl.int64) * n + rows
    kept = rows < n
    tl.store(out, peak, mask=kept)
    tl.store(out + plane, total, mask=kept)
    tl.store(out + 2 * plane, label_logit, mask=kept)
    if STATS:
        tl.store(out + 3 * plane, moment, mask=kept)
        tl.store(out + 4 * plane, logit_sum, mask=kept)
        # Of a label in a later split all columns here are lower.
        tl.store(out + 5 * plane, tl.where(label >= stop_tile * COLS, peak, rival), mask=kept)


@triton.jit(do_not_specialize=["n", "V", "splits"])
def _merge_kernel(
    partials, labels, logps, lse, entropy, top1, logit_mean, peaks, n, V, splits, outer,
    STATS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = rows < n
    label = tl.load(labels + rows, mask=kept, other=0)
    plane = splits.to(tl.int64) * n
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    if STATS:
        moment = tl.zeros([ROWS], tl.float32)
        logit_sum = tl.zeros([ROWS], tl.float32)
        rival = tl.full([ROWS], float("-inf"), tl.float32)
    source = partials + rows
    for _ in range(0, splits):
        split_peak = tl.load(source, mask=kept, other=0.0)
        split_total = tl.load(source + plane, mask=kept, other=1.0)
        label_logit += tl.load(source + 2 * plane, mask=kept, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        drop = tl.where(peak == float("-inf"), 0.0, peak - reference)
        split_drop = tl.where(split_peak == float("-inf"), 0.0, split_peak - reference)
        if STATS:
            split_moment = tl.load(source + 3 * plane, mask=kept, other=0.0)
            logit_sum += tl.load(source + 4 * plane, mask=kept, other=0.0)
            rival = tl.maximum(rival, tl.load(source + 5 * plane, mask=kept, other=0.0))
            moment = tl.exp2(drop) * (moment + total * drop) + tl.exp2(split_drop) * (
                split_moment + split_total * split_drop
            )
        total = tl.exp2(drop) * total + tl.exp2(split_drop) * split_total
        peak = new_peak
        source += n
    log_total = tl.log(total)
    logp = (label_logit - peak) * _LN_2 - log_total
    # label_logit ≤ peak and total ≥ 1; only the hardware's approximate log could leave a rounding above 0.
    logp = tl.where(logp > 0.0, 0.0, logp)
    logp = tl.where((label >= 0) & (label < V), logp, float("nan"))
    tl.store(logps + rows, logp, mask=kept)
    tl.store(lse + rows, peak * _LN_2 + log_total, mask=kept)
    if STATS:
        spread = log_total - (moment / total) * _LN_2
        tl.store(entropy + rows, tl.where(spread < 0.0, 0.0, spread), mask=kept)
        tl.store(top1 + rows, (label_logit == peak) & (rival < peak), mask=kept)
        tl.store(logit_mean + rows, outer * (logit_sum / V), mask=kept)
        tl.store(peaks + rows, peak * _LN_2, mask=kept)


def launch_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: LogitTransform,
    want_stats: bool,
    target: Target,
    budget: int,  # bytes of workspace
) -> ForwardResult:
    """Run both kernels; a label outside [0, V) makes its row's log-prob NaN."""
    n, width = labels.numel(), weight.shape[1]

    def per_row(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, dtype=dtype, device=hidden.device)

    result = ForwardResult(
        logps=per_row(),
        lse=per_row(),
        entropy=per_row() if want_stats else None,
        top1=per_row(torch.bool) if want_stats else None,
        logit_mean=per_row() if want_stats else None,
        peak=per_row() if want_stats else None,
    )
    if n == 0:
        return result
    labels, bias = labels.contiguous(), contiguous(bias)
    length = n if rows is None else max(1, budget // (width * hidden.dtype.itemsize))
    for part in chunking.spans(n, length):
        _launch_rows(
            hidden if rows is None else hidden.index_select(0, rows[part]),
            weight, bias, labels[part], transform, target,
            ForwardResult(*(None if x is None else x[part] for x in result)),  # type: ignore[arg-type]
        )  # fmt: skip
    return result


def _launch_rows(
    hidden: Tensor,  # (n, H)
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    transform: LogitTransform,
    target: Target,
    result: ForwardResult,  # of these n rows, written
) -> None:
    n, (vocab, width) = labels.numel(), weight.shape
    want_stats = result.entropy is not None
    use = "logits" if transform.softcap is None else "logits softcap"
    config, bulk = tile_config(use, target, hidden, weight), bulk_copies(target, hidden, weight)
    row_blocks, tiles = triton.cdiv(n, config.rows), triton.cdiv(vocab, config.cols)
    splits = vocabulary_splits(row_blocks, tiles, target.processors)
    planes = 6 if want_stats else 3
    partials = torch.empty((planes, splits, n), dtype=torch.float32, device=hidden.device)
    inner, outer = scale_factors(transform)
    _partials_kernel[(row_blocks * splits,)](
        *operands(config, bulk, hidden, weight), bias, labels, partials,
        n, vocab, width, *hidden.stride(), *weight.stride(), inner, outer * math.log2(math.e),
        row_blocks, splits, triton.cdiv(tiles, splits),
        HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None, STATS=want_stats, BULK=bulk,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    merge_partials(partials, labels, *result, vocab=vocab, outer=outer)


def merge_partials(
    partials: Tensor,  # (3 or 6, S, n)
    labels: Tensor,  # (n,)
    logps: Tensor,  # (n,), written, as is the rest
    lse: Tensor,
    entropy: Tensor | None = None,
    top1: Tensor | None = None,
    logit_mean: Tensor | None = None,
    peak: Tensor | None = None,
    *,
    vocab: int,
    outer: float = 1.0,  # of logit_mean
) -> None:
    """Join the splits of every row; statistics where they are wanted."""
    _, splits, n = partials.shape
    _merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        partials, labels, logps, lse, entropy, top1, logit_mean, peak, n, vocab, splits, outer,
        STATS=entropy is not None, ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
