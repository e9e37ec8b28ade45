"""Settings of a run of two steps on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LENGTH, PAIRS, llama

from fastpo.estimate import Estimate, EstimateConfig, estimate


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``settings(model_config, **fields)``: keywords of a run, with a directory of a config.json alone."""

    def make(model_config: Any, **fields: Any) -> dict[str, Any]:
        model_config.save_pretrained(tmp_path / "model")
        return {
            "model_name_or_path": str(tmp_path / "model"),
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": PAIRS,
            "max_length": LENGTH,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **fields,
        }

    return make


@pytest.fixture
def estimated(settings: Callable[..., dict[str, Any]]) -> Callable[..., Estimate]:
    """``estimated(**fields)``: of a run on the tiny Llama."""
    return lambda **fields: estimate(EstimateConfig(**settings(llama(), **fields)))
