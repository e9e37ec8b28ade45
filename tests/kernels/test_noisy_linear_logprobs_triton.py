"""Runs interpreted_noisy_linear_logprobs.py where Triton kernels run on CPU tensors; tests what runs no kernel.

TRITON_INTERPRET=1 must be set before Triton is loaded, and compiling needs it unset: hence a process of its
own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_reads import NoHostReads

from benchmarks.memory import peak_extra_bytes
from fastpo.kernels import audit, noisy_linear_logprobs_audit, tile_configs
from fastpo.kernels.audit import AuditCase
from fastpo.kernels.logit_transform import IDENTITY
from fastpo.kernels.noise import Needed, Noise
from fastpo.kernels.noisy_linear_logprobs_backward_triton import launch_backward
from fastpo.kernels.noisy_linear_logprobs_forward_triton import launch_forward
from fastpo.kernels.noisy_logits_triton import operand_width, plan_columns, terms
from fastpo.kernels.philox_triton import key_words

HERE = Path(__file__).parent


def test_kernels_under_the_interpreter(seed: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "FASTPO_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE)  # it builds on interpreted_linear_logprobs.py
    cases = HERE / "interpreted_noisy_linear_logprobs.py"
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


def make_noise(n: int, vocab: int, width: int, generator: torch.dtype, rank: int | None) -> Noise:
    return Noise(
        torch.empty(vocab, rank or width, dtype=generator),
        None if rank is None else torch.empty(rank, width, dtype=generator),
        torch.empty(vocab, dtype=generator),
        2**64 - 1,
        torch.zeros(n, dtype=torch.int64),
    )


@pytest.mark.parametrize("seed_value", [0, 1, 2**31, 2**32 - 1, 2**63 + 2**31 + 5, 2**64 - 1])
def test_key_words_are_the_halves_of_the_seed(seed_value: int) -> None:
    low, high = key_words(seed_value)
    assert (low % 2**32) + (high % 2**32 << 32) == seed_value
    assert -(2**31) <= min(low, high) <= max(low, high) < 2**31  # one signature for all seeds


@pytest.mark.parametrize(
    ("dtype", "generator", "rank", "count"),
    [
        (torch.float32, torch.float32, None, 1),
        (torch.float32, torch.float32, 5, 1),
        (torch.bfloat16, torch.bfloat16, None, 1),
        (torch.bfloat16, torch.float32, None, 2),
        (torch.float16, torch.float16, 5, 3),
    ],
)
@pytest.mark.parametrize("budget", [1, 10**5, 10**9])
def test_columns_are_covered_once_and_fit_the_budget(
    dtype: torch.dtype, generator: torch.dtype, rank: int | None, count: int, budget: int
) -> None:
    vocab, step, column_bytes = 1003, 32, 24
    kept, noise = torch.empty(4, 20, dtype=dtype), make_noise(4, vocab, 20, generator, rank)
    assert terms(dtype, noise) == count
    columns, room = plan_columns(vocab, step, kept, noise, budget, column_bytes)
    assert [c.start for c in columns[1:]] == [c.stop for c in columns[:-1]]
    assert (columns[0].start, columns[-1].stop) == (0, vocab)
    assert all(c.stop % step == 0 for c in columns[:-1])
    longest = max(c.stop - c.start for c in columns)
    assert longest == columns[0].stop
    if count == 1:
        assert room is None
    else:
        assert room.shape == (longest, operand_width(dtype, noise))
        column_bytes += room.shape[1] * dtype.itemsize
    assert longest * column_bytes <= budget or longest == step
    assert (
        len(columns) == 1 or (longest + step) * column_bytes > budget / 2
    )  # no more than it takes


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="records launches")
@pytest.mark.parametrize("rank", [None, 32], ids=["full rank", "low rank"])
def test_budget_bounds_the_memory(rank: int | None) -> None:
    """A float32 generator beside a frozen model in bfloat16, whose parts and gradients make several slices."""
    n, vocab, width, budget = 4096, 32_000, 256, 2**24
    noise = make_noise(n, vocab, width, torch.float32, rank)._replace(bias=None)
    hidden, weight = (torch.empty(k, width, dtype=torch.bfloat16) for k in (n, vocab))
    rows, lse = torch.arange(n), torch.zeros(n)
    needed = Needed(False, False, False, True, rank is not None, False)
    target = tile_configs.Target("sm_90", 132)
    results: list = []

    def forward() -> list[torch.Tensor]:
        def launch() -> None:
            results.append(
                launch_forward(
                    hidden, weight, None, rows, rows, IDENTITY, noise, True, target, budget
                )
            )

        audit.record("sm_90", [AuditCase("", True, launch)])
        return []

    def backward() -> list[torch.Tensor]:
        def launch() -> None:
            results.append(
                launch_backward(
                    torch.ones(n), hidden, weight, None, rows, rows, lse, IDENTITY, noise, needed, target,
                    budget
                )
            )  # fmt: skip

        audit.record("sm_90", [AuditCase("", True, launch)])
        return [g for g in results[-1] if g is not None]

    gathered = 4 * 512 * width  # rows that are widened at a time
    extra = peak_extra_bytes(forward)
    assert budget // 4 < extra <= budget + 2 * gathered + 100 * n
    x = 0 if rank is None else n * (4 + 2 * 3) * rank
    extra = peak_extra_bytes(backward)
    gradients = noise.weight.nbytes + (0 if rank is None else 4 * rank * width)
    assert extra > budget // 2
    allowed = budget + 2 * n * width + 2 * x + 2 * gathered + gradients + 100 * n + 8 * vocab
    assert extra <= allowed


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="compiles a kernel")
def test_draw_rounds_the_angle_and_leaves_only_the_root_to_the_hardware() -> None:
    """What the interpreter cannot show: compilers fuse, and the hardware has approximations of its own."""
    (case,) = [c for c in noisy_linear_logprobs_audit.audit_cases() if c.name == "philox"]
    (launch,) = audit.record("sm_90", [case])
    code = audit.build(launch).asm["ptx"]
    two_pi = "0f40C90FDB"  # of a product by itself, so that its result is rounded
    uses = [line.split()[0] for line in code.splitlines() if two_pi in line]
    assert set(uses) == {"mul.f32"}
    approximate = set(re.findall(r"\b(\w+)\.approx", code))
    assert approximate == {"sqrt"}


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="launches kernels as a GPU would")
def test_nothing_is_read_from_the_device() -> None:
    """PyTorch's part of the call, that is: kernels cannot hand anything back."""
    cases = [c for c in noisy_linear_logprobs_audit.audit_cases() if c.gate]
    assert len(cases) == 3
    with pytest.raises(AssertionError), NoHostReads():
        torch.ones(3).sum().item()
    with NoHostReads():
        assert len(audit.record("sm_90", cases)) >= 5
