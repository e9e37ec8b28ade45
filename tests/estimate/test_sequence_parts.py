"""The estimate beside real runs of two processes that share each sequence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured_parts
import pytest
from tiny_models import llama

from fastpo.estimate import EstimateConfig
from fastpo.estimate import estimate as estimate_memory

SIMPO = {"loss_type": "simpo", "beta": 2.0}
MICRO_STEP = {"pairs": 8, "length": 256, "prompt": 60}
RUNS: dict[str, dict[str, Any]] = {
    "padded": SIMPO,
    "reference, checkpoints": {"gradient_checkpointing": True},
    "shared": {**SIMPO, "prefix_sharing": True},
}


def test_within_a_tenth(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = {
        name: settings(
            llama(),
            **fields,
            sequence_parallel_size=2,
            max_length=MICRO_STEP["length"],
            per_device_train_batch_size=MICRO_STEP["pairs"],
        )
        for name, fields in RUNS.items()
    }
    jobs = [{"settings": each, **MICRO_STEP} for each in given.values()]
    (tmp_path / "runs.json").write_text(json.dumps(jobs))
    here = Path(__file__).resolve().parents[1]
    paths = [str(here.parent), str(here / "estimate"), str(here / "trainer")]
    subprocess.run(
        [sys.executable, measured_parts.__file__, tmp_path / "runs.json", tmp_path / "out.json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    measured = json.loads((tmp_path / "out.json").read_text())
    for (name, each), bytes_held in zip(given.items(), measured, strict=True):
        config = EstimateConfig(**each, devices=2, prompt_length=MICRO_STEP["prompt"])
        found = estimate_memory(config).total
        print(f"{name}: estimate {found}, measured {bytes_held}, {found / bytes_held:.3f}")
        assert found == pytest.approx(bytes_held, rel=0.1), name
        if "checkpoints" in name:
            continue  # little is left to share
        whole = {**each, "sequence_parallel_size": 1}
        other = estimate_memory(
            EstimateConfig(**whole, devices=2, prompt_length=MICRO_STEP["prompt"])
        )
        assert other.total > 1.2 * bytes_held, name  # as if no sequence were shared


def test_a_size_that_does_not_divide_the_devices(settings: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        ValueError, match="sequence_parallel_size: got 2 with devices 3, expected a divisor of them"
    ):
        EstimateConfig(**settings(llama(), sequence_parallel_size=2), devices=3)
