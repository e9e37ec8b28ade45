"""Device functions that make one tile of noisy logits, and the operands of its second product.

    z̃ = z + σ∘ε        σ = X·U_colsᵀ + s        z as in ``logits_triton``, X the rows' h or A h

Shapes: X (n, R), U (V, R), s (V,), ε of ``philox_triton``; z and σ (ROWS, COLS) float32, two accumulators.

A product on tensor cores takes operands of one dtype, hidden's. Rounding U or X to 16 bits would cost σ up to
2^-9 of itself, some 1e-3 nats where σ is 1, and rounding to tf32 only eight times less. So what is float32
beside 16-bit hidden is split into two 16-bit parts, high + low, which together have an error of 2^-17 in
bfloat16 (σ to 1e-5) and, for magnitudes below 65504, of 2^-22 in float16, though not below 2^-25 absolute:

    full rank, float32 U    h·(U_high + U_low)                                       one product more
    low rank                X_high·U_high + X_high·U_low + X_low·U_high              three, of inner size R

The terms are joined along the inner dimension of arrays made once per call (X) and per slice of the vocabulary
(U). Gradients need only the high parts, as dσ is rounded to 16 bits itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunking import spans
from .logits_triton import add_product, tanh
from .noise import Noise
from .precision_triton import dot, round_to

ALIGNMENT = 16  # elements: parts begin where bulk copies can
PARTS_ROWS, PARTS_COLS = 16, 256  # of a program of the parts kernel


@triton.jit
def product_tiles(
    hidden, weight, x, noise_weight, first_row, first_col, n, V, H, R,
    hidden_row, hidden_col, weight_row, weight_col, x_row, x_col, noise_row, noise_col, low_part,
    BULK: tl.constexpr, LOW_RANK: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """(H·Wᵀ, X·Uᵀ) of ROWS × COLS neighbours from (``first_row``, ``first_col``) on; past V they mean nothing.

    With BULK the matrices are tensor descriptors (TMA), and a generator of full rank shares the tiles of
    hidden. With SPLIT the low part of U lies ``low_part`` columns after the high one.
    """
    z = tl.zeros([ROWS, COLS], tl.float32)
    sigma = tl.zeros([ROWS, COLS], tl.float32)
    if BULK:
        if LOW_RANK:
            for start in range(0, R, DEPTH):
                u = noise_weight.load([first_col, start])
                sigma = dot(x.load([first_row, start]), u.T, sigma)
        for start in range(0, H, DEPTH):
            h = hidden.load([first_row, start])
            z = dot(h, weight.load([first_col, start]).T, z)
            if not LOW_RANK:
                sigma = dot(h, noise_weight.load([first_col, start]).T, sigma)
                if SPLIT:
                    low = noise_weight.load([first_col, low_part + start])
                    sigma = dot(h, low.T, sigma)
    else:
        # What lies past the ends repeats the last row and column.
        rows = tl.minimum(first_row + tl.arange(0, ROWS), n - 1).to(tl.int64)
        cols = tl.minimum(first_col + tl.arange(0, COLS), V - 1)
        z = add_product(
            z, hidden, weight, rows, cols, H, hidden_row, hidden_col, weight_row, weight_col, DEPTH
        )
        sigma = noise_product(
            sigma, x, noise_weight, rows, cols, R, x_row, x_col, noise_row, noise_col, low_part, SPLIT, DEPTH
        )  # fmt: skip
    return z, sigma


@triton.jit
def noise_product(
    sigma, x, noise_weight, rows, cols, R, x_row, x_col, noise_row, noise_col, low_part,
    SPLIT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """sigma + X_rows·U_colsᵀ through pointers; rows and columns must exist."""
    sigma = add_product(
        sigma, x, noise_weight, rows, cols, R, x_row, x_col, noise_row, noise_col, DEPTH
    )
    if SPLIT:
        low = noise_weight + low_part * noise_col
        sigma = add_product(sigma, x, low, rows, cols, R, x_row, x_col, noise_row, noise_col, DEPTH)
    return sigma


@triton.jit
def noisy_logits(
    z, sigma, epsilon, bias, noise_bias, cols, inside, inner, outer, UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NOISE_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(z̃, z, tanh or raw product) of the raw products ``z`` and ``sigma``, and the draw, of the columns
    ``cols``.

    z̃ and z are in units of 1/UNIT nats, which is in ``outer`` too. Columns not ``inside`` mean nothing.
    """
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_NOISE_BIAS:
        sigma += tl.load(noise_bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = tanh(z * inner)
    clean = z * outer
    return clean + sigma * (epsilon * UNIT), clean, z


@triton.jit(do_not_specialize=["rows"])
def _parts_kernel(
    matrix, index, parts, rows, R, matrix_row, matrix_col, padded, GATHER: tl.constexpr,
    TERMS: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    source = tl.load(index + row, mask=row < rows, other=0).to(tl.int64) if GATHER else row
    at = tl.maximum(source, 0) * matrix_row + col.to(tl.int64) * matrix_col
    value = tl.load(matrix + at, mask=(row < rows) & (col < R), other=0.0).to(tl.float32)
    high = round_to(value, parts.dtype.element_ty)
    low = round_to(value - high.to(tl.float32), parts.dtype.element_ty)
    for term in tl.static_range(TERMS):
        out = parts + row * (TERMS * padded) + term * padded + col
        tl.store(out, low if term == LOW else high, mask=(row < rows) & (col < padded))


def terms(dtype: torch.dtype, noise: Noise) -> int:
    """Products whose sum is σ beside hidden of ``dtype``."""
    if dtype == torch.float32:
        return 1
    if noise.projection is not None:
        return 3
    return 1 if noise.weight.dtype == dtype else 2


def operand_width(dtype: torch.dtype, noise: Noise) -> int:
    """Columns of the operands where they are parts: all terms next to each other, each padded."""
    return terms(dtype, noise) * _padded(noise.weight.shape[1])


def row_operand(kept: Tensor, projected: Tensor | None) -> Tensor:
    """X as the kernels multiply it: hidden itself (n, H), or what its n projected rows (n, R) give."""
    if projected is None or kept.dtype == torch.float32:
        return kept if projected is None else projected
    parts = kept.new_empty(len(kept), 3 * _padded(projected.shape[1]))
    return _fill_parts(projected, None, parts, 3, low=2)


def column_operand(
    weight: Tensor, room: Tensor | None, terms: int, index: Tensor | None = None
) -> Tensor:
    """U (C, R) as the kernels multiply it: itself, or its parts, in ``room`` (≥ C, terms·padded R).

    With ``index`` (C,) int32 the rows of U are gathered where it is split; an index below 0 gives row 0.
    """
    if room is None:
        return weight
    count = len(weight) if index is None else len(index)
    return _fill_parts(weight, index, room[:count], terms, low=1)


def _fill_parts(
    matrix: Tensor, index: Tensor | None, parts: Tensor, terms: int, low: int
) -> Tensor:
    """``parts``: the high part of ``matrix[index]``, ``terms`` times, but the low one at place ``low``."""
    rows, width, padded = len(parts), matrix.shape[1], parts.shape[1] // terms
    grid = triton.cdiv(rows, PARTS_ROWS), triton.cdiv(padded, PARTS_COLS)
    _parts_kernel[grid](
        matrix, index, parts, rows, width, *matrix.stride(), padded,
        GATHER=index is not None, TERMS=terms, LOW=low, ROWS=PARTS_ROWS, COLS=PARTS_COLS, num_warps=4,
    )  # fmt: skip
    return parts


def plan_columns(
    vocab: int, step: int, kept: Tensor, noise: Noise, budget: int, column_bytes: int = 0
) -> tuple[list[slice], Tensor | None]:
    """Slices of the vocabulary that fit ``budget`` bytes, and room for the parts of U of one; None: no parts.

    A column takes ``column_bytes`` and its parts. Slices are equal and cut at multiples of ``step``; one step
    is the least, so a tiny budget can be exceeded by that much.
    """
    split = terms(kept.dtype, noise) > 1
    width = operand_width(kept.dtype, noise)
    if split:
        column_bytes += width * kept.dtype.itemsize
    steps = triton.cdiv(vocab, step)
    most = max(1, min(steps, budget // (step * column_bytes) if column_bytes else steps))
    length = triton.cdiv(steps, triton.cdiv(steps, most)) * step
    room = kept.new_empty(min(vocab, length), width) if split else None
    return list(spans(vocab, length)), room


def _padded(width: int) -> int:
    return triton.cdiv(width, ALIGNMENT) * ALIGNMENT
