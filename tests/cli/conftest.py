"""A checkpoint directory and a preference file in UltraFeedback's format, small enough for a test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastpo.demo.model import build_model, build_tokenizer


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with ``model/`` and ``prefs.jsonl``: 16 pairs."""
    directory = tmp_path_factory.mktemp("start")
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    rng = random.Random(0)
    rows = []
    for i in range(16):
        prompt = f"add {i} and {rng.randrange(10)}"
        question = {"role": "user", "content": prompt}
        rows.append(
            {
                "prompt": prompt,
                "prompt_id": f"id{i}",
                "chosen": [question, {"role": "assistant", "content": f"it is {i}."}],
                "rejected": [question, {"role": "assistant", "content": "no " * rng.randint(1, 4)}],
                "messages": [question, {"role": "assistant", "content": f"it is {i}."}],
                "score_chosen": 8.0,
                "score_rejected": 2.0,
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "prefs.jsonl").write_text(lines, encoding="utf-8")
    return directory


@pytest.fixture
def write_config(start: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a YAML file of settings for a run of four steps; keywords replace or add fields, DROP omits one."""

    def write(**changes: object) -> Path:
        settings: dict[str, object] = {
            "model_name_or_path": str(start / "model"),
            "dataset": str(start / "prefs.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "loss_type": "simpo",
            "beta": 2.0,
            "margin": "gamma",
            "simpo_gamma": 1.0,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "plot_loss": True,
            "use_cpu": True,
        } | changes
        path = tmp_path / "run.yaml"
        kept = {name: value for name, value in settings.items() if value is not DROP}
        path.write_text(yaml.safe_dump(kept), encoding="utf-8")
        return path

    return write


DROP = object()
