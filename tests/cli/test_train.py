"""`fastpo train`: the main job on real files, overrides, and what a user sees after a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.cli import main
from fastpo.cli.configuration import load_config
from fastpo.trainer import PreferenceConfig

ROOT = Path(__file__).parents[2]


def test_checkpoint_and_jsonl_in_checkpoint_metrics_plot_and_settings_out(
    start: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["train", "--config", str(write_config())]) == 0
    run = tmp_path / "run"

    trained = AutoModelForCausalLM.from_pretrained(run)
    before = AutoModelForCausalLM.from_pretrained(start / "model").state_dict()
    changes = {name: (p - before[name]).norm() for name, p in trained.state_dict().items()}
    assert all(0 < change < 1 for change in changes.values())
    tokenizer = AutoTokenizer.from_pretrained(run)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "add 1 and 2"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert trained(**ids).logits.isfinite().all()

    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [entry for entry in log if "rewards/margins" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        gap = entry["rewards/chosen"] - entry["rewards/rejected"]
        assert entry["rewards/margins"] == pytest.approx(gap, abs=1e-4)
        assert entry["gamma/min"] <= entry["gamma/mean"] <= entry["gamma/max"]
    assert json.loads((run / "train_results.json").read_text())["train_loss"] > 0
    assert (run / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((run / "data_report.json").read_text())["train"]["rows"] == 16


def test_the_resolved_settings_repeat_the_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["train", "--config", str(write_config()), "--beta", "3.5"]) == 0
    resolved = tmp_path / "run/fastpo_config.yaml"
    assert yaml.safe_load(resolved.read_text(encoding="utf-8"))["beta"] == 3.5
    assert main(["train", "--config", str(resolved), "--output_dir", str(tmp_path / "again")]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_command_line_beats_the_file(write_config: Callable[..., Path]) -> None:
    path = write_config(warmup_steps=0.1, peft={"r": 4}, learning_rate="1e-3")
    config = load_config(PreferenceConfig, path)
    assert (config.beta, config.max_length, config.plot_loss) == (2.0, 64, True)
    assert config.learning_rate == 1e-3  # a string to PyYAML
    assert config.peft == {"r": 4}
    config = load_config(
        PreferenceConfig,
        path,
        [
            "--beta",
            "7",
            "--max-length=32",
            "--plot_loss",
            "false",
            "--peft",
            '{"r": 8}',
            "--tf32=0",
        ],
    )
    assert (config.beta, config.max_length, config.plot_loss) == (7.0, 32, False)
    assert config.peft == {"r": 8}
    assert config.simpo_gamma == 1.0  # what the command line leaves alone stays
    assert load_config(PreferenceConfig, None, ["--beta", "0.2"]).beta == 0.2


def test_null_on_the_command_line_unsets_a_field(write_config: Callable[..., Path]) -> None:
    path = write_config(peft={"r": 4}, eval_dataset="x", simpo_gamma=1.0)
    nulls = ["--peft", "null", "--eval-dataset=null", "--max_length", "null", "--beta", "3"]
    config = load_config(PreferenceConfig, path, nulls)
    assert (config.peft, config.eval_dataset, config.max_length) == (None, None, None)
    assert (config.beta, config.simpo_gamma) == (3.0, 1.0)


def test_a_warning_is_one_line_without_a_source_path(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def only_load(config: object) -> None:
        warnings.warn_explicit("theirs", UserWarning, "elsewhere.py", 1)

    monkeypatch.setattr("fastpo.trainer.train", only_load)
    path = str(write_config(margin="fixed", gamma_tau=3.0))
    told = "fastpo train: warning: gamma_tau: no effect with margin 'fixed'"
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with warnings.catch_warnings(record=True) as others:
            warnings.simplefilter("always")
            assert main(["train", "--config", path]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len([line for line in lines if line.startswith(told)]) == len(lines) == times
        assert [str(w.message) for w in others] == ["theirs"]


def test_an_unquoted_no_in_the_file_is_the_choice_no(write_config: Callable[..., Path]) -> None:
    path = write_config()
    path.write_text(path.read_text() + "\neval_strategy: no\ngreater_is_better: no\n")
    config = load_config(PreferenceConfig, path)
    assert config.eval_strategy == "no"
    assert config.greater_is_better is False


def test_null_and_lists_in_the_file(write_config: Callable[..., Path]) -> None:
    config = load_config(
        PreferenceConfig, write_config(max_length=None, report_to=[], label_names=["a", "b"])
    )
    assert config.max_length is None
    assert config.label_names == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"betta": 1}, [], "run.yaml: unknown field 'betta', did you mean 'beta'?"),
        (
            {},
            ["--gama_tau", "3"],
            "command line: unknown field 'gama_tau', did you mean 'gamma_tau'?",
        ),
        ({}, ["--learning-rat=3"], "unknown field 'learning_rat', did you mean 'learning_rate'?"),
        ({}, ["nonsense"], "command line: unexpected argument 'nonsense'"),
        ({"beta": "much"}, [], "run.yaml: beta: invalid float value: 'much'"),
        ({"beta": None}, [], "run.yaml: beta: got null, expected float"),
        ({"beta": [1, 2]}, [], "run.yaml: beta: got a list, expected float"),
        ({"beta": True}, [], "run.yaml: beta: invalid float value: 'True'"),
        ({"max_steps": 1.5}, [], "run.yaml: max_steps: invalid int value: '1.5'"),
        ({"plot_loss": "perhaps"}, [], "run.yaml: plot_loss: "),
        ({}, ["--beta"], "command line: beta: expected one argument"),
        ({}, ["--peft", "{r: 8}"], "command line: peft: not JSON"),
        ({}, ["--beta", "-1"], "beta: got -1"),
        ({"lr_scheduler_type": "cosin"}, [], "lr_scheduler_type: invalid choice: 'cosin'"),
        ({"margin": "dynamic"}, [], "margin: got 'dynamic', expected one of fixed, gamma"),
        ({"loss_type": "simpoo"}, [], "simpoo"),
        (
            {},
            ["--group_by_length", "true"],
            "unknown field 'group_by_length', the nearest known one is 'max_prompt_length'",
        ),
        ({}, ["--beta", "null"], "command line: beta: invalid float value: 'null'"),
        ({"loss_kwargs": {"x": 1}}, [], "loss_kwargs: x: not an option of loss 'simpo'"),
        ({"loss_kwargs": {"beta": 1}}, [], "loss_kwargs: "),
        ({"per_device_train_batch_size": 0}, [], "per_device_train_batch_size: got 0"),
        ({"use_liger_kernel": True}, [], "use_liger_kernel: "),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_that_names_it(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    overrides: list[str],
    message: str,
) -> None:
    assert main(["train", "--config", str(write_config(**changes)), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastpo train: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: [1", "run.yaml: not YAML"),
        ("- beta", "run.yaml: got a list, expected a mapping"),
        ("", "run.yaml: got null, expected a mapping"),
        ("3: 4", "run.yaml: unknown field '3'"),
        ("beta: 1\nseed: 2\nbeta: 3\n", "run.yaml: beta: got twice, in lines 1 and 3"),
        ("peft: {r: 1, r: 1}", "run.yaml: r: got twice, in lines 1 and 1"),
    ],
)
def test_a_file_that_is_no_mapping(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_paths_and_data_are_told_in_one_line(
    write_config: Callable[..., Path], start: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bad = tmp_path / "bad.jsonl"
    lines = (start / "prefs.jsonl").read_text(encoding="utf-8").splitlines()
    bad.write_text("\n".join([*lines[:2], '{"prompt": "x", ']) + "\n", encoding="utf-8")
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"prompt": "x", "chosen": "y"}\n', encoding="utf-8")
    for changes, message in (
        ({"dataset": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"dataset": DROPPED}, "dataset: got None"),
        ({"model_name_or_path": str(tmp_path / "nowhere")}, "model_name_or_path"),
        ({"model_name_or_path": str(start)}, "is not a checkpoint"),
        ({"loss_type": "dpo", "ref_model_name_or_path": "gone"}, "ref_model_name_or_path: gone"),
        ({"attn_implementation": "nonsense"}, "with attn_implementation 'nonsense'"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation 'flash_attention_2'"),
        ({"dataset": str(bad)}, "bad.jsonl, line 3"),
        ({"dataset": str(lone)}, "rejected"),
    ):
        changes = {k: None if v is DROPPED else v for k, v in changes.items()}
        assert main(["train", "--config", str(write_config(**changes))]) == 2, message
        error = capsys.readouterr().err
        last = error.strip().splitlines()[-1]
        assert message in last
        assert last.startswith("fastpo train: error: ")
        assert "Traceback" not in error
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "--config: no file" in capsys.readouterr().err
    assert not (tmp_path / "run/model.safetensors").exists()


DROPPED = object()


def test_a_finished_run_is_not_overwritten(
    write_config: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    path = str(write_config(max_steps=1))
    assert main(["train", "--config", path]) == 0
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    assert main(["train", "--config", path]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_a_loss_that_is_not_finite_stops_the_run_with_status_1(
    write_config: Callable[..., Path], start: Path, tmp_path: Path, capsys
) -> None:
    model = tmp_path / "nan-model"
    model.mkdir()
    for file in (start / "model").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(["train", "--config", str(write_config(model_name_or_path=str(model)))]) == 1
    errors = [
        x for x in capsys.readouterr().err.splitlines() if x.startswith("fastpo train: error")
    ]
    assert len(errors) == 1
    assert "stopped before optimiser step 1" in errors[0]


def test_a_defect_keeps_its_traceback(write_config: Callable[..., Path], monkeypatch) -> None:
    """Only errors that fastpo raises on purpose are shortened; this one comes from the test."""

    def broken(config: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("fastpo.trainer.train", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["train", "--config", str(write_config())])


def test_help_lists_every_field_once(capsys) -> None:
    import dataclasses

    from fastpo.trainer import PreferenceConfig

    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    words = text.replace(",", " ").split()
    for f in dataclasses.fields(PreferenceConfig):
        if f.init:
            assert f.name in words, f.name
    assert "fastpo train --config FILE.yaml" in text
    assert max(len(line) for line in text.splitlines()) <= 112


def test_as_a_module_with_relative_paths(
    start: Path, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """Relative paths are relative to the current directory, not to the file."""
    path = write_config(
        model_name_or_path="model", dataset="prefs.jsonl", output_dir="out", max_steps=1
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastpo.cli", "train", "--config", str(path)],
        cwd=start,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (start / "out/model.safetensors").is_file()


ACCELERATE = ["accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), [(ACCELERATE, 1), (TORCHRUN, 2)])
def test_under_a_launcher(
    write_config: Callable[..., Path], tmp_path: Path, launcher: list[str], processes: int
) -> None:
    path = write_config(per_device_train_batch_size=4 // processes)
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "fastpo.cli", "train", "--config", str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]  # 16 pairs in 4s
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
