"""SIGKILL at random moments of a run, saves included: what is resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
KILLS = 8


def write_pairs(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(48):
            a, b = draw.randrange(50), draw.randrange(50)
            row = {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 3)}
            file.write(json.dumps(row) + "\n")


def start(directory: Path, name: str) -> subprocess.Popen[str]:
    settings: dict[str, Any] = {
        "output_dir": str(directory / name), "model_name_or_path": str(directory / "model"),
        "dataset": str(directory / "train.jsonl"), "per_device_train_batch_size": 4, "max_steps": 60,
        "logging_steps": 1, "save_steps": 2, "save_total_limit": 2, "learning_rate": 1e-3, "margin": "gamma",
        "gamma_queue_size": 32, "gamma_sample_size": 16, "resume_from_checkpoint": "auto", "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("job.py")), str(file)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> None:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output


@pytest.mark.slow
def test_killed_runs_end_like_an_undisturbed_one(
    model: Any, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl", seed)
    finish(start(tmp_path, "whole"))

    draw = random.Random(seed)
    killed_in = []
    for _ in range(KILLS):
        process = start(tmp_path, "killed")
        # Importing takes most of the time: wait for a checkpoint of this process, then a random while.
        known = set((tmp_path / "killed").glob("checkpoint-*"))
        while process.poll() is None and set((tmp_path / "killed").glob("checkpoint-*")) <= known:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.12))
        if process.poll() is None:
            process.kill()
        process.communicate()
        newest = max(
            (tmp_path / "killed").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )
        killed_in.append((newest.name, (newest / "fastpo_state.json").exists()))
        if process.returncode == 0:
            break
    print(killed_in)
    assert len({name for name, _ in killed_in}) > 2
    finish(start(tmp_path, "killed"))

    histories = [
        [
            {k: v for k, v in entry.items() if "second" not in k and "runtime" not in k}
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())[
                "log_history"
            ]
            if "loss" in entry
        ]
        for name in ("whole", "killed")
    ]
    assert len(histories[0]) == 60
    assert histories[0] == histories[1]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
