"""Runs interpreted_certified_backward.py where Triton kernels run on CPU tensors; tests what runs no kernel.

TRITON_INTERPRET=1 must be set before Triton is loaded, and compiling needs it unset: hence a process of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from host_reads import NoHostReads

from benchmarks.memory import peak_extra_bytes
from fastpo.kernels import audit, tile_configs
from fastpo.kernels.audit import AuditCase
from fastpo.kernels.certified_backward_triton import launch_backward, plan_sweep
from fastpo.kernels.logit_transform import IDENTITY
from fastpo.kernels.nucleus import words

ROOT = Path(__file__).parents[2]


def test_kernels_under_the_interpreter(seed: int) -> None:
    cases = Path(__file__).with_name("interpreted_certified_backward.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "FASTPO_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(cases.parent)  # for what the cases share
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


def launch(
    n: int, vocab: int, width: int, dtype: torch.dtype, budget: int, low_memory: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """A backward of n dense rows; where nothing is launched, of arbitrary numbers."""
    height = 128
    blocks = -(-n // height)
    return launch_backward(
        torch.ones(n), torch.empty(n, width, dtype=dtype), torch.empty(vocab, width, dtype=dtype),
        torch.empty(vocab, dtype=dtype), torch.zeros(n, dtype=torch.int64), torch.arange(n), torch.zeros(n),
        torch.zeros(blocks, words(vocab), dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32), height,
        IDENTITY, True, True, True, low_memory, tile_configs.target(torch.device("cpu")), budget,
    )  # fmt: skip


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="records launches")
@pytest.mark.parametrize("shape", [(4096, 32_000, 512), (12_000, 8192, 256), (40_000, 3001, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_budget_and_one_wide_sum_bound_the_memory(
    shape: tuple[int, int, int], dtype: torch.dtype, low_memory: bool
) -> None:
    n, vocab, width = shape
    budget = 2**25
    inputs = (n + vocab) * width * dtype.itemsize  # made by the step too
    results: list[torch.Tensor] = []

    def step() -> list[torch.Tensor]:
        launched = AuditCase(
            "", True, lambda: results.extend(launch(*shape, dtype, budget, low_memory))
        )
        audit.record("sm_90", [launched])
        return results

    extra = peak_extra_bytes(step) - inputs
    assert extra > budget // 2  # the measure sees the workspace
    allowed = budget if low_memory else budget + 4 * min(n, vocab) * width
    assert extra <= allowed + 30 * n + 3 * vocab * 4  # vectors of the call itself


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="records launches")
@pytest.mark.parametrize("low_memory", [False, True], ids=["", "low memory"])
def test_nothing_is_read_from_the_device(low_memory: bool) -> None:
    launched = partial(launch, 1000, 700, 32, torch.bfloat16, 2**18, low_memory)
    with NoHostReads():
        launches = audit.record("sm_90", [AuditCase("", True, launched)])
        assert len(launches) > 5
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sum_bytes", [0, 4 * 4096])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (128, 501), (501, 2048), (3, 1000), (77, 2)])
@pytest.mark.parametrize("space", [1, 10**6, 7 * 2**26])
def test_parts_fit_their_space_and_are_as_few_as_even(
    outer: int, inner: int, sum_bytes: int, space: int, whole: bool
) -> None:
    rows, columns = 128, 256
    part, length = plan_sweep((outer, rows), (inner, columns), 2, sum_bytes, space, whole)
    assert 1 <= part <= outer
    assert 1 <= length <= inner
    assert part == outer or not whole
    used = part * rows * (length * columns * 2 + sum_bytes)
    assert used <= space or length == 1
    for count, size in ((outer, part), (inner, length)):
        parts = -(-count // size)
        assert parts * size - count < parts
    if outer * rows * (inner * columns * 2 + sum_bytes) <= space:
        assert (part, length) == (outer, inner)


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="compiles a kernel")
def test_products_are_pipelined() -> None:
    """Which rows a step takes is read from lists: written carelessly, its loads are not in flight early."""
    case = AuditCase("", True, partial(launch, 256, 1024, 128, torch.bfloat16, 2**25))
    (kernel,) = [k for k in audit.record("sm_90", [case]) if "_products_kernel" in k.kernel]
    config = tile_configs._TABLE["matmul", "sm_90", "half"]
    report = audit.inspect(kernel)
    stage = 2 * (config.rows + config.cols) * config.depth
    assert report.shared_bytes >= config.stages * stage
    assert report.problems() == []
