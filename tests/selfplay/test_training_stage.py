"""Training as a stage: done once, continued at every place where a kill can leave it, refused otherwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from selfplay_files import read_jsonl, write_jsonl

from fastpo.selfplay import training
from fastpo.selfplay.journal import lock
from fastpo.selfplay.training import check_training_settings, train_stage

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = {
    "learning_rate": "1e-3", "per_device_train_batch_size": 4, "max_length": 64, "max_steps": 4, "beta": 0.3,
    "save_steps": 2, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"q{k}"}],
         "chosen": [{"role": "assistant", "content": f"a{k}"}],
         "rejected": [{"role": "assistant", "content": f"b{k}"}]}
        for k in range(12)
    ]  # fmt: skip
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def run(checkpoint: Path, dataset: Path, output: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "start": str(checkpoint),
        "dataset": dataset,
        "output": output,
        "seed": 7,
    }
    return train_stage("train", SETTINGS | changes.pop("settings", {}), **(options | changes))


def head(model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")["lm_head.weight"]


def test_trained_once_without_checkpoints_left(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    manifest = run(checkpoint, dataset, model)
    assert not torch.equal(head(model), head(checkpoint))
    assert not list(model.glob("checkpoint-*"))
    assert not list(tmp_path.glob("model.*partial")) + list(tmp_path.glob("*.lock"))
    assert manifest.identity["settings"]["learning_rate"] == 1e-3
    monkeypatch.setattr(training, "_run_here", lambda *_: 1 / 0)
    assert run(checkpoint, dataset, model).output_sha256 == manifest.output_sha256
    with pytest.raises(ValueError, match=r"settings\.beta: 0\.3 → 0\.5"):
        run(checkpoint, dataset, model, settings={"beta": 0.5})
    with pytest.raises(ValueError, match=r"settings\.seed: 7 → 8"):
        run(checkpoint, dataset, model, seed=8)
    more = write_jsonl(tmp_path / "more.jsonl", read_jsonl(dataset)[1:])
    with pytest.raises(ValueError, match=r"the content of dataset changed: .*more\.jsonl"):
        run(checkpoint, more, model)
    (model / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="was changed since it was trained"):
        run(checkpoint, dataset, model)


PLACES = {
    "in the middle": ("fastpo.trainer.resumable.ResumableTrainer.log", 3),
    "while the model is saved at the end": ("fastpo.trainer.PreferenceTrainer.save_model", 1),
    "before its metrics are": ("fastpo.trainer.PreferenceTrainer.save_state", 1),
    "before the directory has its name": ("fastpo.selfplay.training.os.replace", 1),
    "before the manifest": ("fastpo.selfplay.training._save_manifest", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_continued_wherever_it_was_killed(
    place: str, checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(checkpoint, dataset, tmp_path / "whole")
    name, calls = PLACES[place]
    module_name, attribute = name.rsplit(".", 1)
    target = pytest.MonkeyPatch()
    seen = []

    def dies(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    import importlib
    from pkgutil import resolve_name

    importlib.import_module("fastpo.trainer")
    owner = resolve_name(module_name)
    real = getattr(owner, attribute)
    with target.context() as patch:
        patch.setattr(owner, attribute, dies)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, dataset, tmp_path / "model")
    assert seen
    manifest = run(checkpoint, dataset, tmp_path / "model")
    assert torch.equal(head(tmp_path / "model"), head(tmp_path / "whole"))
    assert manifest.output_sha256
    assert not (tmp_path / "model.partial").exists()


def test_a_final_save_cut_short_without_a_checkpoint_is_made_again(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    """As a kill leaves it where save_strategy is no."""
    settings = {"save_strategy": "no"}
    run(checkpoint, dataset, tmp_path / "whole", settings=settings)
    model, partial = tmp_path / "model", tmp_path / "model.partial"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_run_here", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(checkpoint, dataset, model, settings=settings)
    shutil.copy(checkpoint / "config.json", partial)
    (partial / "model.safetensors").write_bytes(b"half")
    run(checkpoint, dataset, model, settings=settings)
    assert torch.equal(head(model), head(tmp_path / "whole"))


def test_directories_of_others_are_left_alone(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists, and no loop made it"):
        run(checkpoint, dataset, model)
    assert (model / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_run_here", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(checkpoint, dataset, other)
        with pytest.raises(ZeroDivisionError):  # nothing was trained yet
            run(checkpoint, dataset, other, settings={"beta": 0.8})
        (tmp_path / "other.partial/checkpoint-2").mkdir()
        with pytest.raises(
            ValueError,
            match=r"other\.partial was made with other .*settings\.beta: 0\.8 → 0\.9.* delete the directory",
        ):
            run(checkpoint, dataset, other, settings={"beta": 0.9})


def test_examples_train_too_and_the_account_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{k}", "completion": [{"role": "assistant", "content": "a"}]} for k in range(8)
    ]
    dataset = write_jsonl(tmp_path / "examples.jsonl", rows)
    settings = {k: v for k, v in SETTINGS.items() if k != "beta"}
    train_stage(
        "sft", settings, start=str(checkpoint), dataset=dataset, output=tmp_path / "m", seed=1
    )
    assert json.loads((tmp_path / "m/data_report.json").read_text())["train"]["kept"] == 8
    assert (tmp_path / "m.manifest.json").is_file()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("train", {"output_dir": "x"}, r"train\.output_dir: the loop sets it"),
        ("train", {"betta": 1}, "train: unknown field 'betta', did you mean 'beta'?"),
        ("train", {"loss_type": "dop"}, "train: loss_type: got 'dop'"),
        ("train", {"learning_rate": "fast"}, "train: learning_rate: got 'fast', expected a num"),
        ("sft", {"beta": 1}, r"train: unknown field 'beta'"),
        ("sft", {"xyzzy": 1}, r"train: unknown field 'xyzzy'; expected some of fastpo sft --help"),
        (
            "train",
            {"hub_token": "s"},
            r"train\.hub_token: a credential.* environment variable HF_TOKEN",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(kind: str, settings: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        check_training_settings(kind, {**settings, "use_cpu": True}, "train")


def test_two_processes_do_not_train_into_one_directory(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    with lock(tmp_path / "model.lock", model), pytest.raises(ValueError, match="another process"):
        run(checkpoint, dataset, model)
    assert not (tmp_path / "model.partial").exists()


LAUNCHER = """
import pathlib, subprocess, sys
# As launchers do it: a child that gets no other files than the three standard ones, and outlives them.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
child.wait()
"""
PARENT = """
import sys
from pathlib import Path
from fastpo.selfplay.training import train_stage
start, dataset, output, launcher = sys.argv[1:]
dataset, output = Path(dataset), Path(output)
train_stage("train", {"use_cpu": True}, start=start, dataset=dataset, output=output, seed=7, launcher=launcher)
"""


def test_a_trainer_that_outlives_its_killed_parents_keeps_the_lock(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    model, pid_file, script = tmp_path / "model", tmp_path / "pid", tmp_path / "launcher.py"
    script.write_text(LAUNCHER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(checkpoint), str(dataset), str(model), f"python {script} {pid_file}"]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (pid_file.is_file() and pid_file.read_text()):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    trainer = int(pid_file.read_text())
    try:
        parent.kill()
        parent.wait()
        with pytest.raises(ValueError, match=r"another process is at work on .*model"):
            run(checkpoint, dataset, model, settings={"max_steps": 1})
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the launcher and the trainer
    while Path(f"/proc/{trainer}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run(checkpoint, dataset, model, settings={"max_steps": 1})
