"""SIGKILL at random moments of loops: continued, they end in the same files; no file is ever half there."""

from __future__ import annotations

import hashlib
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

from fastpo.demo.words import prepare_loop
from fastpo.selfplay.manifest import SUFFIX

ROOT = Path(__file__).resolve().parents[2]
JOB = Path(__file__).with_name("loop_job.py")
FUNCTION = "def score(prompt, response, row):\n    return sum(map(ord, response)) % 97 / 97\n"
TRAIN: dict[str, Any] = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_length": 64, "max_steps": 8, "save_steps": 2,
    "save_total_limit": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("kill")
    prepare_loop(directory / "start", seed=1, scale=0.04)
    (directory / "kill_rules.py").write_text(FUNCTION)
    return directory


def launch(start: Path, method: str, name: str) -> subprocess.Popen[str]:
    """A loop; its output goes to a file."""
    values: dict[str, Any] = {
        "method": method, "model_name_or_path": "start/model", "seeds": "start/seeds.jsonl", "seed": 3,
        "output_dir": name, "iterations": 2, "held_out": 8, "engine": {"batch_size": 4, "device": "cpu"},
        "sampling": {"max_tokens": 12, "temperature": 1.5},
        "scorer": {"kind": "callable", "function": "kill_rules:score"}, "train": TRAIN,
    }  # fmt: skip
    if method == "synpo":
        values |= {
            "corpus": "start/corpus.txt", "prompts_per_iteration": 40, "sft": {**TRAIN, "max_length": 128},
            "generator_template": "start/generator.txt", "improver_template": "start/improver.txt",
        }  # fmt: skip
    file = start / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{start}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", str(JOB), str(file)], cwd=start, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> float:
    """Seconds that it worked for, without its imports."""
    assert process.stdout is not None
    began = time.monotonic()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line == "started\n":
            began = time.monotonic()
    assert process.wait(300) == 0, "".join(lines)
    return time.monotonic() - began


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether it was still at work so long after its imports."""
    assert process.stdout is not None
    for line in process.stdout:
        if line == "started\n":
            break
    time.sleep(seconds)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def check_no_half_written_file(root: Path) -> None:
    """What has a manifest is what that says; what has none belongs to a stage under way."""
    for file in root.rglob("*.jsonl"):
        if ".partial" in str(file) or file.name.startswith("."):
            continue
        manifest = file.with_name(file.name + SUFFIX)
        if manifest.is_file():
            expected = json.loads(manifest.read_text())["output_sha256"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == expected, file
        else:
            assert file.with_name(file.name + ".partial").is_dir(), file


def compare(whole: Path, killed: Path) -> None:
    files = [sorted(str(p.relative_to(r)) for p in r.rglob("*.jsonl")) for r in (whole, killed)]
    assert files[0] == files[1]
    for name in files[0]:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    models = sorted(p.relative_to(whole) for p in whole.rglob("model.safetensors"))
    assert len(models) >= 2
    for name in models:
        tensors = [load_file(root / name) for root in (whole, killed)]
        for key, tensor in tensors[0].items():
            assert torch.equal(tensor, tensors[1][key]), (name, key)


def run_with_kills(start: Path, method: str, kills: int, seed: int) -> list[str]:
    seconds = finish(launch(start, method, f"{method}-whole"))
    draw = random.Random(seed)
    where: list[str] = []
    loops = 0
    while len(where) < kills:
        loops += 1
        name = f"{method}-killed-{loops}"
        root = start / name
        left = seconds
        while len(where) < kills:
            # Later and later moments: what was done before is skipped.
            if not kill_after(launch(start, method, name), draw.uniform(0, 0.8 * left)):
                break
            under_way = (
                [str(p.relative_to(root)) for p in root.rglob("*.partial")] if root.exists() else []
            )
            where.append(under_way[0] if under_way else "between two stages")
            if root.exists():
                check_no_half_written_file(root)
        finish(launch(start, method, name))
        compare(start / f"{method}-whole", root)
    print(where)
    return where


def test_a_loop_killed_twice_ends_in_the_same_files(start: Path, seed: int) -> None:
    assert len(run_with_kills(start, "dnpo", 2, seed)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["dnpo", "synpo"])
def test_loops_killed_ten_times_each_end_in_the_same_files(
    method: str, start: Path, seed: int
) -> None:
    where = run_with_kills(start, method, 10, seed)
    assert len(set(where)) > 2
