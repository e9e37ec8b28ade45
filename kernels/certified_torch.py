"""Certified sparse backward of ``linear_logprobs`` in PyTorch: gradients on the columns that carry probability.

The forward makes the logits of a chunk of rows over the whole vocabulary and, while it has them, finds for each
row the threshold below which at most ``tol`` of the probability lies. The backward makes the logits of a block
of rows again on the block's columns alone (``nucleus``), and two products with as few columns:

    dH_block = dz·W[columns]        dW[columns] += dzᵀ·H_block

Cost: one product of n×V×H in the forward, 3ρ in the backward, ρ the share of (row, column) pairs that blocks
touch. Passes over a chunk in the forward: about five for the softmax, three for each of ``STEPS`` looks at the
threshold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .chunking import (
    CertifiedPlan,
    plan_certified_backward,
    plan_certified_forward,
    plan_tile,
    spans,
)
from .linear_logprobs_torch import (
    LEAST_EXPONENT,
    ForwardResult,
    add_tile_gradients,
    labels_in_tile,
    row_block,
    vocabulary_slice,
    write_rows,
)
from .logit_transform import LogitTransform
from .nucleus import WORD_BITS, Nuclei, block_rows, column_mask, gather_blocks, words
from .precision import accumulation_dtype, full_precision

# Of the search for a row's threshold, on the logarithms of threshold and tail mass. Four looks leave the nuclei
# 3 to 6 % larger than the smallest possible; a fifth costs what it saves.
STEPS = 4
START = 0.2  # of the way from the threshold that is always allowed to the largest probability
AIM = 0.97  # of tol: aiming a little lower makes more looks end on the allowed side
STEEPNESS = (
    0.2,
    20.0,
)  # bounds on the slope of log tail mass over log threshold


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor | None,  # (n,) int64 into hidden, or None: all of them
    transform: LogitTransform,
    want_stats: bool,
    tol: float,
) -> tuple[ForwardResult, Nuclei]:
    """What ``linear_logprobs_torch.forward`` returns, and the nuclei for ``tol`` > 0."""
    dtype = accumulation_dtype(hidden.dtype)
    n, vocab, device = labels.numel(), weight.shape[0], hidden.device
    height = block_rows(device)
    plan = plan_certified_forward(n, vocab, weight.shape[1], height, device, dtype)
    per_row = {name: hidden.new_empty(n, dtype=dtype) for name in ("logps", "lse", "dropped")}
    if want_stats:
        per_row |= {name: hidden.new_empty(n, dtype=dtype) for name in ("entropy", "logit_mean")}
        per_row["top1"] = hidden.new_empty(n, dtype=torch.bool)
    blocks = -(-n // height)
    order = torch.empty(n, dtype=torch.int64, device=device)
    columns = torch.empty((blocks, words(vocab)), dtype=torch.int32, device=device)
    counts = torch.empty(blocks, dtype=torch.int32, device=device)

    with full_precision(device):
        chunk = torch.empty((plan.chunk_rows, vocab), dtype=dtype, device=device)
        scratch = _Scratch(plan.tile_rows, vocab, dtype, device)
        masks = torch.empty((plan.window_rows, words(vocab)), dtype=torch.int32, device=device)
        sizes = torch.empty(plan.window_rows, dtype=dtype, device=device)
        for window in spans(n, plan.window_rows):
            for r in spans(window.stop - window.start, plan.chunk_rows):
                places = slice(window.start + r.start, window.start + r.stop)
                z = chunk[: r.stop - r.start]
                _fill_logits(z, row_block(hidden, rows, places, dtype), weight, bias, transform)
                for t in spans(z.shape[0], plan.tile_rows):
                    of_tile = slice(places.start + t.start, places.start + t.stop)
                    of_window = slice(r.start + t.start, r.start + t.stop)
                    _finish_rows(
                        z[t],
                        labels[of_tile],
                        tol,
                        scratch,
                        {name: values[of_tile] for name, values in per_row.items()},
                        masks[of_window],
                        sizes[of_window],
                    )
            length = window.stop - window.start
            b = slice(window.start // height, -(-window.stop // height))
            within, columns[b], counts[b] = gather_blocks(
                masks[:length], sizes[:length], height, vocab
            )
            order[window] = within + window.start
    result = ForwardResult(
        *(per_row.get(name) for name in ForwardResult._fields)  # type: ignore[arg-type]
    )
    return result, Nuclei(order, columns, counts, per_row["dropped"])


class _Scratch:
    """Room of one tile, its rows padded with zeros to whole words, and the weights that make 16 flags bits."""

    def __init__(self, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        padded = words(vocab) * WORD_BITS
        self.padded = torch.zeros((rows, padded), dtype=dtype, device=device)
        self.values = self.padded[:, :vocab]
        self.bits = 2.0 ** torch.arange(16, dtype=dtype, device=device)


def _fill_logits(
    z: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
) -> None:
    """z (R, V) of the rows h (R, H); a head in low precision is widened slice by slice."""
    if weight.dtype == z.dtype:
        torch.mm(h, weight.t(), out=z)
    else:
        step = plan_tile(z.shape[0], z.shape[1], h.shape[1], z.device, z.dtype).cols
        for v in spans(weight.shape[0], step):
            z[:, v] = h @ weight[v].to(z.dtype).t()
    if bias is not None:
        z += bias.to(z.dtype)
    transform.apply_(z)


def _finish_rows(
    z: Tensor,  # (T, V) logits; overwritten
    labels: Tensor,  # (T,)
    tol: float,
    scratch: _Scratch,
    out: dict[str, Tensor],  # (T,) each
    masks: Tensor,  # (T, words)
    sizes: Tensor,  # (T,)
) -> None:
    """All that is wanted of some rows whose logits are at hand."""
    at_label = labels.unsqueeze(1)
    label_logit = z.gather(1, at_label)
    if "logit_mean" in out:
        peak, argmax = z.max(dim=1, keepdim=True)
        out["logit_mean"].copy_(z.mean(dim=1))
        out["top1"].copy_(argmax.squeeze(1) == labels)
    else:
        peak = z.amax(dim=1, keepdim=True)
    shifted = z.sub_(peak).clamp_(min=LEAST_EXPONENT[z.dtype])
    free = scratch.values[: z.shape[0]]
    if "entropy" in out:
        e = torch.exp(shifted, out=free)
        moment, free = shifted.mul_(e).sum(dim=1, keepdim=True), shifted
    else:
        e = shifted.exp_()
    total = e.sum(dim=1, keepdim=True)  # ≥ 1 because the largest logit contributes exp(0)
    log_total = total.log()
    out["logps"].copy_(((label_logit - peak) - log_total).squeeze(1))
    out["lse"].copy_((peak + log_total).squeeze(1))
    if "entropy" in out:
        out["entropy"].copy_((log_total - moment / total).clamp_(min=0.0).squeeze(1))
    threshold, tail = nucleus_thresholds(e, total, tol, free)
    out["dropped"].copy_((tail / total).squeeze(1))

    # In place of e, which may lie in the scratch: one flag per column, nucleus or label.
    flags = torch.ge(e, threshold, out=scratch.values[: z.shape[0]])
    torch.sum(flags, dim=1, out=sizes)
    flags.scatter_(1, at_label, 1.0)
    halves = scratch.padded[: z.shape[0]].view(-1, scratch.bits.numel()) @ scratch.bits
    masks.copy_(halves.to(torch.int32).to(torch.int16).view(torch.int32).view_as(masks))


def nucleus_thresholds(
    e: Tensor,  # (T, V) exp(z − max z)
    total: Tensor,  # (T, 1) its sum over V
    tol: float,
    free: Tensor,  # (T, V), overwritten
) -> tuple[Tensor, Tensor]:
    """(threshold, tail), each (T, 1): entries of e below the threshold sum up to tail ≤ tol·total.

    The tail mass rises with the threshold. Its logarithm is followed by secants within the bracket that the
    looks so far leave, or halved where a secant leaves it; the largest threshold found allowed is taken.
    tol·total/V is allowed without a look: fewer than V entries are smaller.
    """
    allowed = torch.log(tol * total)
    low = allowed - torch.tensor(float(e.shape[1])).log()
    high = torch.zeros_like(low)  # log of the largest entry, which must stay
    tail = tol * total  # an upper bound until a look has found better
    x = low + START * (high - low)
    slope: Tensor | float = 1.0
    previous: tuple[Tensor, Tensor] | None = None
    aim = torch.tensor(AIM).log()
    for _ in range(STEPS):
        mass = torch.lt(e, x.exp(), out=free).mul_(e).sum(dim=1, keepdim=True)
        excess = mass.clamp(min=torch.finfo(e.dtype).tiny).log_() - allowed
        ok = excess <= 0.0
        better = ok & (x > low)
        low, tail = torch.where(better, x, low), torch.where(better, mass, tail)
        high = torch.where(ok, high, torch.minimum(high, x))
        if previous is not None:
            slope = ((excess - previous[1]) / (x - previous[0])).nan_to_num_().clamp_(*STEEPNESS)
        previous = (x, excess)
        x = x - (excess - aim) / slope
        x = torch.where((x > low) & (x < high), x, 0.5 * (low + high))
    return low.exp(), tail


def backward(
    grad: Tensor,  # (n,) d loss / d log-prob; rows here and below in block order
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,) int64 into hidden, each at most once
    lse: Tensor,  # (n,)
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    low_memory: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (N, H), (V, H), (V,) in the dtypes of the inputs, from each block's columns.

    A head in low precision needs a float32 sum for dW. With n ≤ V slices of V are walked outside and dH is
    summed up in float32, else dW is; with ``low_memory`` each gradient has a sweep of its own.
    """
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    device = hidden.device
    d_hidden = torch.zeros_like(hidden) if need_hidden else None
    d_weight = torch.zeros_like(weight) if need_weight else None
    d_bias = torch.zeros(vocab, dtype=dtype, device=device) if need_bias else None
    grad = grad.to(dtype)
    plan = plan_certified_backward(width, device, dtype)
    room = _Room(min(plan.gather_cols, vocab), width, weight.dtype, dtype, device)
    whole = [slice(0, vocab)]
    sliced = whole
    if need_weight and weight.dtype != dtype and (low_memory or n <= vocab):
        sliced = list(spans(vocab, plan.slice_cols))

    def sweep(slices: list[slice], dh_out: Tensor | None, dw_out: Tensor | None) -> None:
        wide = None
        if dh_out is not None and len(slices) > 1:
            wide = torch.zeros((n, width), dtype=dtype, device=device)
        db_out = d_bias if dw_out is not None or d_weight is None else None
        for v in slices:
            dw = None
            if dw_out is not None:
                dw = dw_out[v]
                dw = dw if dw.dtype == dtype else torch.zeros_like(dw, dtype=dtype)
            db = None if db_out is None else db_out[v]
            for places, cols in _blocks(grad, columns, counts, v, vocab, plan):
                h = hidden[rows[places]].to(dtype)
                dh = None if dh_out is None else torch.zeros_like(h)
                of_rows = labels[places], lse[places], grad[places]
                if cols is None:
                    _add_all_columns(h, weight, bias, v, *of_rows, transform, dh, dw, db)
                else:
                    for c in spans(cols.numel(), plan.gather_cols):
                        _add_columns(
                            h, weight, bias, v, cols[c], *of_rows, transform, dh, dw, db, room
                        )
                if wide is not None and dh is not None:
                    wide.index_add_(0, places, dh)
                elif dh_out is not None and dh is not None:
                    dh_out.index_copy_(0, rows[places], dh.to(dh_out.dtype))
            if dw_out is not None and dw is not None and dw.dtype != dw_out.dtype:
                dw_out[v] = dw.to(dw_out.dtype)
        if wide is not None and dh_out is not None:
            write_rows(dh_out, rows, slice(0, n), wide)

    with full_precision(device):
        if low_memory and need_hidden and len(sliced) > 1:
            sweep(whole, d_hidden, None)
            sweep(sliced, None, d_weight)
        else:
            sweep(sliced, d_hidden, d_weight)
    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


class _Room:
    """Room for gathered columns. Taken anew for each gather, its pages would cost more than the gather."""

    def __init__(
        self, cols: int, width: int, narrow: torch.dtype, wide: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty((cols, width), dtype=narrow, device=device)
        self.d_weight = torch.empty((cols, width), dtype=wide, device=device)
        self.logits = torch.empty(cols * block_rows(device), dtype=wide, device=device)


def _blocks(
    grad: Tensor, columns: Tensor, counts: Tensor, v: slice, vocab: int, plan: CertifiedPlan
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(places of rows with a coefficient, their columns within the slice ``v``; None: all of them)."""
    height = block_rows(grad.device)
    active = grad.nonzero().squeeze(1)
    block = torch.div(active, height, rounding_mode="floor")
    dense = (counts == vocab)[block]
    for places in active[dense].split(plan.dense_rows):
        yield places, None
    sparse, block = active[~dense], block[~dense]
    if sparse.numel() == 0:
        return
    numbers, lengths = block.unique_consecutive(return_counts=True)
    for b, places in zip(numbers.tolist(), sparse.split(lengths.tolist()), strict=True):
        words_ = columns[b : b + 1, v.start // WORD_BITS : words(v.stop)]
        cols = column_mask(words_, v.stop - v.start).squeeze(0).nonzero().squeeze(1)
        if cols.numel():
            yield places, cols


def _add_columns(
    h: Tensor,  # (R, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    v: slice,  # of the vocabulary, to which cols, dw and db are relative
    cols: Tensor,  # (C,) int64, rising
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    transform: LogitTransform,
    dh: Tensor | None,  # (R, H)
    dw: Tensor | None,  # (v, H)
    db: Tensor | None,  # (v,)
    room: _Room,
) -> None:
    """The gradients' part that some columns have, gathered and put back."""
    count = cols.numel()
    w = torch.index_select(weight[v], 0, cols, out=room.weight[:count]).to(h.dtype)
    b = None if bias is None else bias[v][cols].to(h.dtype)
    label = labels - v.start
    column = torch.searchsorted(cols, label).clamp_(max=count - 1)
    inside = cols[column] == label
    part_w = None if dw is None else torch.index_select(dw, 0, cols, out=room.d_weight[:count])
    part_b = None if db is None else db[cols]
    z = room.logits[: len(h) * count].view(len(h), count)
    add_tile_gradients(h, w, b, column, inside, lse, grad, transform, dh, part_w, part_b, z)
    if dw is not None and part_w is not None:
        dw.index_copy_(0, cols, part_w)
    if db is not None and part_b is not None:
        db[cols] = part_b


def _add_all_columns(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: slice,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    transform: LogitTransform,
    dh: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """The same for every column of the slice, tile by tile."""
    tile = plan_tile(h.shape[0], v.stop - v.start, h.shape[1], h.device, h.dtype)
    for c in spans(v.stop - v.start, tile.cols):
        absolute = slice(v.start + c.start, v.start + c.stop)
        w, b = vocabulary_slice(weight, bias, absolute, h.dtype)
        for r in spans(h.shape[0], tile.rows):
            add_tile_gradients(
                h[r], w, b, *labels_in_tile(labels[r], absolute), lse[r], grad[r], transform,
                None if dh is None else dh[r], None if dw is None else dw[c], None if db is None else db[c],
            )  # fmt: skip
