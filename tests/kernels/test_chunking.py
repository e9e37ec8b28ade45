"""What the plans of the certified backward promise whoever walks by them, for any shape."""

from __future__ import annotations

import pytest
import torch

from fastpo.kernels import chunking
from fastpo.kernels.nucleus import WORD_BITS, words

CPU = torch.device("cpu")
SHAPES = [
    (1, 7, 3),
    (100, 97, 8),
    (2048, 32_000, 1024),
    (65_536, 151_936, 4096),
    (5000, 256_000, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height", [8, 64, 128])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("n", "vocab", "width"), SHAPES)
def test_forward_plan(
    n: int, vocab: int, width: int, height: int, dtype: torch.dtype, narrow: bool
) -> None:
    plan = chunking.plan_certified_forward(n, vocab, width, height, CPU, dtype, narrow)
    assert plan.window_rows % height == 0 or plan.window_rows == n  # blocks do not straddle windows
    assert 1 <= plan.tile_rows <= plan.chunk_rows <= n
    of_masks = plan.window_rows * words(vocab) * 4
    of_logits = (plan.chunk_rows + plan.tile_rows) * vocab * dtype.itemsize
    gathered = (plan.chunk_rows + narrow * plan.product_cols) * width * dtype.itemsize
    least = height * words(vocab) * 4 + 2 * vocab * dtype.itemsize  # a block's masks, two rows
    assert of_masks + of_logits + gathered <= chunking.CPU_BUDGET_BYTES + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height", [8, 64, 128])
@pytest.mark.parametrize("width", [3, 64, 1024, 4096, 16_384])
@pytest.mark.parametrize("vocab", [97, 32_000, 256_000, 1_000_000])
def test_backward_plan(vocab: int, width: int, height: int, dtype: torch.dtype) -> None:
    plan = chunking.plan_certified_backward(vocab, width, height, CPU, dtype)
    assert plan.group_rows % height == 0  # whole blocks
    assert plan.slice_cols % WORD_BITS == 0  # slices begin with a word of the masks
    assert plan.piece_cols >= 1
    rows = 2 * plan.group_rows * width  # H and dH of a group
    pieces = 3 * plan.piece_cols * width + plan.group_rows * plan.piece_cols  # W twice, dW, logits
    unions = plan.group_rows // height * vocab
    total = (rows + pieces + plan.slice_cols * width) * dtype.itemsize + unions
    least = (2 * height + WORD_BITS + 3) * width * dtype.itemsize + vocab
    assert total <= chunking.CPU_BUDGET_BYTES + least
