"""The whole job: a checkpoint directory and a preference file in, a checkpoint and an account out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.trainer import PreferenceConfig, train
from fastpo.trainer.launch import CONFIG_FILE, DATA_REPORT_FILE
from fastpo.trainer.plots import PLOT_FILE

Settings = Callable[..., PreferenceConfig]
COUNT = 24


def write_ultrafeedback(path: Path, count: int, seed: int) -> None:
    """JSONL in ultrafeedback_binarized's format: both answers as whole conversations, and other columns."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for k in range(count):
            a, b = draw.randrange(50), draw.randrange(50)
            question = {"role": "user", "content": f"{a}+{b}?"}
            row: dict[str, Any] = {
                "prompt": question["content"],
                "prompt_id": str(k),
                "score_chosen": 8.0,
            }
            for name, value in (("chosen", a + b), ("rejected", a + b + draw.randrange(1, 9))):
                row[name] = [question, {"role": "assistant", "content": str(value)}]
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def job(model: Any, tokenizer: Any, settings: Settings, tmp_path: Path, seed: int) -> Settings:
    """Settings of a job on a model directory and two files."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_ultrafeedback(tmp_path / "train.jsonl", COUNT, seed)
    write_ultrafeedback(tmp_path / "eval.jsonl", 6, seed + 1)

    def make(**overrides: Any) -> PreferenceConfig:
        return settings(
            **{
                "model_name_or_path": str(tmp_path / "model"),
                "dataset": str(tmp_path / "train.jsonl"),
                **overrides,
            }
        )

    return make


def test_whole_job(job: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    config = job(
        loss_type="simpo", beta=2.0, margin="gamma", eval_dataset=str(tmp_path / "eval.jsonl"),
        plot_loss=True, save_strategy="steps", save_steps=2, hub_token="hf_secret",
    )  # fmt: skip
    trainer = train(config)

    loaded = AutoModelForCausalLM.from_pretrained(run, dtype="float32")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert loaded.config.use_cache is start.config.use_cache is True
    assert not torch.equal(loaded.lm_head.weight, start.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert loaded.generate(ids, max_new_tokens=2).shape[1] > ids.shape[1]

    settings = yaml.safe_load((run / CONFIG_FILE).read_text())
    assert (settings["loss_type"], settings["beta"], settings["margin"]) == ("simpo", 2.0, "gamma")
    report = json.loads((run / DATA_REPORT_FILE).read_text())
    assert (report["train"]["rows"], report["train"]["kept"], report["eval"]["kept"]) == (
        COUNT,
        COUNT,
        6,
    )
    assert f"{COUNT} rows, {COUNT} kept" in capsys.readouterr().out
    metrics = json.loads((run / "all_results.json").read_text())
    assert metrics["train_loss"] > 0
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    assert json.loads((run / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [e["loss"] for e in history if "loss" in e]
    assert history[-1]["eval_loss"] == metrics["eval_loss"]
    assert (run / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not [p for p in run.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]

    with pytest.raises(ValueError, match=r"output_dir: .*already holds a run"):
        train(job())


def test_a_plot_that_cannot_be_made_does_not_cost_the_model(job: Settings, tmp_path: Path) -> None:
    train(job(plot_loss=True, max_steps=1, logging_strategy="no"))  # nothing to plot
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / PLOT_FILE).exists()


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, 2),  # after steps 2 and 3
        ({"eval_strategy": "no"}, 1),
        (
            {
                "eval_strategy": "steps",
                "eval_steps": 3,
                "save_strategy": "steps",
                "save_steps": 3,
                "load_best_model_at_end": True,
            },
            2,
        ),
    ],
    ids=["evaluated", "never", "best"],
)
def test_the_last_step_is_evaluated_once(
    options: dict[str, Any], runs: int, job: Settings, tmp_path: Path
) -> None:
    config = job(eval_dataset=str(tmp_path / "eval.jsonl"), max_steps=3, **options)
    history = train(config).state.log_history
    evaluations = [e for e in history if "eval_loss" in e]
    assert len(evaluations) == runs
    results = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert results == {k: v for k, v in evaluations[-1].items() if k != "step"}


def test_job_goes_on_where_it_stopped(job: Settings, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    whole = train(job(output_dir=str(tmp_path / "whole"), max_steps=6, **options))
    train(job(max_steps=4, resume_from_checkpoint="auto", **options))
    for file in (tmp_path / "run").iterdir():  # as if it had been killed before the end
        if file.is_file():
            file.unlink()
    resumed = train(job(max_steps=6, resume_from_checkpoint="auto", **options))
    assert resumed.state.global_step == 6
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


def test_finished_job_is_not_trained_again(job: Settings, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    first = train(job(**options))
    again = train(job(resume_from_checkpoint="auto", **options))
    assert again.state.global_step == 4
    assert [e["loss"] for e in again.state.log_history if "loss" in e] == [
        e["loss"] for e in first.state.log_history if "loss" in e
    ]
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name


def test_lora_job_leaves_an_adapter_that_loads(job: Settings, model: Any, tmp_path: Path) -> None:
    options = {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 1e-2}
    trainer = train(job(**options))
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype="float32").eval()
    ids = torch.tensor([[1, 20, 30, 40]])
    trained = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, model.eval()(input_ids=ids).logits, atol=1e-3)
    again = train(job(output_dir=str(tmp_path / "again"), **options))
    assert [e.get("loss") for e in again.state.log_history] == [
        e.get("loss") for e in trainer.state.log_history
    ]  # the adapter's random start is seeded


def test_reference_from_a_directory(
    job: Settings, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "other")
    trainer = train(job(ref_model_name_or_path=str(tmp_path / "other"), max_steps=1))
    assert torch.equal(trainer.ref_model.lm_head.weight, model.lm_head.weight)
    assert trainer.state.log_history[0]["rewards/chosen"] != 0.0


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"dataset": None}, ValueError, "dataset: got None"),
        ({"dataset": "missing.jsonl"}, FileNotFoundError, r"missing\.jsonl"),
        ({"model_name_or_path": "./missing"}, FileNotFoundError, "model_name_or_path: ./missing"),
        (
            {"ref_model_name_or_path": "./missing"},
            FileNotFoundError,
            "ref_model_name_or_path: ./mis",
        ),
        ({"resume_from_checkpoint": "./missing"}, ValueError, "resume_from_checkpoint: .*missing"),
        ({"max_length": 4}, ValueError, "no row can be used"),
        ({"peft": {"rank": 4}}, ValueError, "LoraConfig has no field 'rank'"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_what_cannot_work_leaves_no_run_behind(
    overrides: dict[str, Any],
    error: type[Exception],
    message: str,
    job: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(job(**overrides))
    run = tmp_path / "run"
    assert not run.exists() or not any(run.iterdir())


def test_conversations_without_a_template_are_an_error(job: Settings, tmp_path: Path) -> None:
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat_template"):
        train(job())
    template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert train(job(chat_template=template, max_steps=1)).state.global_step == 1
