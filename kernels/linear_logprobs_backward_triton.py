"""Exact backward of ``linear_logprobs`` in Triton, one slice of logits at a time.

    dz_iv = c_i·(1[v = y_i] − p_iv)·dz/du      p_iv = exp(z_iv − lse_i)      c_i = d loss / d log p_i
    dH = dz·W       dW = dzᵀ·H       db = Σ_i dz_i

Of n rows and V columns the larger is cut into slices. For each: ``_dlogits_kernel`` makes the slice's logits
again and writes dz to a workspace, then ``matmul_triton`` makes the two products. What belongs to the cut
dimension (rows of dW if V is cut, of dH if n is) is finished within its slice and written once in its final
dtype; the other is summed over slices in float32, min(n, V)·H elements, and rounded once at the end.

Shapes: hidden (N, H), weight (V, H), n kept rows; the workspace is a slice padded to whole tiles, within
``budget`` bytes. Passes over memory per slice: dz written once, read once per product. Three products of
n×V×H; one that nobody needs is not made. Kept rows that a list names are first copied next to each other, as
bulk copies cannot gather: 4·n·H bytes moved, little beside 6·n·V·H operations.

dz is held in the dtype of ``hidden``. Its rounding, like the final one, costs at most 2^-8 per element in
bfloat16, at random; both together stay below 4e-3 of the gradient. All dz are multiplied by the power of two
that brings the largest possible |dz| to 2^14, and the products by its inverse. That changes nothing in float32
and bfloat16. In float16 it keeps a coefficient of 1e-6 (a mean over many tokens) from underflowing and a loss
scale of 65536 from overflowing: entries down to 2^-38 of the largest survive, and float16 ends at 2^16.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunking
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
from .matmul_triton import matmul, split_columns
from .precision_triton import round_to
from .tile_configs import GROUP_ROWS, Target, bulk_copies, tile_config, vocabulary_splits

PEAK_EXPONENT = 14
_LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit(
    do_not_specialize=["n", "V", "first_col", "row_blocks", "splits", "tiles", "tiles_per_split"]
)
def _dlogits_kernel(
    hidden, weight, bias, labels, lse, grad, scale, dz,
    n, V, H, first_col, hidden_row, hidden_col, weight_row, weight_col, inner, outer, factor, dz_row,
    row_blocks, splits, tiles, tiles_per_split,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BULK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(H > 0)
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
    coefficient = tl.load(grad + rows, mask=kept, other=0.0) * factor * tl.load(scale)
    # Flattened with the loop over H: the next tile's operands are on their way while this one is written.
    for tile in tl.range(first_tile, stop_tile, flatten=BULK):
        first = tile * COLS
        u = dense_tile(
            hidden, weight, bias, block * ROWS, first, n, V, H, hidden_row, hidden_col, weight_row, weight_col,
            BULK, False, ROWS, COLS, DEPTH,
        )  # fmt: skip
        # A quarter at a time: a whole 128×256 tile and what becomes of it together overflow the registers.
        quarters = split_columns(u, ROWS, COLS)
        for i in tl.static_range(4):
            part = quarters[i]
            start, stop = first + i * (COLS // 4), first + (i + 1) * (COLS // 4)
            cols = start + tl.arange(0, COLS // 4)
            inside = cols < V
            if HAS_BIAS:
                part += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
            if SOFTCAP:
                part = tanh(part * inner)
            d = tl.exp2(part * outer - row_lse[:, None]) * -coefficient[:, None]
            if next_label < stop:
                d = tl.where(cols[None, :] == label[:, None], d + coefficient[:, None], d)
                next_label = tl.min(tl.where(label >= stop, label, V))
            if SOFTCAP:
                d *= 1.0 - part * part
            # A row without a coefficient adds nothing, whatever its lse is.
            counts = (coefficient != 0.0)[:, None]
            if not BULK:  # the products will read what is past V
                counts &= inside[None, :]
            tl.store(
                dz + rows.to(tl.int64)[:, None] * dz_row + cols[None, :],
                round_to(tl.where(counts, d, 0.0), dz.dtype.element_ty),
            )


def launch_backward(
    grad: Tensor,  # (n,) float32
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64
    rows: Tensor | None,  # (n,) int64
    lse: Tensor,  # (n,) float32
    transform: LogitTransform,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    target: Target,
    budget: int,  # bytes of workspace
    last_columns: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,) in their dtypes; None where not needed.

    With ``last_columns`` that of the weight is (V, last_columns), of so many of its last columns.
    """
    n, (vocab, width), device = labels.numel(), weight.shape, hidden.device
    unwritten = n == 0 or (rows is not None and n > vocab)
    d_hidden = (
        _gradient(hidden.shape, hidden.dtype, device, zero=unwritten) if need_hidden else None
    )
    trained = slice(0 if last_columns is None else width - last_columns, width)
    d_weight = (
        _gradient((vocab, width - trained.start), weight.dtype, device, zero=n == 0)
        if need_weight
        else None
    )
    d_bias = _gradient((vocab,), torch.float32, device, zero=True) if need_bias else None
    if n == 0 or not (need_hidden or need_weight or need_bias):
        return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)

    # The gradient of a sum comes with stride 0.
    grad, lse, labels = grad.contiguous(), lse.contiguous(), labels.contiguous()
    bias, rows = contiguous(bias), contiguous(rows)
    use = "logits" if transform.softcap is None else "logits softcap"
    config = tile_config(use, target, hidden, weight)
    bulk = bulk_copies(target, hidden, weight, hidden[:, trained])
    product_config = tile_config("matmul", target, hidden, weight)
    # Whole tiles both of the kernel that writes dz and of the products that read it, dz lying either way.
    step = max(product_config.rows, product_config.depth)
    steps = max(config.rows, step), max(config.cols, step)
    cut_rows = n > vocab
    if cut_rows and rows is not None:
        budget = budget * vocab // (vocab + width)  # for the copy of a slice's rows
    slices = plan_slices(n, vocab, steps, hidden.dtype, budget)
    shape = [_padded(s.stop - s.start, step) for s, step in zip(slices[0], steps, strict=True)]
    workspace = torch.empty(
        shape, dtype=hidden.dtype, device=device
    )  # the first slice is the largest
    # Where one slice is all, nothing has to be summed.
    sum_hidden = sum_weight = None
    if len(slices) > 1 and not cut_rows and d_hidden is not None:
        in_place = d_hidden.dtype == torch.float32 and rows is None
        sum_hidden = d_hidden if in_place else _gradient((n, width), torch.float32, device)
    if len(slices) > 1 and cut_rows and d_weight is not None:
        in_place = d_weight.dtype == torch.float32
        sum_weight = d_weight if in_place else _gradient(d_weight.shape, torch.float32, device)

    # If every slice needs all kept rows, their copy lies in d_hidden, which is free until the last product.
    kept = hidden
    if rows is not None and not cut_rows:
        room = None if d_hidden is None else d_hidden[:n]
        kept = torch.index_select(hidden, 0, rows, out=room)

    def add_product(
        a: Tensor,
        b: Tensor,
        out: Tensor,
        partial: Tensor | None,
        first: bool,
        last: bool,
        out_rows: Tensor | None = None,
    ) -> None:
        """This slice's a·b: into ``partial`` while more slices follow, else scaled back into ``out``."""
        addend = None if first else partial
        if partial is None or last:
            matmul(
                a, b, out, product_config, bulk, target.processors,
                alpha=unscale, out_rows=out_rows, addend=addend,
            )  # fmt: skip
        else:
            matmul(a, b, partial, product_config, bulk, target.processors, addend=addend)

    inner, outer = scale_factors(transform)
    scale, unscale = power_of_two_scale(grad, transform.linear_factor)
    for r, c in slices:
        first, last = (r, c) == slices[0], (r, c) == slices[-1]
        if cut_rows:
            kept = hidden[r] if rows is None else hidden.index_select(0, rows[r])
        dz = workspace[: r.stop - r.start, : c.stop - c.start]
        row_blocks = _padded(dz.shape[0], steps[0]) // config.rows
        tiles = _padded(dz.shape[1], steps[1]) // config.cols
        splits = vocabulary_splits(row_blocks, tiles, target.processors) if bulk else tiles
        _dlogits_kernel[(row_blocks * splits,)](
            *operands(config, bulk, kept, weight[c]),
            None if bias is None else bias[c], labels[r], lse[r], grad[r], scale, dz,
            *dz.shape, width, c.start, *kept.stride(), *weight.stride(),
            inner, outer * math.log2(math.e), transform.linear_factor, dz.stride(0),
            row_blocks, splits, tiles, triton.cdiv(tiles, splits),
            HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None, BULK=bulk,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        if d_weight is not None:
            add_product(dz.t(), kept[:, trained], d_weight[c], sum_weight, first, last)
        if d_bias is not None:
            d_bias[c] += dz.sum(dim=0, dtype=torch.float32) * unscale
        if d_hidden is not None:
            out, out_rows = (d_hidden[r], None) if rows is None else (d_hidden, rows[r])
            if last and rows is not None and not cut_rows:
                d_hidden.zero_()  # until now it held the kept rows
            add_product(dz, weight[c], out, sum_hidden, first, last, out_rows)
    return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)


def plan_slices(
    n: int, vocab: int, steps: tuple[int, int], dtype: torch.dtype, budget: int
) -> list[tuple[slice, slice]]:
    """Slices (rows, columns) of the n×V logits, cut along the larger side into equal parts that fit ``budget``.

    A part is cut at multiples of ``steps`` (rows, columns) and is at least one step long, so a tiny budget can
    be exceeded by that much.
    """
    across, other, step = (
        (vocab, _padded(n, steps[0]), steps[1])
        if n <= vocab
        else (n, _padded(vocab, steps[1]), steps[0])
    )
    most = max(1, budget // (other * dtype.itemsize * step))  # steps in a part
    parts = triton.cdiv(triton.cdiv(across, step), most)
    length = triton.cdiv(triton.cdiv(across, parts), step) * step
    if n <= vocab:
        return [(slice(0, n), c) for c in chunking.spans(vocab, length)]
    return [(r, slice(0, vocab)) for r in chunking.spans(n, length)]


def power_of_two_scale(grad: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """(s, 1/s), float32 scalars on the device: s brings the largest |c_i·dz/du| into [2^13, 2^14)."""
    exponent = torch.frexp(grad.abs().amax() * abs(factor)).exponent
    exponent = (PEAK_EXPONENT - exponent).clamp_(-100, 100)  # both powers stay normal numbers
    one = torch.ones((), dtype=torch.float32, device=grad.device)
    return torch.ldexp(one, exponent), torch.ldexp(one, -exponent)


def _padded(count: int, step: int) -> int:
    return triton.cdiv(count, step) * step


def _gradient(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool = False
) -> Tensor:
    return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=device)
