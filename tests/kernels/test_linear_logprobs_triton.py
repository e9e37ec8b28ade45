"""Runs interpreted_linear_logprobs.py where Triton kernels run on CPU tensors, and tests what needs no kernel.

TRITON_INTERPRET=1 must be set before Triton is loaded, and the compile audit needs it unset: hence a process of
its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpo.kernels import linear_logprobs_triton, tile_configs
from fastpo.kernels.linear_logprobs_backward_triton import plan_slices, power_of_two_scale

ROOT = Path(__file__).parents[2]


def test_kernels_under_the_interpreter(seed: int) -> None:
    cases = Path(__file__).with_name("interpreted_linear_logprobs.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "FASTPO_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(run.stdout[-20_000:])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    hidden, weight = torch.zeros(2, 4), torch.zeros(8, 4)
    assert "TRITON_INTERPRET=1" in linear_logprobs_triton.supported(hidden, weight)
    with pytest.raises(ValueError, match="backend: got 'triton', but the tensors are on cpu"):
        linear_logprobs_triton.backward(
            torch.zeros(2), hidden, weight, None, torch.zeros(2, dtype=torch.int64), None, torch.zeros(2),
            linear_logprobs_triton.LogitTransform(), True, True, False,
        )  # fmt: skip


@pytest.mark.parametrize("budget", [1, 10_000, 1_000_000, 2**29])
@pytest.mark.parametrize(
    ("n", "vocab"), [(1, 1), (5, 50257), (8192, 32003), (40_000, 997), (513, 513)]
)
def test_slices_cover_the_logits_once_and_fit_the_budget(n: int, vocab: int, budget: int) -> None:
    steps = (128, 256)
    slices = plan_slices(n, vocab, steps, torch.bfloat16, budget)
    cut, whole = (1, slice(0, n)) if n <= vocab else (0, slice(0, vocab))
    assert all(s[1 - cut] == whole for s in slices)
    bounds = [s[cut].start for s in slices] + [slices[-1][cut].stop]
    assert bounds[0] == 0
    assert bounds[-1] == max(n, vocab)
    assert all(
        a.stop == b.start
        for (a, b) in zip([s[cut] for s in slices], [s[cut] for s in slices[1:]], strict=False)
    )
    step = steps[n <= vocab]
    assert all(bound % step == 0 for bound in bounds[:-1])
    # The first slice is what the workspace is made for.
    lengths = [s[cut].stop - s[cut].start for s in slices]
    assert max(lengths) == lengths[0]
    padded = -(-lengths[0] // step) * step
    other_step = steps[n > vocab]
    other = -(-min(n, vocab) // other_step) * other_step
    assert padded * other * 2 <= budget or padded == step


@pytest.mark.parametrize("row_blocks", [1, 3, 16, 64, 500])
@pytest.mark.parametrize("tiles", [1, 7, 125, 501])
@pytest.mark.parametrize("processors", [4, 108, 132, 148])
def test_splits_cover_every_tile_and_fill_the_chip(
    row_blocks: int, tiles: int, processors: int
) -> None:
    splits = tile_configs.vocabulary_splits(row_blocks, tiles, processors)
    per_split = -(-tiles // splits)
    assert (
        (splits - 1) * per_split < tiles <= splits * per_split
    )  # all tiles, and no split without one

    def makespan(count: int) -> int:
        return -(-row_blocks * count // processors) * -(-tiles // count)

    assert makespan(splits) <= makespan(1)


def test_tiles_are_powers_of_two_so_that_larger_ones_are_multiples_of_smaller_ones() -> None:
    for tile in tile_configs._TABLE.values():
        assert all(size & (size - 1) == 0 for size in tile[:4]), tile


@pytest.mark.parametrize("size", [0.0, 1e-38, 3e-9, 0.7, 1.0, 65536.0, 1e30])
def test_scale_is_a_power_of_two_that_fills_float16(size: float) -> None:
    scale, unscale = power_of_two_scale(torch.tensor([size / 3, -size]), -0.5)
    assert scale.item() * unscale.item() == 1.0
    assert torch.frexp(scale).mantissa.item() == 0.5
    largest = size * 0.5 * scale.item()
    assert largest < 2**14
    if 1e-25 < size < 1e25:
        assert largest >= 2**13
