"""Exact backward of ``linear_logprobs`` in Triton, one slice of logits at a time.

    dz_iv = c_i·(1[v = y_i] − p_iv)·dz/du      p_iv = exp(z_iv − lse_i)      c_i = d loss / d log p_i
    dH = dz·W       dW = dzᵀ·H       db = Σ_i dz_i

Of n rows and V columns the larger is cut into slices. For each: ``_dlogits_kernel`` makes the slice's logits
again and writes dz to a workspace, then ``matmul_triton`` makes the two products. What belongs to the cut
dimension (rows of dW if V is cut, of dH if n is) is finished within its slice and written once in its final
dtype; the other is summed over slices in float32, min(n, V)·H elements, and rounded once at the end.

Shapes: hidden (N, H), weight (V, H), n kept rows; the workspace is a slice padded with zeros to whole tiles,
within ``budget`` bytes. Passes over memory per slice: dz written once, read once per product. Three
products of n×V×H; one that nobody needs is not made.

dz is held in the dtype of ``hidden``. Its rounding, like the final one, costs at most 2^-8 per element in
bfloat16, at random; both together stay below 4e-3 of the gradient. All dz are multiplied by the power of two
that brings the largest possible |dz| to 2^14, and the products by its inverse. That changes nothing in float32
and bfloat16. In float16 it keeps a coefficient of 1e-6 (a mean over many tokens) from underflowing and a loss
scale of 65536 from overflowing: entries down to 2^-38 of the largest survive, and float16 ends at 2^16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunking
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
from .matmul_triton import matmul
from .precision_triton import round_to
from .tile_configs import GROUP_ROWS, Target, tile_config

PEAK_EXPONENT = 14


@triton.jit(do_not_specialize=["n", "V", "first_col", "row_blocks", "col_blocks"])
def _dlogits_kernel(
    hidden, weight, bias, labels, row_index, lse, grad, scale, dz,
    n, V, H, first_col, row_blocks, col_blocks,
    hidden_row, hidden_col, weight_row, weight_col, inner, outer, factor, dz_row,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_block, col_block = place(tl.program_id(0), row_blocks, col_blocks, GROUP)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    cols = col_block * COLS + tl.arange(0, COLS)
    hidden_rows = source_rows(row_index, rows, n, GATHER)
    z = raw_tile(
        hidden, weight, bias, hidden_rows, cols, V, H, hidden_row, hidden_col, weight_row, weight_col,
        HAS_BIAS, ROWS, COLS, DEPTH,
    )  # fmt: skip
    kept = rows < n
    label = local_labels(labels, rows, n, first_col, V)
    row_lse = tl.load(lse + rows, mask=kept, other=0.0)
    coefficient = tl.load(grad + rows, mask=kept, other=0.0) * factor * tl.load(scale)
    if SOFTCAP:
        bent = tanh(z * inner)
        z = bent * outer
    else:
        z *= outer
    d = tl.where(cols[None, :] == label[:, None], 1.0, 0.0) - tl.exp(z - row_lse[:, None])
    if SOFTCAP:
        d *= 1.0 - bent * bent
    # Rows past n have coefficient 0. A row without a coefficient adds nothing, whatever its lse is.
    d = tl.where((cols < V)[None, :] & (coefficient != 0.0)[:, None], d * coefficient[:, None], 0.0)
    tl.store(
        dz + rows.to(tl.int64)[:, None] * dz_row + cols[None, :], round_to(d, dz.dtype.element_ty)
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (N, H), weight (V, H) and bias (V,) in their dtypes; None where not needed."""
    n, (vocab, width), device = labels.numel(), weight.shape, hidden.device
    unwritten = n == 0 or rows is not None
    d_hidden = (
        _gradient(hidden.shape, hidden.dtype, device, zero=unwritten) if need_hidden else None
    )
    d_weight = _gradient(weight.shape, weight.dtype, device, zero=n == 0) if need_weight else None
    d_bias = _gradient((vocab,), torch.float32, device, zero=True) if need_bias else None
    if n == 0 or not (need_hidden or need_weight or need_bias):
        return d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)

    # The gradient of a sum comes with stride 0.
    grad, lse, labels = grad.contiguous(), lse.contiguous(), labels.contiguous()
    bias, rows = contiguous(bias), contiguous(rows)
    use = "logits" if transform.softcap is None else "softcap"
    config = tile_config(use, target, hidden, weight)
    matmul_config = tile_config("matmul", target, hidden, weight)
    # Whole tiles both of the kernel that writes dz and of the products that read it, dz lying either way.
    step = max(matmul_config.rows, matmul_config.depth)
    steps = max(config.rows, step), max(config.cols, step)
    slices = plan_slices(n, vocab, steps, hidden.dtype, budget)
    shape = [_padded(s.stop - s.start, step) for s, step in zip(slices[0], steps, strict=True)]
    workspace = torch.empty(
        shape, dtype=hidden.dtype, device=device
    )  # the first slice is the largest
    # Where one slice is all, nothing has to be summed.
    sum_hidden = sum_weight = None
    if len(slices) > 1 and n <= vocab and d_hidden is not None:
        in_place = d_hidden.dtype == torch.float32 and rows is None
        sum_hidden = d_hidden if in_place else _gradient((n, width), torch.float32, device)
    if len(slices) > 1 and n > vocab and d_weight is not None:
        in_place = d_weight.dtype == torch.float32
        sum_weight = d_weight if in_place else _gradient((vocab, width), torch.float32, device)

    def add_product(
        a: Tensor,
        b: Tensor,
        out: Tensor,
        partial: Tensor | None,
        first: bool,
        last: bool,
        inner_rows: Tensor | None = None,
        out_rows: Tensor | None = None,
    ) -> None:
        """This slice's a·b: into ``partial`` while more slices follow, else scaled back into ``out``."""
        addend = None if first else partial
        if partial is None or last:
            matmul(
                a, b, out, matmul_config,
                alpha=unscale, inner_rows=inner_rows, out_rows=out_rows, addend=addend,
            )  # fmt: skip
        else:
            matmul(a, b, partial, matmul_config, inner_rows=inner_rows, addend=addend)

    inner, outer = scale_factors(transform)
    scale, unscale = power_of_two_scale(grad, transform.linear_factor)
    for r, c in slices:
        slice_rows = None if rows is None else rows[r]
        slice_hidden = hidden[r] if rows is None else hidden
        dz = workspace[: r.stop - r.start, : c.stop - c.start]
        row_blocks = _padded(dz.shape[0], steps[0]) // config.rows
        col_blocks = _padded(dz.shape[1], steps[1]) // config.cols
        _dlogits_kernel[(row_blocks * col_blocks,)](
            slice_hidden, weight[c], None if bias is None else bias[c], labels[r], slice_rows, lse[r], grad[r],
            scale, dz, *dz.shape, width, c.start, row_blocks, col_blocks,
            *hidden.stride(), *weight.stride(), inner, outer, transform.linear_factor, dz.stride(0),
            HAS_BIAS=bias is not None, SOFTCAP=transform.softcap is not None, GATHER=rows is not None,
            ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP_ROWS,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        first, last = (r, c) == slices[0], (r, c) == slices[-1]
        if d_hidden is not None:
            out = d_hidden[r] if rows is None else d_hidden
            add_product(dz, weight[c], out, sum_hidden, first, last, out_rows=slice_rows)
        if d_weight is not None:
            add_product(
                dz.t(), slice_hidden, d_weight[c], sum_weight, first, last, inner_rows=slice_rows
            )
        if d_bias is not None:
            d_bias[c] += dz.sum(dim=0, dtype=torch.float32) * unscale
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
