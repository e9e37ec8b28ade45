"""Matrix product of the backward: out[out_rows] = (addend + A·B[inner_rows])·α, accumulated in float32.

Shapes: A (M, K), B (·, N) of which the K rows ``inner_rows`` count (all, in order, without the list), addend
(M, N) float32, out (·, N) in any dtype, α a float32 scalar on the device. One kernel, one write of the output:
a sum over slices passes its float32 partial sum as addend, and its last call scales and rounds.
Passes over memory: A once per column block and B once per row block (mostly from the L2 cache), addend and out
once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .logits_triton import place
from .precision_triton import dot, round_to
from .tile_configs import TileConfig

GROUP = 8  # row blocks that are under way together, so that they share B's columns in the L2 cache


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The four quarters of a tile's columns, left to right."""
    left, right = tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
    first, second = left.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
    third, fourth = right.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
    return first, second, third, fourth


@triton.jit(do_not_specialize=["M", "K"])
def _matmul_kernel(
    a, b, out, addend, alpha, inner_rows, out_rows,
    M, N, K, a_row, a_col, b_row, b_col, out_row, addend_row,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_block, col_block = place(tl.program_id(0), tl.cdiv(M, ROWS), tl.cdiv(N, COLS), GROUP)
    rows = row_block * ROWS + tl.arange(0, ROWS)
    cols = col_block * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    a_ptrs = a + rows.to(tl.int64)[:, None] * a_row + depth.to(tl.int64)[None, :] * a_col
    inside = (cols < N)[None, :]
    b_ptrs = b + cols.to(tl.int64)[None, :] * b_col
    source = tl.load(inner_rows + depth, mask=depth < K, other=0) if GATHER else depth.to(tl.int64)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, DEPTH):
        inner = start + depth
        a_tile = tl.load(a_ptrs)  # padded with zeros up to whole tiles, see ``matmul``
        b_tile = tl.load(
            b_ptrs + source[:, None] * b_row, mask=(inner < K)[:, None] & inside, other=0.0
        )
        acc = dot(a_tile, b_tile, acc)
        a_ptrs += DEPTH * a_col
        # The next rows' numbers are fetched a step ahead: loads that wait for loads are not pipelined.
        inner += DEPTH
        source = (
            tl.load(inner_rows + inner, mask=inner < K, other=0) if GATHER else inner.to(tl.int64)
        )
    target = tl.load(out_rows + rows, mask=rows < M, other=0) if SCATTER else rows.to(tl.int64)
    # A quarter at a time: addend and result of a whole 128×256 tile together overflow the registers.
    quarters = split_columns(acc, ROWS, COLS)
    for i in tl.static_range(4):
        part = quarters[i]
        cols = col_block * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
        kept = (rows < M)[:, None] & (cols < N)[None, :]
        if ADD:
            part += tl.load(
                addend + rows.to(tl.int64)[:, None] * addend_row + cols[None, :], mask=kept
            )
        if SCALE:
            part *= tl.load(alpha)
        tl.store(
            out + target[:, None] * out_row + cols[None, :],
            round_to(part, out.dtype.element_ty),
            mask=kept,
        )


def matmul(
    a: Tensor,  # (M, K)
    b: Tensor,  # (·, N)
    out: Tensor,  # (·, N), last dimension contiguous
    config: TileConfig,
    *,
    alpha: Tensor | None = None,  # () float32; None: 1
    inner_rows: Tensor | None = None,  # (K,) int64
    out_rows: Tensor | None = None,  # (M,) int64
    addend: Tensor | None = None,  # (M, N) float32, last dimension contiguous; may be ``out``
) -> None:
    """Write ``(addend + a·b[inner_rows])·alpha`` to ``out[out_rows]``.

    ``a`` must be a corner view of a larger zero-padded matrix: the kernel reads it without a mask up to whole
    tiles, (⌈M/rows⌉·rows, ⌈K/depth⌉·depth) of ``config``, and relies on the padding of the inner
    dimension being finite. That keeps 16-byte loads whatever M and K are.
    """
    (m, k), width = a.shape, b.shape[1]
    _matmul_kernel[(triton.cdiv(m, config.rows) * triton.cdiv(width, config.cols),)](
        a, b, out, addend, alpha, inner_rows, out_rows,
        m, width, k, *a.stride(), *b.stride(), out.stride(0), 0 if addend is None else addend.stride(0),
        GATHER=inner_rows is not None, SCATTER=out_rows is not None, ADD=addend is not None,
        SCALE=alpha is not None,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def reference(
    a: Tensor, b: Tensor, inner_rows: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """What ``matmul`` writes for α = 1 without ``out_rows``, in float64."""
    product = a.double() @ (b if inner_rows is None else b[inner_rows]).double()
    return product if addend is None else product + addend.double()
