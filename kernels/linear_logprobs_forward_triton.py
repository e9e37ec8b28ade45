"""Forward of ``linear_logprobs`` in Triton: log p_y = z_y − log Σ_v exp(z_v), and statistics of the softmax.

Two kernels. ``_partials_kernel``: a program owns ROWS rows and one split of the vocabulary, makes the split's
logits tile by tile (``logits_triton``) and keeps per row only running values, written once per split:

    peak m = max z    total s = Σ exp(z − m)    label z_y
    with statistics also: moment Σ (z − m)·exp(z − m)    sum Σ z    rival max z_v over v < y

``_merge_kernel`` joins the splits of a row: lse = M + log Σ_k s_k·exp(m_k − M) with M = max m_k. The label is
the argmax if z_y = M and its rival is smaller, as of equal logits the lowest id wins.

Shapes: hidden (N, H), weight (V, H), n kept rows, S splits; partial results (3 or 6, S, n) float32. Passes over
memory: weight once per group of row blocks, hidden once per split (both mostly from the L2 cache), partial
results once out and once in. Logits are never written. One product of n×V×H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_logprobs_torch import ForwardResult
from .logit_transform import LogitTransform
from .logits_triton import (
    contiguous,
    local_labels,
    place,
    raw_tile,
    scale_factors,
    source_rows,
    tanh,
)
from .tile_configs import GROUP_ROWS, Target, tile_config, vocabulary_splits

MERGE_ROWS = 128


@triton.jit(do_not_specialize=["n", "V", "row_blocks", "splits", "tiles_per_split"])
def _partials_kernel(
    hidden, weight, bias, labels, row_index, partials,
    n, V, H, hidden_row, hidden_col, weight_row, weight_col, inner, outer,
    row_blocks, splits, tiles_per_split,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, GATHER: tl.constexpr, STATS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block, split = place(tl.program_id(0), row_blocks, splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    hidden_rows = source_rows(row_index, rows, n, GATHER)
    label = local_labels(labels, rows, n, 0, V)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    label_logit = tl.zeros([ROWS], tl.float32)
    if STATS:
        moment = tl.zeros([ROWS], tl.float32)
        logit_sum = tl.zeros([ROWS], tl.float32)
        rival = tl.full([ROWS], float("-inf"), tl.float32)
    stop = tl.minimum((split + 1) * tiles_per_split * COLS, V)
    for first in range(split * tiles_per_split * COLS, stop, COLS):
        cols = first + tl.arange(0, COLS)
        z = raw_tile(
            hidden, weight, bias, hidden_rows, cols, V, H, hidden_row, hidden_col, weight_row, weight_col,
            HAS_BIAS, ROWS, COLS, DEPTH,
        )  # fmt: skip
        if SOFTCAP:
            z = tanh(z * inner)
        z *= outer
        inside = (cols < V)[None, :]
        if STATS:
            logit_sum += tl.sum(tl.where(inside, z, 0.0), axis=1)
        z = tl.where(inside, z, float("-inf"))
        # The label's logit is taken from the very numbers that enter the sum, so log p ≤ 0.
        label_logit += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), axis=1)
        if STATS:
            lower = tl.where(cols[None, :] < label[:, None], z, float("-inf"))
            rival = tl.maximum(rival, tl.max(lower, axis=1))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        # Where all logits so far are −inf (a bias may forbid tokens), any finite reference gives exp = 0.
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        drop = tl.where(peak == float("-inf"), 0.0, peak - reference)
        decay = tl.exp(drop)
        shifted = z - reference[:, None]
        weights = tl.exp(shifted)
        if STATS:
            spread = tl.where(weights == 0.0, 0.0, shifted)  # no 0·(−inf)
            moment = decay * (moment + total * drop) + tl.sum(weights * spread, axis=1)
        total = decay * total + tl.sum(weights, axis=1)
        peak = new_peak
    plane = splits.to(tl.int64) * n
    out = partials + split.to(tl.int64) * n + rows
    kept = rows < n
    tl.store(out, peak, mask=kept)
    tl.store(out + plane, total, mask=kept)
    tl.store(out + 2 * plane, label_logit, mask=kept)
    if STATS:
        tl.store(out + 3 * plane, moment, mask=kept)
        tl.store(out + 4 * plane, logit_sum, mask=kept)
        tl.store(out + 5 * plane, rival, mask=kept)


@triton.jit(do_not_specialize=["n", "V", "splits"])
def _merge_kernel(
    partials, labels, logps, lse, entropy, top1, logit_mean, n, V, splits,
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
            moment = tl.exp(drop) * (moment + total * drop) + tl.exp(split_drop) * (
                split_moment + split_total * split_drop
            )
        total = tl.exp(drop) * total + tl.exp(split_drop) * split_total
        peak = new_peak
        source += n
    log_total = tl.log(total)
    logp = (label_logit - peak) - log_total
    # label_logit ≤ peak and total ≥ 1; only the hardware's approximate log could leave a rounding above 0.
    logp = tl.where(logp > 0.0, 0.0, logp)
    logp = tl.where((label >= 0) & (label < V), logp, float("nan"))
    tl.store(logps + rows, logp, mask=kept)
    tl.store(lse + rows, peak + log_total, mask=kept)
    if STATS:
        spread = log_total - moment / total
        tl.store(entropy + rows, tl.where(spread < 0.0, 0.0, spread), mask=kept)
        tl.store(top1 + rows, (label_logit == peak) & (rival < peak), mask=kept)
        tl.store(logit_mean + rows, logit_sum / V, mask=kept)


def launch_forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    transform: LogitTransform,
    want_stats: bool,
    target: Target,
) -> ForwardResult:
    """Run both kernels; a label outside [0, V) makes its row's log-prob NaN."""
    n, (vocab, width) = labels.numel(), weight.shape

    def per_row(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(n, dtype=dtype, device=hidden.device)

    result = ForwardResult(
        logps=per_row(),
        lse=per_row(),
        entropy=per_row() if want_stats else None,
        top1=per_row(torch.bool) if want_stats else None,
        logit_mean=per_row() if want_stats else None,
    )
    if n == 0:
        return result
    labels, bias, rows = labels.contiguous(), contiguous(bias), contiguous(rows)
    config = tile_config(
        "logits" if transform.softcap is None else "softcap", target, hidden, weight
    )
    row_blocks, tiles = triton.cdiv(n, config.rows), triton.cdiv(vocab, config.cols)
    splits = vocabulary_splits(row_blocks, tiles, target.processors)
    planes = 6 if want_stats else 3
    partials = torch.empty((planes, splits, n), dtype=torch.float32, device=hidden.device)
    inner, outer = scale_factors(transform)
    _partials_kernel[(row_blocks * splits,)](
        hidden, weight, bias, labels, rows, partials,
        n, vocab, width, *hidden.stride(), *weight.stride(), inner, outer,
        row_blocks, splits, triton.cdiv(tiles, splits),
        HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None, GATHER=rows is not None,
        STATS=want_stats, ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(n, MERGE_ROWS),)](
        partials, labels, *result, n, vocab, splits,
        STATS=want_stats, ROWS=MERGE_ROWS, num_warps=4,
    )  # fmt: skip
    return result
