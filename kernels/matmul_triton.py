"""Matrix product of the backward: out[out_rows] = (addend + A·B)·α, accumulated in float32.

Shapes: A (M, K), B (K, N), addend (M, N) float32, out (·, N) in any dtype, α a float32 scalar on the device.
One kernel, one write of the output: a sum over slices passes its float32 partial sum as addend, and its last
call scales and rounds. Passes over memory: A once per column block and B once per row block (mostly from the L2
cache), addend and out once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .logits_triton import place
from .precision_triton import dot, round_to
from .tile_configs import TileConfig

GROUP = 8  # row blocks that are under way together, so that they share B's columns in the L2 cache


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tile.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def split_columns(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The four quarters of a tile's columns, left to right."""
    left, right = halves(tile, ROWS, COLS)
    first, second = halves(left, ROWS, COLS // 2)
    third, fourth = halves(right, ROWS, COLS // 2)
    return first, second, third, fourth


@triton.jit
def split_finely(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The eight eighths of a tile's columns, left to right."""
    first, second, third, fourth = split_columns(tile, ROWS, COLS)
    a, b = halves(first, ROWS, COLS // 4)
    c, d = halves(second, ROWS, COLS // 4)
    e, f = halves(third, ROWS, COLS // 4)
    g, h = halves(fourth, ROWS, COLS // 4)
    return a, b, c, d, e, f, g, h


@triton.jit
def join_columns(quarters, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile (ROWS, COLS) of the four quarters of its columns."""
    left = tl.join(quarters[0], quarters[1]).permute(0, 2, 1).reshape(ROWS, COLS // 2)
    right = tl.join(quarters[2], quarters[3]).permute(0, 2, 1).reshape(ROWS, COLS // 2)
    return tl.join(left, right).permute(0, 2, 1).reshape(ROWS, COLS)


@triton.jit
def _pointer_product(
    a, b, row_block, col_block, N, K, a_row, a_col, b_row, b_col,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of A·B. A is read in whole tiles: what lies past its end must be finite."""
    rows = row_block * ROWS + tl.arange(0, ROWS)
    cols = col_block * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    a_ptrs = a + rows.to(tl.int64)[:, None] * a_row + depth[None, :] * a_col
    b_ptrs = b + depth[:, None] * b_row + cols.to(tl.int64)[None, :] * b_col
    inside = (cols < N)[None, :]
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, DEPTH):
        b_tile = tl.load(b_ptrs, mask=(depth < K - start)[:, None] & inside, other=0.0)
        acc = dot(tl.load(a_ptrs), b_tile, acc)
        a_ptrs += DEPTH * a_col
        b_ptrs += DEPTH * b_row
    return acc


@triton.jit
def _described_product(
    a, b, row_block, col_block, K,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The same by bulk copies (TMA), from tensor descriptors of A, or Aᵀ, and B; zeros past their ends."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, DEPTH):
        b_tile = b.load([start, col_block * COLS])
        if TRANSPOSED:
            acc = dot(a.load([start, row_block * ROWS]).T, b_tile, acc)
        else:
            acc = dot(a.load([row_block * ROWS, start]), b_tile, acc)
    return acc


@triton.jit(do_not_specialize=["M", "K"])
def _matmul_kernel(
    a, b, out, addend, alpha, out_rows,
    M, N, K, a_row, a_col, b_row, b_col, out_row, addend_row,
    BULK: tl.constexpr, TRANSPOSED: tl.constexpr, SCATTER: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tl.assume(K > 0)
    row_blocks, col_blocks = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    # Flattened with the loop over K: the next tile's operands are on their way while this one is written.
    for tile in tl.range(
        tl.program_id(0), row_blocks * col_blocks, tl.num_programs(0), flatten=BULK
    ):
        row_block, col_block = place(tile, row_blocks, col_blocks, GROUP)
        if BULK:
            acc = _described_product(a, b, row_block, col_block, K, TRANSPOSED, ROWS, COLS, DEPTH)
        else:
            acc = _pointer_product(
                a, b, row_block, col_block, N, K, a_row, a_col, b_row, b_col, ROWS, COLS, DEPTH
            )
        rows = row_block * ROWS + tl.arange(0, ROWS)
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
    a: Tensor,  # (M, K), either dimension contiguous
    b: Tensor,  # (K, N)
    out: Tensor,  # (·, N), last dimension contiguous
    config: TileConfig,
    bulk: bool,
    processors: int,
    *,
    alpha: Tensor | None = None,  # () float32; None: 1
    out_rows: Tensor | None = None,  # (M,) int64
    addend: Tensor | None = None,  # (M, N) float32, last dimension contiguous; may be ``out``
) -> None:
    """Write ``(addend + a·b)·alpha`` to ``out[out_rows]``.

    With ``bulk`` both operands are fetched by bulk copies, which must be able to describe them, and as many
    programs as there are ``processors`` go from tile to tile. Without it ``a`` must be a corner view of a
    larger, finite matrix: the kernel reads it without a mask up to whole tiles, (⌈M/rows⌉·rows,
    ⌈K/depth⌉·depth) of ``config``, which keeps 16-byte loads whatever M and K are.
    """
    (m, k), width = a.shape, b.shape[1]
    transposed = a.stride(1) != 1
    tiles = triton.cdiv(m, config.rows) * triton.cdiv(width, config.cols)
    if bulk:
        a_block = [config.depth, config.rows] if transposed else [config.rows, config.depth]
        operands = (
            TensorDescriptor.from_tensor(a.t() if transposed else a, a_block),
            TensorDescriptor.from_tensor(b, [config.depth, config.cols]),
        )
    else:
        operands = a, b
    _matmul_kernel[(min(tiles, processors) if bulk else tiles,)](
        *operands, out, addend, alpha, out_rows,
        m, width, k, *a.stride(), *b.stride(), out.stride(0), 0 if addend is None else addend.stride(0),
        BULK=bulk, TRANSPOSED=transposed, SCATTER=out_rows is not None, ADD=addend is not None,
        SCALE=alpha is not None,
        ROWS=config.rows, COLS=config.cols, DEPTH=config.depth, GROUP=GROUP,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def reference(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    """What ``matmul`` writes for α = 1 without ``out_rows``, in float64."""
    product = a.double() @ b.double()
    return product if addend is None else product + addend.double()
