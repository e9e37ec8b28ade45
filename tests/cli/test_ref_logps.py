"""`fastpo ref-logps`: a file that any reader opens, and that a training run takes instead of a reference."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.cli import main
from fastpo.data import load_preferences, tokenize_preferences
from fastpo.trainer import PreferenceTrainer, reference

ROOT = Path(__file__).parents[2]
DPO = {"loss_type": "dpo", "beta": 0.1, "margin": "fixed", "simpo_gamma": None, "plot_loss": False}


@pytest.fixture
def dpo(write_config: Callable[..., Path]) -> Callable[..., str]:
    """Write the YAML of a DPO run; keywords replace or add fields."""
    return lambda **changes: str(write_config(**(DPO | changes)))


@pytest.fixture(scope="session")
def shared_file(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log-probs of ``start``'s pairs under its model."""
    path = tmp_path_factory.mktemp("reference") / "ref.parquet"
    settings = [
        f"--{name}={value}"
        for name, value in (
            ("model_name_or_path", start / "model"), ("dataset", start / "prefs.jsonl"),
            ("max_length", 64), ("use_cpu", True), ("output", path), ("disable_tqdm", True),
        )
    ]  # fmt: skip
    assert main(["ref-logps", *settings]) == 0
    return path


def edited(path: Path, target: Path, **fields: Any) -> Path:
    """The file with other fields in its metadata."""
    table = pq.read_table(path)
    said = json.loads(table.schema.metadata[b"fastpo"]) | fields
    pq.write_table(table.replace_schema_metadata({b"fastpo": json.dumps(said)}), target)
    return target


def losses(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [line["loss"] for line in log if "loss" in line]


def test_what_the_file_holds(start: Path, shared_file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    model = AutoModelForCausalLM.from_pretrained(start / "model", dtype="float32")
    rows, _ = tokenize_preferences(
        load_preferences(start / "prefs.jsonl"), tokenizer, max_length=64
    )
    table = pq.read_table(shared_file)
    assert table.schema.names == [
        "row_hash", "ref_chosen_logps", "ref_rejected_logps", "chosen_tokens", "rejected_tokens",
    ]  # fmt: skip
    assert table.schema.field("ref_chosen_logps").type == pa.float64()
    by_key = {row["row_hash"]: row for row in table.to_pylist()}
    assert list(by_key) == sorted(by_key)
    assert len(by_key) == len(rows) == 16
    for row in rows:
        ids = [row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")]
        numbers = np.array([*map(len, ids), *(n for part in ids for n in part)], dtype="<i4")
        found = by_key[hashlib.sha256(numbers.tobytes()).hexdigest()]
        for name, answer in (("chosen", ids[1]), ("rejected", ids[2])):
            whole = torch.tensor([ids[0] + answer])
            with torch.no_grad():
                logps = model(whole).logits[0].double().log_softmax(-1)
            places = torch.arange(len(ids[0]) - 1, whole.shape[1] - 1)
            expected = logps[places, torch.tensor(answer)].sum().item()
            assert found[f"ref_{name}_logps"] == pytest.approx(expected, abs=1e-4)
            assert found[f"{name}_tokens"] == len(answer)
    said = json.loads(table.schema.metadata[b"fastpo"])
    assert said["model_hash"] == reference.model_hash(model)
    assert (said["max_length"], said["max_prompt_length"], said["precision"]) == (64, None, "no")


def test_a_run_with_the_file_is_the_run_with_the_reference(
    dpo: Callable[..., str], start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "ref.parquet")
    held_out = {"eval_dataset": str(start / "prefs.jsonl"), "eval_strategy": "epoch"}
    live = dpo(**held_out)
    assert main(["train", "--config", live]) == 0
    assert main(["ref-logps", "--config", live, "--output", file]) == 0

    calls = []
    monkeypatch.setattr(
        PreferenceTrainer, "_reference_logps", lambda *_: calls.append(1) or pytest.fail("ran")
    )
    # Another order of the rows: their places in the file mean nothing.
    lines = (start / "prefs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(random.Random(3).sample(lines, len(lines))), encoding="utf-8")
    given = ["--ref_logps", file, "--eval_dataset", str(shuffled)]
    assert main(["train", "--config", live, *given, "--output_dir", str(tmp_path / "given")]) == 0
    assert losses(tmp_path / "given") == pytest.approx(losses(tmp_path / "run"), abs=1e-6)
    evaluations = [
        json.loads((tmp_path / run / "eval_results.json").read_text()) for run in ("run", "given")
    ]
    margins = [metrics["eval_rewards/margins"] for metrics in evaluations]
    assert margins[0] == pytest.approx(margins[1], abs=1e-6)
    assert abs(margins[0]) > 1e-5
    assert not calls


def test_the_base_of_an_adapter_is_the_same_reference(
    dpo: Callable[..., str], shared_file: Path
) -> None:
    peft = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert main(["train", "--config", dpo(peft=peft, ref_logps=str(shared_file))]) == 0


def test_the_run_itself_may_name_the_output(
    dpo: Callable[..., str], start: Path, tmp_path: Path, shared_file: Path
) -> None:
    """Rows that stand twice, or in both data sets, are computed and written once."""
    lines = (start / "prefs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join([*lines[4:], *lines[:10]]), encoding="utf-8")
    path = tmp_path / "deep/er/ref.parquet"
    config = dpo(dataset=str(twice), eval_dataset=str(start / "prefs.jsonl"), ref_logps=str(path))
    assert main(["ref-logps", "--config", config]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["ref.parquet"]
    one, other = pq.read_table(path), pq.read_table(shared_file)
    assert one["row_hash"] == other["row_hash"]
    for name in reference.COLUMNS:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5)


@pytest.fixture
def refusal(dpo: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `fastpo train` says when it refuses a run with these settings."""

    def say(**changes: Any) -> str:
        assert main(["train", "--config", dpo(**changes)]) == 2
        return capsys.readouterr().err

    return say


def test_a_row_that_is_missing_is_named(
    refusal: Callable[..., str], start: Path, tmp_path: Path, shared_file: Path
) -> None:
    lines = (start / "prefs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for k in (3, 7):
        lines[k] = lines[k].replace("it is", "it was")
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(lines), encoding="utf-8")
    said = refusal(dataset=str(changed), ref_logps=str(shared_file))
    assert "lacks 2 of the 16 rows of the data set 'train', the first: 3, 7 (from 0)" in said
    assert "was made" not in said  # alike tokenised, so there is nothing to explain


def test_another_tokenisation_is_told(
    refusal: Callable[..., str], start: Path, shared_file: Path
) -> None:
    template = AutoTokenizer.from_pretrained(start / "model").chat_template
    said = refusal(ref_logps=str(shared_file), chat_template="{# other #}x" + template)
    assert "lacks 16 of the 16 rows" in said
    assert "0, 1, 2, 3, 4, … (from 0); the file was made with another chat template\n" in said
    said = refusal(ref_logps=str(shared_file), max_prompt_length=4)
    assert "the file was made with max_prompt_length None, here it is 4" in said


def test_another_model_is_told(
    refusal: Callable[..., str], start: Path, tmp_path: Path, shared_file: Path
) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(start / "model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-3
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(start / "model").save_pretrained(other)
    for changes in (
        {"model_name_or_path": str(other)},
        {"ref_model_name_or_path": str(other)},
        {"dtype": "bfloat16"},
    ):
        said = refusal(ref_logps=str(shared_file), **changes)
        assert "was computed with another model than this run's reference" in said
    # The start may be another model where the reference is the file's.
    config = {"model_name_or_path": str(other), "ref_model_name_or_path": str(start / "model")}
    assert main(["train", "--config", str(_config(tmp_path, start, shared_file, config))]) == 0


def _config(tmp_path: Path, start: Path, file: Path, changes: dict[str, Any]) -> Path:
    import yaml

    settings = DPO | changes | {
        "dataset": str(start / "prefs.jsonl"), "max_length": 64, "use_cpu": True, "max_steps": 1,
        "output_dir": str(tmp_path / "other-run"), "save_strategy": "no", "ref_logps": str(file),
    }  # fmt: skip
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.mark.parametrize("damage", ["truncated", "number", "key", "foreign", "text", "absent"])
def test_a_damaged_or_foreign_file_is_refused(
    damage: str, refusal: Callable[..., str], tmp_path: Path, shared_file: Path
) -> None:
    path = tmp_path / "bad.parquet"
    table = pq.read_table(shared_file)
    if damage == "truncated":
        path.write_bytes(shared_file.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no Parquet at all", encoding="utf-8")
    elif damage == "foreign":
        pq.write_table(table.replace_schema_metadata(None), path)
    elif damage in ("number", "key"):
        name = {"number": "ref_rejected_logps", "key": "row_hash"}[damage]
        values = table[name].to_pylist()
        values[5] = values[5] + 1e-6 if damage == "number" else "0" * 64
        column = pa.array(values, type=table.schema.field(name).type)
        at = table.schema.get_field_index(name)
        pq.write_table(table.set_column(at, table.schema.field(name), column), path)
    said = refusal(ref_logps=str(path))
    expected = {
        "truncated": "not a readable Parquet file", "text": "not a readable Parquet file",
        "foreign": "expected a file that `fastpo ref-logps` wrote", "absent": "no file",
    }.get(damage, "is damaged")  # fmt: skip
    assert f"ref_logps: {'no file ' if damage == 'absent' else str(path)}" in said
    assert expected in said


def test_settings_that_exclude_each_other(
    refusal: Callable[..., str], shared_file: Path, write_config: Callable[..., Path], capsys
) -> None:
    file = str(shared_file)
    assert "precompute_ref_log_probs: got True, expected False beside ref_logps" in refusal(
        ref_logps=file, precompute_ref_log_probs=True
    )
    assert "expected None with method 'dnpo'" in refusal(ref_logps=file, method="dnpo")
    # A loss without a reference says that the file does nothing, and does not read it.
    assert main(["train", "--config", str(write_config(ref_logps="nowhere.parquet"))]) == 0
    assert "precompute_ref_log_probs and ref_logps have no effect" in capsys.readouterr().err


def test_another_precision_is_warned_of(
    dpo: Callable[..., str], tmp_path: Path, shared_file: Path, capsys
) -> None:
    bf16 = edited(shared_file, tmp_path / "bf16.parquet", precision="bf16")
    assert main(["train", "--config", dpo(ref_logps=str(bf16), max_steps=1)]) == 0
    assert "computed with mixed precision 'bf16', this run has 'no'" in capsys.readouterr().err


def test_the_command_names_what_it_misses(dpo: Callable[..., str], tmp_path: Path, capsys) -> None:
    assert main(["ref-logps", "--config", dpo()]) == 2
    assert "output: got None, expected the Parquet file" in capsys.readouterr().err
    assert main(["ref-logps", "--config", dpo(), "--output", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert main(["ref-logps", "--help"]) == 0
    assert "the Parquet file to write" in capsys.readouterr().out


def test_two_processes_write_what_one_writes(
    dpo: Callable[..., str], tmp_path: Path, shared_file: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "two.parquet"
    command = [
        sys.executable, "-m", "fastpo.cli", "ref-logps", "--config", dpo(),
        "--output", str(path), "--per_device_eval_batch_size", "3", "--ddp_backend", "gloo",
    ]  # fmt: skip
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    assert [str(path) in said for said in outputs] == [True, False]
    one, two = pq.read_table(shared_file), pq.read_table(path)
    assert one["row_hash"] == two["row_hash"]
    for name in reference.COLUMNS:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-5)
