"""Device functions that make one tile of logits; inlined into the forward and the backward kernel alike.

    u = H_rows · W_colsᵀ + b        t = tanh(u·inner)  with a softcap, else u        z = t·outer

``inner`` = scale/softcap and ``outer`` = softcap/temperature; without a softcap ``outer`` = scale/temperature
(``scale_factors``). Shapes: H_rows (ROWS, H), W_cols (COLS, H), u and z (ROWS, COLS) float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .logit_transform import LogitTransform
from .precision_triton import dot
from .tile_configs import TileConfig


def scale_factors(transform: LogitTransform) -> tuple[float, float]:
    """``(inner, outer)`` of the formula above."""
    if transform.softcap is None:
        return 1.0, transform.linear_factor
    return transform.logit_scale / transform.softcap, transform.softcap / transform.temperature


def contiguous(vector: Tensor | None) -> Tensor | None:
    """An optional vector as the kernels read it, with stride 1."""
    return None if vector is None else vector.contiguous()


def operands(
    config: TileConfig, bulk: bool, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]:
    """(hidden, weight) as arguments of a kernel that calls ``dense_tile`` with BULK = ``bulk``."""
    if not bulk:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [config.rows, config.depth]),
        TensorDescriptor.from_tensor(weight, [config.cols, config.depth]),
    )


@triton.jit
def place(pid, row_blocks, columns, GROUP: tl.constexpr):
    """(row block, column) of a program: GROUP row blocks go through all columns before the next GROUP."""
    group = pid // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    within = pid - group * GROUP * columns
    return first + within % height, within // height


@triton.jit
def source_rows(row_index, rows, n, GATHER: tl.constexpr):
    """Where ``rows`` of the kept rows lie in hidden, int64; rows past the end repeat a valid one."""
    rows = tl.minimum(rows, n - 1)
    return tl.load(row_index + rows) if GATHER else rows.to(tl.int64)


@triton.jit
def local_labels(labels, rows, n, first_col, V):
    """Column of each row's label among the V columns from ``first_col`` on, int32; −1 if not among them."""
    label = tl.load(labels + rows, mask=rows < n, other=-1) - first_col
    return tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)


@triton.jit
def add_product(
    acc, hidden, weight, rows, cols, H, hidden_row, hidden_col, weight_row, weight_col, DEPTH: tl.constexpr
):  # fmt: skip
    """acc + H_rows·W_colsᵀ, (ROWS, COLS); rows and columns must exist."""
    depth = tl.arange(0, DEPTH)
    h_ptrs = hidden + rows[:, None] * hidden_row + depth[None, :] * hidden_col
    w_ptrs = weight + cols.to(tl.int64)[None, :] * weight_row + depth[:, None] * weight_col
    for start in range(0, H, DEPTH):
        h = tl.load(h_ptrs, mask=depth[None, :] < H - start, other=0.0)
        w = tl.load(w_ptrs, mask=depth[:, None] < H - start, other=0.0)
        acc = dot(h, w, acc)
        h_ptrs += DEPTH * hidden_col
        w_ptrs += DEPTH * weight_col
    return acc


@triton.jit
def raw_tile(
    hidden, weight, bias, rows, cols, V, H, hidden_row, hidden_col, weight_row, weight_col,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u of rows × cols. Columns past V repeat the last one: loads need no mask, the caller drops them."""
    cols = tl.minimum(cols, V - 1)
    acc = add_product(
        tl.zeros([ROWS, COLS], tl.float32), hidden, weight, rows, cols, H,
        hidden_row, hidden_col, weight_row, weight_col, DEPTH,
    )  # fmt: skip
    if HAS_BIAS:  # last, lest a large one cost the sum its low bits
        acc += tl.load(bias + cols).to(tl.float32)[None, :]
    return acc


@triton.jit
def dense_tile(
    hidden, weight, bias, first_row, first_col, n, V, H, hidden_row, hidden_col, weight_row, weight_col,
    BULK: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """u of ROWS × COLS neighbours from (``first_row``, ``first_col``) on; 0 in columns past V.

    With BULK, hidden and weight are tensor descriptors, and bulk copies (TMA) fetch their tiles: two
    instructions of one thread per step, and zeros for what lies outside.
    """
    cols = first_col + tl.arange(0, COLS)
    inside = cols < V
    if BULK:
        u = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, H, DEPTH):
            u = dot(hidden.load([first_row, start]), weight.load([first_col, start]).T, u)
    else:
        rows = source_rows(None, first_row + tl.arange(0, ROWS), n, False)
        u = raw_tile(
            hidden, weight, bias, rows, cols, V, H,
            hidden_row, hidden_col, weight_row, weight_col, False, ROWS, COLS, DEPTH,
        )  # fmt: skip
        u = tl.where(inside[None, :], u, 0.0)
    if HAS_BIAS:
        u += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    return u


@triton.jit
def tanh(x):
    """tanh in float32 to a relative error of about 2e-7.

    The exponential form loses relative accuracy near 0: a fitted odd polynomial (error 4e-8) stands in there.
    """
    square = x * x
    tail = -0.33332957 + square * (0.13320942 + square * (-0.05268414 + square * 0.01645875))
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * square * tail, far)
