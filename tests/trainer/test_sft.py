"""Supervised fine-tuning: the loss is the mean over completion tokens, whole runs, and mistakes by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastpo.cli import main
from fastpo.data import load_examples, tokenize_examples
from fastpo.trainer import SFTConfig, SFTTrainer, fine_tune

Runner = Callable[..., SFTTrainer]


@pytest.fixture
def examples(pairs: datasets.Dataset) -> datasets.Dataset:
    """Completions of different lengths."""
    return pairs.rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")


@pytest.fixture
def runner(
    model: Any, examples: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Runner:
    def make(rows: datasets.Dataset = examples, **overrides: Any) -> SFTTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 4, "max_steps": 3,
            "per_device_eval_batch_size": 4, "learning_rate": 3e-3, "logging_steps": 1, "save_strategy": "no",
            "disable_tqdm": True, "seed": 7,
        }  # fmt: skip
        evaluation = overrides.pop("eval_dataset", None)
        return SFTTrainer(
            copy.deepcopy(model), SFTConfig(**(defaults | overrides)), train_dataset=rows,
            eval_dataset=evaluation, processing_class=tokenizer,
        )  # fmt: skip

    return make


def dense_loss(model: Any, rows: datasets.Dataset) -> tuple[float, int]:
    """−Σ log p over the completions, with all logits, one row at a time; and how many tokens that are."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].double().log_softmax(-1)
        picked = logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(row["prompt_ids"]) - 1 :]
        total -= float(picked.sum())
        count += len(picked)
    return total, count


def logged(trainer: SFTTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_first_loss_is_the_dense_mean_over_completion_tokens(
    runner: Runner, examples: datasets.Dataset
) -> None:
    rows = examples.select(range(8))
    trainer = runner(rows, max_steps=1, per_device_train_batch_size=8)
    total, count = dense_loss(trainer.model, rows)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-5)
    assert 0 <= logged(trainer, "mean_token_accuracy")[0] <= 1
    assert logged(trainer, "entropy")[0] > 0
    assert logged(trainer, "num_tokens") == [
        sum(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    ]


def test_accumulation_equals_one_large_batch(runner: Runner, examples: datasets.Dataset) -> None:
    """The micro-steps hold different numbers of tokens."""
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": -1, "num_train_epochs": 2}
    options |= {"train_sampling_strategy": "sequential"}
    rows = examples.select(range(14))
    large = runner(rows, per_device_train_batch_size=8, **options)
    small = runner(rows, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    for trainer in (large, small):
        trainer.train()
        assert trainer.state.global_step == 4
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logged(small, name) == pytest.approx(logged(large, name), rel=1e-5), name
    for name, parameter in small.model.named_parameters():
        torch.testing.assert_close(
            parameter, large.model.get_parameter(name), rtol=0, atol=1e-6, msg=name
        )


def test_evaluation_is_a_mean_over_all_tokens(runner: Runner, examples: datasets.Dataset) -> None:
    rows = examples.select(range(10, 17))  # batches of four and three
    trainer = runner(eval_dataset=rows)
    total, count = dense_loss(trainer.model, rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_run_ends_in_the_same_weights(runner: Runner, tmp_path: Path) -> None:
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
    }
    whole = runner(**options, output_dir=str(tmp_path / "whole"))
    whole.train()
    half = runner(**options, output_dir=str(tmp_path / "half"))
    half.train()
    for file in (tmp_path / "half" / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "half" / "checkpoint-6").rmdir()
    resumed = runner(**options, output_dir=str(tmp_path / "half"), resume_from_checkpoint="auto")
    resumed.train()
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_loss_that_is_not_finite_stops_before_the_step(runner: Runner) -> None:
    trainer = runner()
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"step 1: the loss is nan in micro-step 1 of 1, data rows 1\d\d"
    ):
        trainer.train()


MESSAGES = [{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}]
FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": MESSAGES}],
    "prompt and completion": [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}],
    "a string before a message": [{"prompt": "2+3", "completion": MESSAGES[1:]}],
    "messages before a string": [{"prompt": MESSAGES[:1], "completion": "5"}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_one_conversation_give_the_same_ids(
    name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FORMATS[name]))
    rows, report = tokenize_examples(load_examples(path), tokenizer, max_length=None)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    prompt = tokenizer.apply_chat_template(
        MESSAGES[:1], add_generation_prompt=True, return_dict=False
    )
    assert rows[0]["prompt_ids"] == prompt
    assert rows[0]["prompt_ids"] + rows[0]["completion_ids"] == whole
    assert report.kept == 1
    assert set(report.tokens) == {"prompt", "completion"}


def test_plain_text_and_parquet(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    texts = {"prompt": ["a+b=", "c"], "completion": ["c", " "]}
    datasets.Dataset.from_dict(texts).to_parquet(str(path))
    rows, report = tokenize_examples(load_examples(path), tokenizer, max_length=None)
    assert tokenizer.decode(rows[0]["prompt_ids"] + rows[0]["completion_ids"]) == "a+b=c<eos>"
    assert report.dropped["empty_answer"].count == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', r"line 1: no 'completion' \(the row has 'prompt'\)"),
        ('{"messages": "a"}', "line 1: messages must be a list of messages"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "must end with an assistant's message",
        ),
        ('{"messages": []}', "must end with an assistant's message"),
    ],
)
def test_a_bad_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_examples(path)


def test_the_command_trains_and_saves(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{a}+1", "completion": [{"role": "assistant", "content": str(a + 1)}]}
        for a in range(20)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset: {tmp_path / 'train.jsonl'}\n"
        f"eval_dataset: {tmp_path / 'train.jsonl'}\nlearning_rate: 1e-3\nplot_loss: true\n"
        f"per_device_train_batch_size: 5\noutput_dir: {tmp_path / 'out'}\nsave_strategy: no\nlogging_steps: 1\n"
    )
    assert main(["sft", "--config", str(tmp_path / "sft.yaml"), "--num_train_epochs", "2"]) == 0
    out = tmp_path / "out"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(
        loaded.lm_head.weight, load_file(tmp_path / "model/model.safetensors")["lm_head.weight"]
    )
    assert json.loads((out / "eval_results.json").read_text())["eval_loss"] > 0
    assert json.loads((out / "data_report.json").read_text())["train"]["kept"] == 20
    assert (out / "training.png").stat().st_size > 1000
    assert "learning_rate: 0.001" in (out / "fastpo_config.yaml").read_text()
    capsys.readouterr()
    assert main(["sft", "--config", str(tmp_path / "sft.yaml")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["sft", "--config", str(tmp_path / "sft.yaml"), "--beta", "1"]) == 2
    assert "unknown field 'beta'" in capsys.readouterr().err


def test_the_config_of_another_trainer_is_refused(
    model: Any, settings: Any, tokenizer: Any, examples: Any
) -> None:
    with pytest.raises(TypeError, match="args: got PreferenceConfig, expected an SFTConfig"):
        SFTTrainer(model, settings(), train_dataset=examples, processing_class=tokenizer)
    with pytest.raises(ValueError, match="dataset: got None"):
        fine_tune(SFTConfig(output_dir="x", model_name_or_path="y"))
