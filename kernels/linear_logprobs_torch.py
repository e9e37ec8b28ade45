"""Token log-probabilities from hidden states and the LM head, in PyTorch, one tile of logits at a time.

    u = W h + b            z = transform(u)            log p_y = z_y − log Σ_v exp(z_v)
    d log p_y / dz_v = 1[v = y] − p_v                  p_v = exp(z_v − lse)

Shapes: hidden (N, H), weight (V, H), bias (V,), labels (n,) for the n ≤ N rows that carry a label. Logits exist
as tiles of at most ``chunking.plan_tile`` elements, in float32 (float64 for float64 inputs). Each tile is
computed once in the forward and once more in the exact backward, which then adds its two products:
dH += dz·W_tile and dW += dzᵀ·H_tile. That is 1 + 3 products of N×V×H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import plan_tile, spans
from .logit_transform import IDENTITY, LogitTransform
from .precision import accumulation_dtype, full_precision
from .products_torch import add_product, multiply

# Exponents are cut off here: exp(−50) ≈ 2e-22 vanishes in a float32 sum of a million terms beside exp(0), while
# smaller results, and their products with coefficients, would be subnormal numbers, which a CPU computes with
# many times more slowly. The bound also keeps 0·(−inf) of a −inf bias out of the entropy.
LEAST_EXPONENT = {torch.float32: -50.0, torch.float64: -600.0}


WRITTEN_ROWS = 256  # converted at a time


class ForwardResult(NamedTuple):
    """What the forward leaves for every kept row; the last four are None unless statistics were asked for."""

    logps: Tensor  # (n,) z_label − lse, ≤ 0, nats
    lse: Tensor  # (n,) log Σ_v exp(z_v)
    entropy: Tensor | None  # (n,) of the softmax, nats
    top1: Tensor | None  # (n,) bool: the label is the argmax (of equal logits the lowest id)
    logit_mean: Tensor | None  # (n,) mean of z over the vocabulary
    peak: Tensor | None  # (n,) the largest z


def linear_logprobs_reference(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    ignore_index: int = -100,
) -> Tensor:  # (...)
    """The definition, with all logits at once and autograd: what every implementation is compared with."""
    raw = torch.nn.functional.linear(hidden, weight, bias) * transform.logit_scale
    if transform.softcap is not None:
        raw = transform.softcap * torch.tanh(raw / transform.softcap)
    logps = torch.log_softmax(raw / transform.temperature, dim=-1)
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0).unsqueeze(-1)
    return torch.where(kept, logps.gather(-1, index).squeeze(-1), 0.0)


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor | None,  # (n,) int64 into hidden, or None: all of them
    transform: LogitTransform,
    want_stats: bool,
) -> ForwardResult:
    """Log-prob and lse of every kept row; slices of the vocabulary outside, blocks of rows inside."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    tile = plan_tile(n, vocab, width, hidden.device, dtype)
    # The running maximum starts finite so that 0·(m − m') below is 0 and not NaN.
    peak = hidden.new_full((n,), torch.finfo(dtype).min, dtype=dtype)
    total = hidden.new_zeros(n, dtype=dtype)  # Σ exp(z − peak)
    label_logit = hidden.new_zeros(n, dtype=dtype)
    moment = torch.zeros_like(total) if want_stats else None  # Σ exp(z − peak)·(z − peak)
    argmax = torch.zeros_like(labels) if want_stats else None
    # Without a softcap the mean logit is factor·(h·mean(W) + mean(b)): no sum over the logits is needed.
    mean_is_linear = transform.softcap is None
    weight_sum = hidden.new_zeros(width, dtype=dtype) if want_stats and mean_is_linear else None
    logit_sum = torch.zeros_like(total) if want_stats and not mean_is_linear else None

    with full_precision(hidden.device):
        for v in spans(vocab, tile.cols):
            w, b = vocabulary_slice(weight, bias, v, dtype)
            if weight_sum is not None:
                weight_sum += w.sum(dim=0)
            for r in spans(n, tile.rows):
                z = logit_tile(row_block(hidden, rows, r, dtype), w, b, transform)
                pick_labels(z, labels[r], v, label_logit[r])
                if logit_sum is not None:
                    logit_sum[r] += z.sum(dim=1)
                if argmax is None:
                    tile_peak = z.amax(dim=1)
                else:
                    tile_peak, tile_argmax = z.max(dim=1)
                    # Strictly larger: of equal logits the lowest id, seen first, stays.
                    newer = tile_peak > peak[r]
                    argmax[r] = torch.where(newer, tile_argmax + v.start, argmax[r])
                old_peak = peak[r]
                new_peak = torch.maximum(old_peak, tile_peak)
                shifted = z.sub_(new_peak.unsqueeze(1)).clamp_(min=LEAST_EXPONENT[dtype])
                decay = torch.exp(old_peak - new_peak)
                if moment is None:
                    weights = shifted.exp_()
                else:
                    weights = shifted.exp()
                    carried = moment[r] + total[r] * (old_peak - new_peak)
                    moment[r] = decay * carried + row_dot(weights, shifted)
                total[r] = decay * total[r] + weights.sum(dim=1)
                peak[r] = new_peak
                # A name would keep this tile until the next one is made: one more at the peak.
                del z, shifted, weights
        if weight_sum is not None:
            logit_sum = torch.cat(
                [row_block(hidden, rows, r, dtype) @ weight_sum for r in spans(n, tile.rows)]
                or [total]
            )
            if bias is not None:
                logit_sum += bias.sum(dtype=dtype)
            logit_sum *= transform.linear_factor

    log_total = torch.log(total)  # total ≥ 1 because the largest logit contributes exp(0)
    return ForwardResult(
        logps=(label_logit - peak) - log_total,
        lse=peak + log_total,
        entropy=None if moment is None else (log_total - moment / total).clamp_(min=0.0),
        top1=None if argmax is None else argmax == labels,
        logit_mean=None if logit_sum is None else logit_sum / vocab,
        peak=peak if want_stats else None,
    )


def backward(
    grad: Tensor,  # (n,) d loss / d log-prob of each kept row
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor | None,  # (n,)
    lse: Tensor,  # (n,)
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Exact gradients (N, H), (V, H), (V,) in the dtypes of the inputs; a product not needed is not made.

    With ``last_columns`` dW is (V, last_columns), of so many last columns of the weight, and costs accordingly.

    Of n and V the larger is walked outside. The gradient that belongs to it is then finished span by span and
    written once in its final dtype, and only the other, min(n, V)·H, lives in a wide accumulator throughout.
    """
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    tile = plan_tile(n, vocab, width, hidden.device, dtype)
    grad = grad.to(dtype)
    d_hidden = _zeros(hidden.shape, hidden.dtype, hidden.device) if need_hidden else None
    trained = width if last_columns is None else last_columns
    d_weight = _zeros((vocab, trained), weight.dtype, weight.device) if need_weight else None
    d_bias = _zeros((vocab,), dtype, weight.device) if need_bias else None
    room = torch.empty(tile.rows * tile.cols, dtype=dtype, device=hidden.device)

    def add_tile(
        r: slice,
        v: slice,
        h: Tensor,
        w: Tensor,
        b: Tensor | None,
        dh: Tensor | None,
        dw: Tensor | None,
    ) -> None:
        places = labels_in_tile(labels[r], v)
        db = None if d_bias is None else d_bias[v]
        z = room[: len(h) * len(w)].view(len(h), len(w))
        add_tile_gradients(h, w, b, *places, lse[r], grad[r], transform, dh, dw, db, z)

    with full_precision(hidden.device):
        if n <= vocab:
            dh_all = None
            if d_hidden is not None:
                direct = rows is None and d_hidden.dtype == dtype
                dh_all = d_hidden if direct else _zeros((n, width), dtype, hidden.device)
            for v in spans(vocab, tile.cols):
                w, b = vocabulary_slice(weight, bias, v, dtype)
                dw = None if d_weight is None else _accumulator(d_weight[v], dtype)
                for r in spans(n, tile.rows):
                    h = row_block(hidden, rows, r, dtype)
                    add_tile(r, v, h, w, b, None if dh_all is None else dh_all[r], dw)
                if d_weight is not None and dw is not None and dw.dtype != d_weight.dtype:
                    d_weight[v].copy_(dw)
                del w, b, dw  # before the next slice's are made
            if d_hidden is not None and dh_all is not None and dh_all is not d_hidden:
                write_rows(d_hidden, rows, slice(0, n), dh_all)
        else:
            dw_all = None if d_weight is None else _accumulator(d_weight, dtype)
            for r in spans(n, tile.rows):
                h = row_block(hidden, rows, r, dtype)
                dh = (
                    None
                    if d_hidden is None
                    else _zeros((r.stop - r.start, width), dtype, hidden.device)
                )
                for v in spans(vocab, tile.cols):
                    w, b = vocabulary_slice(weight, bias, v, dtype)
                    add_tile(r, v, h, w, b, dh, None if dw_all is None else dw_all[v])
                    del w, b
                if d_hidden is not None and dh is not None:
                    write_rows(d_hidden, rows, r, dh)
                del h, dh
            if d_weight is not None and dw_all is not None and dw_all is not d_weight:
                d_weight.copy_(dw_all)

    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def add_tile_gradients(
    h: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    b: Tensor | None,  # (C,)
    column: Tensor,  # (R,) int64 in [0, C): where among the C columns the row's label is
    inside: Tensor,  # (R,) bool: whether it is there at all
    lse: Tensor,  # (R,)
    grad: Tensor,  # (R,)
    transform: LogitTransform,
    dh: Tensor | None,  # (R, H)
    dw: Tensor | None,  # (C, H)
    db: Tensor | None,  # (C,)
    room: Tensor | None = None,  # (R, C), to be overwritten
) -> None:
    """Make a tile of logits again and dz; add its products to dh, dw and db."""
    dz = dlogits_tile(h, w, b, column, inside, lse, grad, transform, room)
    add_products(dz, h, w, dh, dw, db)


def dlogits_tile(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    column: Tensor,
    inside: Tensor,
    lse: Tensor,
    grad: Tensor,
    transform: LogitTransform,
    room: Tensor | None = None,
) -> Tensor:
    """dz = grad·(1[v = y] − p)·dz/du (R, C) of a tile whose logits are made again."""
    z = logit_tile(h, w, b, transform, room)
    slope = transform.derivative(z)
    dz = softmax_gradient_(z, column, inside, lse, grad)
    if isinstance(slope, Tensor) or slope != 1.0:
        dz.mul_(slope)
    return dz


def softmax_gradient_(
    z: Tensor, column: Tensor, inside: Tensor, lse: Tensor, grad: Tensor
) -> Tensor:
    """Overwrite the logits z (R, C) with grad·(1[v = y] − p) and return them."""
    dz = (
        z.sub_(lse.unsqueeze(1))
        .clamp_(min=LEAST_EXPONENT[z.dtype])
        .exp_()
        .mul_(grad.neg().unsqueeze(1))
    )
    return dz.scatter_add_(1, column.unsqueeze(1), torch.where(inside, grad, 0.0).unsqueeze(1))


def add_products(
    dz: Tensor,  # (R, C)
    h: Tensor,  # (R, H)
    w: Tensor,  # (C, H)
    dh: Tensor | None,  # (R, H)
    dw: Tensor | None,  # (C, H), or (C, K) of the last K columns of w
    db: Tensor | None,  # (C,)
) -> None:
    """dh += dz·w, dw += dzᵀ·h and db += Σ_rows dz, of those that are wanted."""
    if dh is not None:
        add_product(dh, dz, w)
    if dw is not None:
        add_product(dw, dz.t(), h[:, h.shape[1] - dw.shape[1] :])
    if db is not None:
        db += dz.sum(dim=0)


def logit_tile(
    h: Tensor, w: Tensor, b: Tensor | None, transform: LogitTransform, out: Tensor | None = None
) -> Tensor:
    return transform.apply_(multiply(h, w, b, out))


def vocabulary_slice(
    weight: Tensor, bias: Tensor | None, v: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    return weight[v].to(dtype), None if bias is None else bias[v].to(dtype)


def row_block(hidden: Tensor, rows: Tensor | None, r: slice, dtype: torch.dtype) -> Tensor:
    return (hidden[r] if rows is None else hidden[rows[r]]).to(dtype)


def write_rows(target: Tensor, rows: Tensor | None, r: slice, values: Tensor) -> None:
    """target[rows[r]] = values, without a copy of all values in the dtype of ``target``."""
    if rows is None:
        target[r].copy_(values)
        return
    places = rows[r]
    for part in spans(len(values), WRITTEN_ROWS):
        target.index_copy_(0, places[part], values[part].to(target.dtype))


def _accumulator(target: Tensor, dtype: torch.dtype) -> Tensor:
    """``target`` itself where it is wide enough to add into, else zeros of its shape that are."""
    return target if target.dtype == dtype else torch.zeros_like(target, dtype=dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def labels_in_tile(labels: Tensor, v: slice) -> tuple[Tensor, Tensor]:
    """Each row's column of this tile, clamped into it, and whether its label lies there at all."""
    inside = (labels >= v.start) & (labels < v.stop)
    return (labels - v.start).clamp_(0, v.stop - v.start - 1), inside


def pick_labels(z: Tensor, labels: Tensor, v: slice, label_logit: Tensor) -> None:
    column, inside = labels_in_tile(labels, v)
    label_logit.copy_(torch.where(inside, z.gather(1, column.unsqueeze(1)).squeeze(1), label_logit))


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_v a_iv·b_iv without a temporary of their size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)
