"""Responses in AlpacaEval's format, and the commands of the benchmarks."""

from __future__ import annotations

import json
import shlex
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.cli.configuration import load_config
from fastpo.selfplay.export import ExportConfig, benchmark_commands, export

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is iron?"},
    {"role": "assistant", "content": "A metal."},
    {"role": "user", "content": "  And rust?\n"},
]
ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a fruit: é “x”\n", "responses": ["Plum.", "Fig."], "dataset": "koala"},
    {"prompt": CHAT, "responses": [""], "dataset": None},
    {"prompt": CHAT[1:2], "responses": ["Fe"]},
]
ENTRIES = [
    {"instruction": "Name a fruit: é “x”\n", "output": "Plum.", "generator": "mine", "dataset": "koala"},
    {"instruction": "  And rust?\n", "output": "", "generator": "mine", "dataset": "alpaca_eval",
     "context": CHAT[:3]},
    {"instruction": "What is iron?", "output": "Fe", "generator": "mine", "dataset": "alpaca_eval"},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_become_a_list_that_alpaca_eval_reads(tmp_path: Path, capsys: Any) -> None:
    responses = write(tmp_path / "rows.jsonl", ROWS)
    output = tmp_path / "new" / "out.json"
    export(ExportConfig(str(responses), str(output), "mine"))
    assert json.loads(output.read_text(encoding="utf-8")) == ENTRIES
    assert (
        output.read_text(encoding="utf-8")
        .splitlines()[1]
        .startswith('{"instruction": "Name a fruit: é')
    )
    assert capsys.readouterr().out == f"{output}: 3 outputs of mine\n"


def test_parquet_rows_and_the_commands_of_a_model(tmp_path: Path, capsys: Any) -> None:
    responses = write(tmp_path / "rows.parquet", ROWS[1:])
    output = tmp_path / "my out.json"
    export(ExportConfig(str(responses), str(output), "mine", "runs/my model"))
    assert json.loads(output.read_text(encoding="utf-8")) == ENTRIES[1:]
    first, *commands = capsys.readouterr().out.splitlines()
    assert first == f"{output}: 2 outputs of mine"
    assert commands == benchmark_commands("runs/my model", output)
    assert any(shlex.split(line)[:3] == ["alpaca_eval", "--model_outputs", str(output)] for line in commands
               if not line.startswith("#"))  # fmt: skip


def test_settings_come_from_a_file_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("responses: a.jsonl\noutput: b.json\n")
    config = load_config(ExportConfig, tmp_path / "c.yaml", ["--generator", "mine"], "eval-export")
    assert config == ExportConfig("a.jsonl", "b.json", "mine", None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"responses: .*rows\.jsonl has no rows"),
        ([ROWS[0], {"responses": ["a"]}], r"rows\.jsonl, line 2: no 'prompt'"),
        (
            [{"prompt": "a"}],
            r"line 1: 'responses' must be a list of texts, .* got None",
        ),
        ([{"prompt": "a", "responses": []}], r"line 1: no response"),
        (
            [{"prompt": CHAT[:1], "responses": ["a"]}],
            r"line 1: the prompt has no user's message",
        ),
    ],
)
def test_a_bad_row_is_named_and_nothing_written(
    rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    responses, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.json"
    output.write_text("before")
    with pytest.raises(ValueError, match=message):
        export(ExportConfig(str(responses), str(output), "mine"))
    assert output.read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "rows.jsonl"]


def test_a_missing_file_of_responses_is_named_and_no_directory_made(tmp_path: Path) -> None:
    config = ExportConfig(str(tmp_path / "none.jsonl"), str(tmp_path / "new" / "out.json"), "mine")
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.jsonl'"):
        export(config)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": "o.jsonl"}, r"output: got 'o\.jsonl', expected a file that ends in \.json "),
        (
            {"output": "x/../r.json"},
            r"output: got 'x/\.\./r\.json', expected another file than responses",
        ),
        ({"generator": " "}, r"generator: got ' ', expected a name"),
        (
            {"model": "a,b"},
            r"model: got 'a,b', expected a directory or name without a comma",
        ),
        ({"model": ""}, r"model: got ''"),
    ],
)
def test_bad_settings_are_named(values: dict[str, str], message: str) -> None:
    good = {"responses": "r.json", "output": "o.json", "generator": "mine"}
    with pytest.raises(ValueError, match=message):
        ExportConfig(**{**good, **values})


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, capsys: Any) -> None:
    row = json.dumps({"prompt": "word " * 100, "responses": ["word " * 200]})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 5_000)
    config = ExportConfig(str(tmp_path / "rows.jsonl"), str(tmp_path / "out.json"), "mine")
    tracemalloc.start()
    try:
        export(config)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(json.loads((tmp_path / "out.json").read_text())) == 5_000  # 8 MB
    assert peak < 1e6


# ---- Commands ----


def commands(model: str) -> list[list[str]]:
    """The words of every command, as a shell splits them."""
    lines = benchmark_commands(model, Path("o ut.json"))
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def test_the_harness_runs_the_leaderboard_of_both_papers() -> None:
    shots = {}
    for words in commands("org/model"):
        if words[0] == "lm_eval":
            flags = dict(zip(words[1::2], words[2::2], strict=True))
            shots[flags["--tasks"]] = int(flags["--num_fewshot"])
            assert flags["--model"] == "hf"
            assert flags["--model_args"] == "pretrained=org/model"
    assert shots == {
        "arc_challenge": 25,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "hellaswag": 10,
        "mmlu": 5,
    }


def test_alpaca_eval_and_arena_hard_follow() -> None:
    others = [words for words in commands("org/model") if words[0] != "lm_eval"]
    assert others[0] == [
        "alpaca_eval",
        "--model_outputs",
        "o ut.json",
        "--annotators_config",
        "weighted_alpaca_eval_gpt4_turbo",
    ]
    assert others[1] == ["vllm", "serve", "org/model"]
    assert [words[1] for words in others[2:]] == [
        "gen_answer.py",
        "gen_judgment.py",
        "show_result.py",
    ]


@pytest.mark.parametrize("model", ["my model", "a'b", "$(rm x)", "a;b", "a\nb"])
def test_a_model_is_one_word_to_the_shell(model: str) -> None:
    text = "\n".join(
        line for line in benchmark_commands(model, Path("o.json")) if line[0] != "#"
    )  # a newline in a name must not end the command
    words = shlex.split(text)
    assert words.count(f"pretrained={model}") == 6
    assert words.count(model) == 1


def test_the_home_directory_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert ["vllm", "serve", "/home/me/model"] in commands("~/model")
