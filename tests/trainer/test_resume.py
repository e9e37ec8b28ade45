"""Resuming: the same losses to the last bit, and what may be resumed from."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastpo.trainer import PreferenceTrainer
from fastpo.trainer.checkpoint import (
    STATE_FILE,
    TENSOR_FILE,
    RunState,
    find_resume_point,
    load_run_state,
    save_run_state,
)

Runner = Callable[..., PreferenceTrainer]


class Interrupted(Exception):
    pass


class StopAfter(TrainerCallback):
    """Ends the process's part of the run the hard way, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Interrupted


METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "dpo"},
    "γ-dpo": {
        "loss_type": "dpo", "margin": "gamma", "gamma_tau": 0.3,
        "gamma_queue_size": 16, "gamma_sample_size": 10,
    },
    "β-dpo": {"loss_type": "beta_dpo", "beta": 1.0},
    "dropout": {"loss_type": "simpo", "disable_dropout": False},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_repeats_the_uninterrupted_one_to_the_last_bit(
    method: str, trainer: Runner, model: Any, tmp_path: Path
) -> None:
    if method == "dropout":  # random numbers are drawn in every step
        model.config.attention_dropout = 0.2
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2
    options: dict[str, Any] = {
        **METHODS[method],
        "max_steps": 10,  # 30 pairs: epochs of 4 steps, the last with a short micro-step
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 2,  # a log window straddles the checkpoint at step 3
    }

    def build(name: str, **more: Any) -> PreferenceTrainer:
        return trainer(copy.deepcopy(model), output_dir=str(tmp_path / name), **options, **more)

    whole = build("whole")
    whole.train()
    broken = build("broken", callbacks=[StopAfter(5)])
    with pytest.raises(Interrupted):
        broken.train()
    resumed = build("broken")
    resumed.train(resume_from_checkpoint="auto")

    assert resumed.state.global_step == 10
    compared = [
        {
            k: v
            for k, v in entry.items()
            if "runtime" not in k and "second" not in k and "flos" not in k
        }
        for entry in whole.state.log_history[:-1]
    ]
    again = [dict(entry) for entry in resumed.state.log_history[:-1]]
    assert len(compared) == 5
    assert [{k: entry[k] for k in compared[0]} for entry in again] == compared
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    state, other = whole.loss_module.state_dict(), resumed.loss_module.state_dict()
    assert bool(state) == (method in ("γ-dpo", "β-dpo"))
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


def test_resuming_without_the_saved_queue_would_be_noticed(trainer: Runner, tmp_path: Path) -> None:
    """The queue matters: with an empty one the next loss differs."""
    options = {**METHODS["γ-dpo"], "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(output_dir=str(tmp_path / "a"), **options)
    whole.train()
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    directory = tmp_path / "a" / "checkpoint-3"
    state = load_run_state(directory)
    fresh = trainer(output_dir=str(tmp_path / "b"), **options).loss_module.state_dict()
    save_run_state(directory, RunState(state.settings, state.num_tokens, state.window, fresh))
    resumed = trainer(output_dir=str(tmp_path / "a"), **options)
    resumed.train(resume_from_checkpoint=str(directory))
    assert resumed.state.log_history[3]["loss"] != whole.state.log_history[3]["loss"]


@pytest.fixture
def finished(trainer: Runner, tmp_path: Path) -> Path:
    """The output directory of a run with checkpoints at steps 2 and 4."""
    trainer(save_strategy="steps", save_steps=2).train()
    return tmp_path / "run"


def test_output_directory_that_holds_a_run_is_refused(trainer: Runner, finished: Path) -> None:
    before = sorted(p.name for p in finished.rglob("*"))
    with pytest.raises(ValueError, match=r"output_dir: .*run already holds a run \(checkpoint-4\)"):
        trainer().train()
    assert sorted(p.name for p in finished.rglob("*")) == before


def test_output_directory_that_holds_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match="holds"):
            find_resume_point(tmp_path, resume)


@pytest.mark.parametrize("resume", ["auto", True, "True"])
def test_newest_checkpoint_is_chosen(resume: str | bool, finished: Path) -> None:
    assert find_resume_point(finished, resume) == finished / "checkpoint-4"


def test_auto_starts_afresh_where_there_is_nothing(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path, "auto") is None
    assert find_resume_point(tmp_path / "missing", "auto") is None
    for resume in (None, False, "false"):
        assert find_resume_point(tmp_path, resume) is None
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_resume_point(tmp_path, True)


def test_checkpoint_cut_short_is_passed_over(finished: Path) -> None:
    newest = finished / "checkpoint-4"
    (newest / STATE_FILE).unlink()
    (newest / "trainer_state.json").write_text('{"epoch": 1.')
    assert find_resume_point(finished, "auto") == finished / "checkpoint-2"
    with pytest.raises(ValueError, match="checkpoint-4"):
        find_resume_point(finished, str(newest))


def test_weights_alone_are_not_resumed_from(trainer: Runner, tmp_path: Path) -> None:
    run = trainer(save_strategy="steps", save_steps=4, save_only_model=True)
    run.train()
    for resume in ("auto", True, str(tmp_path / "run" / "checkpoint-4")):
        with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-4.*save_only_model"):
            trainer().train(resume_from_checkpoint=resume)


def test_directory_that_is_no_checkpoint_is_refused(trainer: Runner, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=r"cannot resume from .*other: it is not a directory"):
        trainer().train(resume_from_checkpoint=str(other))
    other.mkdir()
    with pytest.raises(ValueError, match=r"other: it holds no trainer_state.json"):
        trainer().train(resume_from_checkpoint=str(other))


def test_earlier_checkpoint_is_refused_while_later_ones_lie_there(
    trainer: Runner, finished: Path, tmp_path: Path
) -> None:
    first = finished / "checkpoint-2"
    with pytest.raises(ValueError, match=r"later checkpoints than checkpoint-2 \(checkpoint-4\)"):
        trainer().train(resume_from_checkpoint=str(first))
    run = trainer(output_dir=str(tmp_path / "elsewhere"))
    run.train(resume_from_checkpoint=str(first))
    assert run.state.global_step == 4


def test_checkpoint_of_another_run_is_refused_in_an_occupied_directory(
    trainer: Runner, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "occupied")
    with pytest.raises(ValueError, match="already holds another run"):
        trainer(output_dir=str(tmp_path / "occupied")).train(
            resume_from_checkpoint=str(finished / "checkpoint-4")
        )


def test_another_loss_is_refused(trainer: Runner, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"another loss \(beta 0.1 → 0.2\)"):
        trainer(beta=0.2).train(resume_from_checkpoint="auto")


def test_damaged_state_is_refused(trainer: Runner, finished: Path) -> None:
    file = finished / "checkpoint-4" / TENSOR_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"{TENSOR_FILE} is damaged"):
        trainer().train(resume_from_checkpoint="auto")


def test_checkpoint_overwritten_half_way_does_not_look_complete(
    trainer: Runner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies while it saves step 4 again."""
    shutil.rmtree(finished / "checkpoint-2")
    run = trainer(output_dir=str(finished), save_strategy="steps", save_steps=4)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", _die)
    monkeypatch.setattr("fastpo.trainer.resumable.find_resume_point", lambda *_: None)
    with pytest.raises(Interrupted):
        run.train()
    assert not (finished / "checkpoint-4" / STATE_FILE).exists()
    with pytest.raises(ValueError, match="cannot resume"):
        find_resume_point(finished, str(finished / "checkpoint-4"))


def _die(*_: Any) -> None:
    raise Interrupted


def test_state_files_are_safetensors_and_json_under_their_final_names(
    trainer: Runner, tmp_path: Path
) -> None:
    run = trainer(save_strategy="steps", save_steps=4, **METHODS["γ-dpo"])
    run.train()
    directory = tmp_path / "run" / "checkpoint-4"
    assert not list(directory.glob("*.tmp"))
    assert not list(directory.glob(".*"))
    tensors = load_file(directory / TENSOR_FILE)
    for name, tensor in run.loss_module.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    values = json.loads((directory / STATE_FILE).read_text())
    assert values["settings"]["gamma_queue_size"] == 16
    assert values["num_tokens"] == run.state.log_history[-2]["num_tokens"]


def test_old_checkpoints_are_deleted_only_when_the_new_one_is_complete(
    trainer: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(save_strategy="steps", save_steps=2, save_total_limit=1)
    calls = []

    def fail_the_second_time(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise Interrupted
        save_run_state(*arguments)

    monkeypatch.setattr("fastpo.trainer.resumable.save_run_state", fail_the_second_time)
    with pytest.raises(Interrupted):
        run.train()
    assert find_resume_point(tmp_path / "run", "auto") == tmp_path / "run" / "checkpoint-2"


def test_hub_token_is_not_in_the_saved_arguments(trainer: Runner, tmp_path: Path) -> None:
    run = trainer(hub_token="hf_secret")
    run.save_model(str(tmp_path / "saved"))
    saved = [p for p in (tmp_path / "saved").rglob("*") if p.is_file()]
    assert (tmp_path / "saved" / "training_args.bin") in saved
    assert not [p.name for p in saved if b"hf_secret" in p.read_bytes()]
    assert run.args.hub_token == "hf_secret"
