"""Runs interpreted_certified_noisy.py where Triton kernels run on CPU tensors; tests what runs no kernel.

TRITON_INTERPRET=1 must be set before Triton is loaded, and compiling needs it unset: hence a process of its
own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_reads import NoHostReads

from benchmarks.memory import peak_extra_bytes
from fastpo.kernels import audit, certified_noisy_audit, tile_configs
from fastpo.kernels.audit import AuditCase
from fastpo.kernels.certified_noisy_backward_triton import launch_backward
from fastpo.kernels.certified_noisy_forward_triton import launch_forward
from fastpo.kernels.logit_transform import IDENTITY
from fastpo.kernels.noise import Needed, Noise
from fastpo.kernels.nucleus import words

HERE = Path(__file__).parent


def test_kernels_under_the_interpreter(seed: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "FASTPO_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE)  # for what the cases share
    cases = HERE / "interpreted_certified_noisy.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(run.stdout[-20_000:])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="records launches")
@pytest.mark.parametrize("rank", [None, 32], ids=["full rank", "low rank"])
def test_budget_bounds_the_memory(rank: int | None) -> None:
    """A float32 generator beside a frozen model in bfloat16."""
    n, vocab, width, budget, height = 4096, 32_000, 256, 2**25, 128
    noise = Noise(
        torch.empty(vocab, rank or width),
        None if rank is None else torch.empty(rank, width),
        None,
        2**64 - 1,
        torch.zeros(n, dtype=torch.int64),
    )
    hidden, weight = (torch.empty(k, width, dtype=torch.bfloat16) for k in (n, vocab))
    rows, lse = torch.arange(n), torch.zeros(n)
    blocks = n // height
    masks = torch.zeros(blocks, words(vocab), dtype=torch.int32)
    counts = torch.zeros(blocks, dtype=torch.int32)
    target = tile_configs.Target("sm_90", 132)
    results: list = []

    def forward() -> list[torch.Tensor]:
        def launch() -> None:
            results.append(
                launch_forward(
                    hidden, weight, None, rows, rows, IDENTITY, noise, True, 2**-10, target, budget
                )
            )

        audit.record("sm_90", [AuditCase("", True, launch)])
        return list(results[-1][1])

    def backward() -> list[torch.Tensor]:
        needed = Needed(False, False, False, True, rank is not None, False)

        def launch() -> None:
            results.append(
                launch_backward(
                    torch.ones(n), hidden, weight, None, rows, rows, lse, masks, counts, height, IDENTITY,
                    noise, needed, target, budget,
                )
            )  # fmt: skip

        audit.record("sm_90", [AuditCase("", True, launch)])
        return [g for g in results[-1] if g is not None]

    gathered = 4 * 512 * width  # rows that are widened at a time
    assert peak_extra_bytes(forward) <= budget + masks.nbytes + 2 * gathered + 200 * n
    extra = peak_extra_bytes(backward)
    assert extra > budget // 2
    x = 0 if rank is None else n * (4 + 2 * 3) * rank
    gradients = noise.weight.nbytes + (0 if rank is None else 4 * rank * width)
    allowed = budget + 2 * n * width + 2 * x + 2 * gathered + gradients + 200 * n + 40 * vocab
    assert extra <= allowed


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="launches kernels as a GPU would")
def test_nothing_is_read_from_the_device() -> None:
    """PyTorch's part of the call, that is: kernels cannot hand anything back."""
    cases = [c for c in certified_noisy_audit.audit_cases() if c.gate]
    assert len(cases) == 4
    with pytest.raises(AssertionError), NoHostReads():
        torch.ones(3).sum().item()
    with NoHostReads():
        assert len(audit.record("sm_90", cases)) >= 8
