"""Runs interpreted_certified_forward.py where Triton kernels run on CPU tensors; tests what needs no kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_reads import NoHostReads

from fastpo.kernels import audit, certified_forward_audit, nucleus, tile_configs
from fastpo.kernels.certified_forward_triton import plan_rows

HERE = Path(__file__).parent


def test_kernels_under_the_interpreter(seed: int) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "FASTPO_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(HERE)  # it builds on interpreted_linear_logprobs.py
    cases = HERE / "interpreted_certified_forward.py"
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


@pytest.mark.parametrize("chip", tile_configs.CHIPS)
@pytest.mark.parametrize("vocab", [1000, 32000, 151936, 256000])
@pytest.mark.parametrize("n", [1, 500, 513, 16384, 262144])
@pytest.mark.parametrize("budget", [1, 64 * 2**20, 512 * 2**20])
def test_plan_fits_its_budget(chip: str, vocab: int, n: int, budget: int) -> None:
    """The workspace, counted here tensor by tensor, or a block of masks and a tile of codes if that is more."""
    height, width, dtype = 128, 4096, torch.bfloat16
    config = tile_configs._TABLE["certified", chip, "half"]
    plan = plan_rows(n, vocab, width, dtype, height, config, budget)
    assert plan.window == n or plan.window % height == 0
    assert plan.chunk == plan.window or plan.chunk % config.rows == 0
    assert 1 <= plan.chunk <= plan.window <= n
    columns = -(-vocab // config.cols) * config.cols
    panels = columns // (config.cols // 2)

    def chunk_bytes(rows: int) -> int:
        return rows * (columns + (4 + 3) * 4 * panels + width * dtype.itemsize)

    def window_bytes(rows: int) -> int:
        return rows * 4 * nucleus.words(vocab)

    least = window_bytes(min(n, height)) + chunk_bytes(config.rows)
    used = window_bytes(plan.window) + chunk_bytes(plan.chunk)
    assert used <= max(budget, least, budget // 4 + chunk_bytes(config.rows))
    if budget == 512 * 2**20 and n == 262144:
        assert used >= 0.8 * budget
        assert plan.window >= 4096
        # A chunk reads the whole weight: r rows make r flop of each of its bytes in 16 bits. A chip that
        # multiplies at 770 TFLOP/s and reads 4.3 TB/s needs 180 of them to be busy; this is with room to spare.
        assert plan.chunk >= 512


@pytest.mark.skipif(tile_configs.INTERPRETED, reason="launches kernels as a GPU would")
def test_nothing_is_read_from_the_device() -> None:
    """PyTorch's part of the call, that is: kernels cannot hand anything back."""
    cases = [c for c in certified_forward_audit.audit_cases() if c.gate]
    assert len(cases) == 4
    with pytest.raises(AssertionError), NoHostReads():
        torch.ones(3).sum().item()
    with NoHostReads():
        assert len(audit.record("sm_90", cases)) >= 3
