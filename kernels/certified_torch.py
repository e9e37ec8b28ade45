"""Certified sparse backward of ``linear_logprobs`` in PyTorch: gradients on the columns that carry probability.

The forward makes the logits of a chunk of rows over the whole vocabulary and, while it has them, finds for each
row the threshold below which at most ``tol`` of the probability lies. The backward takes a group of blocks
(``nucleus``) and walks the columns that any of them needs a piece at a time (``certified_groups_torch``): the
blocks that need some of a piece make their logits on it again, and two products:

    dH[rows] += dz·W[piece]        dW[piece] += dzᵀ·H[rows]        dz zero outside each block's own union

Cost: one product of n×V×H in the forward, 3ρ in the backward, ρ the share of (row, column) pairs in the pieces
that are made. Passes over a chunk in the forward: about five for the softmax, three for each of ``STEPS`` looks
at the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .certified_groups_torch import Group, column_pieces, keep_needed, make_groups
from .chunking import (
    plan_certified_backward,
    plan_certified_forward,
    plan_tile,
    spans,
)
from .linear_logprobs_torch import (
    LEAST_EXPONENT,
    ForwardResult,
    add_products,
    add_tile_gradients,
    dlogits_tile,
    labels_in_tile,
    row_block,
    vocabulary_slice,
    write_rows,
)
from .logit_transform import LogitTransform
from .nucleus import WORD_BITS, Allowance, Nuclei, block_rows, gather_blocks, words
from .precision import accumulation_dtype, full_precision
from .products_torch import multiply

# Of the search for a row's threshold, on the logarithms of threshold and tail mass. Three looks leave the
# nuclei 5 to 12 % larger than the smallest possible; a fourth, 2 to 10 %, costs what it saves.
STEPS = 3
# First look: part of the way from the threshold that is always allowed to the largest probability p. Fitted
# by −log p to states of a language model, where peaked rows want it farther, and by −log p / log V to nearly
# flat rows.
START, START_PEAKED, START_FLAT, START_BOUNDS = 0.3, -0.2, 0.5, (0.1, 0.7)
AIM = 0.9  # of tol: aiming a little lower makes more looks end on the allowed side
FIRST_SLOPE = 0.7  # of log tail mass over log threshold, until two looks have shown it
STEEPNESS = (0.2, 20.0)  # bounds on it


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor | None,  # (n,) int64 into hidden, or None: all of them
    transform: LogitTransform,
    want_stats: bool,
    tol: float,
    perturb: Callable[[Tensor, Tensor, slice], None] | None = None,
    allowance: Allowance | None = None,
) -> tuple[ForwardResult, Nuclei]:
    """What ``linear_logprobs_torch.forward`` returns, and the nuclei for ``tol`` > 0.

    ``perturb(z, h, places)`` may change the logits z (R, V) of rows h (R, H), those at ``places`` of the n.
    ``allowance``, where ``weight`` is a shard of a vocabulary, takes the place of ``tol``.
    """
    dtype = accumulation_dtype(hidden.dtype)
    n, vocab, device = labels.numel(), weight.shape[0], hidden.device
    height = block_rows(device)
    narrow = weight.dtype != dtype
    widest = vocab if allowance is None else allowance.widest
    plan = plan_certified_forward(n, widest, weight.shape[1], height, device, dtype, narrow)
    per_row = {name: hidden.new_empty(n, dtype=dtype) for name in ("logps", "lse", "dropped")}
    if want_stats:
        names = ("entropy", "logit_mean", "peak")
        per_row |= {name: hidden.new_empty(n, dtype=dtype) for name in names}
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
                h = row_block(hidden, rows, places, dtype)
                _fill_logits(z, h, weight, bias, transform, plan.product_cols)
                if perturb is not None:
                    perturb(z, h, places)
                for t in spans(z.shape[0], plan.tile_rows):
                    of_tile = slice(places.start + t.start, places.start + t.stop)
                    of_window = slice(r.start + t.start, r.start + t.stop)
                    _finish_rows(
                        z[t],
                        labels[of_tile],
                        tol if allowance is None else partial(allowance.of_rows, of_tile),
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
    z: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    cols: int,
) -> None:
    """z (R, V) of the rows h (R, H), so many columns at a time; a head in low precision is widened."""
    for v in spans(weight.shape[0], cols):
        multiply(h, weight[v].to(z.dtype), out=z[:, v])
    if bias is not None:
        z += bias.to(z.dtype)
    transform.apply_(z)


def _finish_rows(
    z: Tensor,  # (T, V) logits; overwritten
    labels: Tensor,  # (T,)
    tol: float | Callable[[Tensor], Tensor],  # or what makes it, (T,), of these rows' lse
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
        out["peak"].copy_(peak.squeeze(1))
    else:
        peak = z.amax(dim=1, keepdim=True)
    # A bias may forbid every token of a shard: finite, so that −inf − peak is −inf and not NaN.
    peak = peak.clamp(min=torch.finfo(z.dtype).min)
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
    lse = (peak + log_total).squeeze(1)
    out["lse"].copy_(lse)
    if "entropy" in out:
        out["entropy"].copy_((log_total - moment / total).clamp_(min=0.0).squeeze(1))
    allowed = tol(lse).unsqueeze(1) if callable(tol) else tol
    threshold, tail = nucleus_thresholds(e, total, allowed, free)
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
    tol: float | Tensor,  # (T, 1) where it differs from row to row; from 1 on nothing has to stay
    free: Tensor,  # (T, V), overwritten
) -> tuple[Tensor, Tensor]:
    """(threshold, tail), each (T, 1): entries of e below the threshold sum up to tail ≤ tol·total.

    The tail mass rises with the threshold. Its logarithm is followed by secants within the bracket that the
    looks so far leave, or halved where a secant leaves it; the largest threshold found allowed is taken.
    tol·total/V is allowed without a look: fewer than V entries are smaller.
    """
    log_total, log_columns = total.log(), math.log(e.shape[1])
    everything = None
    if isinstance(tol, Tensor):
        everything = tol >= 1.0
        tol = tol.clamp(max=1.0)
    allowed = log_total + (tol.log() if isinstance(tol, Tensor) else math.log(tol))
    low = allowed - log_columns
    high = torch.zeros_like(low)  # log of the largest entry, which must stay
    tail = tol * total  # an upper bound until a look has found better
    start = torch.maximum(
        START + START_PEAKED * log_total, log_total * (START_FLAT / max(log_columns, 1.0))
    )
    x = low + start.clamp_(*START_BOUNDS) * (high - low)
    slope: Tensor | float = FIRST_SLOPE
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
    threshold = low.exp()
    if everything is not None:
        threshold = threshold.masked_fill_(everything, torch.inf)
        tail = torch.where(everything, total, tail)
    return threshold, tail


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
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (N, H), (V, H), (V,) in the dtypes of the inputs, from each block's columns.

    With ``last_columns`` dW is (V, last_columns), of so many last columns of the weight, and costs accordingly.

    A head in low precision needs a float32 sum for dW. With n ≤ V slices of V are walked outside and dH is
    summed up in float32, else dW is; with ``low_memory`` each gradient has a sweep of its own.
    """
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    device = hidden.device
    # Contiguous, whatever the strides of the inputs: that is what the operator declares.
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device) if need_hidden else None
    d_weight, trained = None, width if last_columns is None else last_columns
    if need_weight:  # a sum in another dtype is copied to it whole
        made = torch.zeros if weight.dtype == dtype else torch.empty
        d_weight = made((vocab, trained), dtype=weight.dtype, device=device)
    d_bias = torch.zeros(vocab, dtype=dtype, device=device) if need_bias else None
    grad = grad.to(dtype)
    plan = plan_certified_backward(vocab, width, block_rows(device), device, dtype)
    groups = make_groups(grad, counts, vocab, plan)
    sizes = min(n, plan.group_rows), min(vocab, plan.piece_cols), width, trained
    room = _Room(*sizes, weight.dtype, dtype, device)
    whole = [slice(0, vocab)]
    sliced = whole
    if need_weight and weight.dtype != dtype and (low_memory or n <= vocab):
        sliced = list(spans(vocab, plan.slice_cols))

    def sweep(slices: list[slice], dh_out: Tensor | None, dw_out: Tensor | None) -> None:
        wide = None
        if dh_out is not None and len(slices) > 1:
            wide = torch.zeros((n, width), dtype=dtype, device=device)
        db_out = d_bias if dw_out is not None or d_weight is None else None
        sums = None  # room for the wide dW of a slice, the first of which is the longest
        if dw_out is not None and dw_out.dtype != dtype:
            sums = torch.empty((slices[0].stop, trained), dtype=dtype, device=device)

        def add(group: Group, v: slice, dw: Tensor | None) -> None:
            places = group.places
            h = hidden[rows[places]].to(dtype)
            dh = None if dh_out is None else torch.zeros_like(h)
            db = None if db_out is None else db_out[v]
            inputs = h, weight, bias, v, labels[places], lse[places], grad[places], transform
            if group.dense:
                _add_all_columns(*inputs, dh, dw, db, room)
            else:
                _add_columns(*inputs, dh, dw, db, columns, counts, group, room)
            if wide is not None and dh is not None:
                wide.index_add_(0, places, dh)
            elif dh_out is not None and dh is not None:
                dh_out.index_copy_(0, rows[places], dh.to(dh_out.dtype))

        for v in slices:
            dw = None if dw_out is None else dw_out[v]
            if sums is not None:
                dw = sums[: v.stop - v.start].zero_()
            for group in groups:
                add(group, v, dw)
            if sums is not None and dw_out is not None and dw is not None:
                dw_out[v].copy_(dw)
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
        self,
        rows: int,
        cols: int,
        width: int,
        trained: int,
        narrow: torch.dtype,
        wide: torch.dtype,
        device: torch.device,
    ) -> None:
        self.weight = torch.empty((cols, width), dtype=narrow, device=device)
        self.d_weight = torch.empty((cols, trained), dtype=wide, device=device)
        self.logits = torch.empty(rows * cols, dtype=wide, device=device)


def _add_columns(
    h: Tensor,  # (R, H) the group's rows
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    v: slice,  # of the vocabulary, to which dw and db are relative
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    transform: LogitTransform,
    dh: Tensor | None,  # (R, H)
    dw: Tensor | None,  # (v, H)
    db: Tensor | None,  # (v,)
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    group: Group,
    room: _Room,
) -> None:
    """The part of the gradients that a group's columns have, piece by piece of these, gathered and put back."""
    pieces = column_pieces(labels, columns, counts, weight.shape[0], v, group, len(room.weight))
    for piece in pieces:
        c = piece.columns
        count = c.numel()
        w = torch.index_select(weight[v], 0, c, out=room.weight[:count]).to(h.dtype)
        b = None if bias is None else bias[v][c].to(h.dtype)
        part_w = None if dw is None else torch.index_select(dw, 0, c, out=room.d_weight[:count])
        part_b = None if db is None else db[c]
        for first, last in piece.runs:
            r = slice(group.starts[first], group.starts[last])
            z = room.logits[: (r.stop - r.start) * count].view(-1, count)
            dz = dlogits_tile(
                h[r], w, b, piece.label[r], piece.inside[r], lse[r], grad[r], transform, z
            )
            keep_needed(dz, piece, group, first, last)
            add_products(dz, h[r], w, None if dh is None else dh[r], part_w, part_b)
        if dw is not None and part_w is not None:
            dw.index_copy_(0, c, part_w)
        if db is not None and part_b is not None:
            db[c] = part_b


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
    room: _Room,
) -> None:
    """The same for every column of the slice, tile by tile."""
    tile = plan_tile(h.shape[0], v.stop - v.start, h.shape[1], h.device, h.dtype)
    cols = tile.cols if weight.dtype == h.dtype else min(tile.cols, len(room.weight))  # to widen
    for c in spans(v.stop - v.start, cols):
        absolute = slice(v.start + c.start, v.start + c.stop)
        w, b = vocabulary_slice(weight, bias, absolute, h.dtype)
        for r in spans(h.shape[0], tile.rows):
            add_tile_gradients(
                h[r], w, b, *labels_in_tile(labels[r], absolute), lse[r], grad[r], transform,
                None if dh is None else dh[r], None if dw is None else dw[c], None if db is None else db[c],
            )  # fmt: skip
