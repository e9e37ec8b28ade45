"""Files, directories and data sets → rows; every kind of bad input names its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastpo.data import load_preferences

PLAIN = [
    {"prompt": f"question {k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(4)
]


def ultrafeedback_row(k: int) -> dict[str, Any]:
    user = {"role": "user", "content": f"question {k}"}
    chosen = [user, {"role": "assistant", "content": f"good {k}"}]
    return {
        "prompt": f"question {k}",
        "prompt_id": f"{k:064x}",
        "chosen": chosen,
        "rejected": [user, {"role": "assistant", "content": f"bad {k}"}],
        "messages": chosen,
        "score_chosen": 8 if k % 2 else 7.5,  # JSON writes these as int and float
        "score_rejected": None if k == 2 else "6",  # another column's types may clash freely
    }


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def wanted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


@pytest.mark.parametrize(
    "rows", [PLAIN, [ultrafeedback_row(k) for k in range(4)]], ids=["plain", "ultra"]
)
@pytest.mark.parametrize(
    "form", ["lines", "lines.json", "array", "bom", "parquet", "dir", "saved", "splits"]
)
def test_every_source_gives_all_rows_in_order(
    rows: list[dict[str, Any]], form: str, tmp_path: Path
) -> None:
    path = tmp_path / "prefs.jsonl"
    if form == "lines":
        write_lines(path, [*rows[:2], "", "   ", *rows[2:]])  # blank lines are no rows
    elif form == "lines.json":
        path = write_lines(tmp_path / "prefs.json", rows)
    elif form == "array":
        path = tmp_path / "prefs.json"
        path.write_text("\n " + json.dumps(rows, indent=2))
    elif form == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    elif form == "parquet":
        path = tmp_path / "prefs.parquet"
        fit = [{**row, "score_rejected": 1.0, "score_chosen": 1.0} for row in rows]
        pq.write_table(pa.Table.from_pylist(fit), path)
    elif form == "dir":
        path = tmp_path / "parts"
        (path / "more").mkdir(parents=True)
        (path / "README.md").write_text("not data")
        (path / ".cache.jsonl").write_text("not data")
        write_lines(path / "b.jsonl", rows[2:3])
        write_lines(path / "a.jsonl", rows[:2])
        pq.write_table(pa.Table.from_pylist(wanted(rows[3:])), path / "more" / "c.parquet")
    else:
        path = tmp_path / "saved"
        dataset = datasets.Dataset.from_list(wanted(rows))
        if form == "splits":
            datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
        else:
            dataset.select([3, 2, 1, 0]).select([3, 2, 1, 0]).save_to_disk(path)
    loaded = load_preferences(path)
    assert isinstance(loaded, datasets.Dataset)
    assert loaded.to_list() == wanted(rows)
    assert load_preferences(str(path), split="train").to_list() == wanted(rows)


def test_splits_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, row in (
        ("train_prefs-00000-of-00002", 0),
        ("train_prefs-00001-of-00002", 1),
        ("test_prefs", 2),
    ):
        pq.write_table(pa.Table.from_pylist([PLAIN[row]]), tmp_path / "data" / f"{name}.parquet")
    assert load_preferences(tmp_path, split="train_prefs").to_list() == PLAIN[:2]
    assert load_preferences(tmp_path, split="test_prefs").to_list() == PLAIN[2:3]
    with pytest.raises(
        ValueError, match=r"split: .*has \['test_prefs', 'train_prefs'\]; say which one"
    ):
        load_preferences(tmp_path)
    with pytest.raises(ValueError, match=r"has \['test_prefs', 'train_prefs'\], got 'train'"):
        load_preferences(tmp_path, split="train")
    write_lines(tmp_path / "train.jsonl", PLAIN[3:])
    assert load_preferences(tmp_path).to_list() == PLAIN[3:]


def test_a_file_is_the_split_train(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prefs.jsonl", PLAIN)
    with pytest.raises(ValueError, match=r"split: .*prefs\.jsonl has \['train'\], got 'test'"):
        load_preferences(path, split="test")


def test_tools_and_tool_calls_keep_what_arrow_would_change(tmp_path: Path) -> None:
    tools = [
        {"name": "add", "parameters": {"a": {"type": "int"}}},
        {"name": "now", "parameters": {}},
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": "one"}}}
    user = {"role": "user", "content": "x"}
    rows = [
        {
            "prompt": [user],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [a_call]}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "tools": tools,
        }
        for a_call in (call, other)
    ]
    loaded = load_preferences(write_lines(tmp_path / "prefs.jsonl", rows))
    assert [json.loads(row["tools"]) for row in loaded] == [tools, tools]
    arguments = [row["chosen"][0]["tool_calls"][0]["function"]["arguments"] for row in loaded]
    assert [json.loads(text) for text in arguments] == [{"a": 1, "b": None}, {"a": "one"}]


# --- bad input -------------------------------------------------------------------------------------------


def test_missing_file_names_it_and_the_nearest(tmp_path: Path) -> None:
    write_lines(tmp_path / "preferences.jsonl", PLAIN)
    with pytest.raises(FileNotFoundError) as info:
        load_preferences(tmp_path / "preference.jsnl.jsonl")
    assert str(tmp_path / "preference.jsnl.jsonl") in str(info.value)
    assert str(tmp_path / "preferences.jsonl") in str(info.value)
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nowhere"):
        load_preferences(tmp_path / "nowhere" / "prefs.jsonl")
    with pytest.raises(FileNotFoundError, match=r"\./prefs_that_are_not"):
        load_preferences("./prefs_that_are_not")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty' holds no file that ends in \.jsonl"):
        load_preferences(tmp_path / "empty")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a", "chosen": "b", ', r"not valid JSON: .* at column 3[0-9]"),
        ("{'prompt': 'a'}", r"not valid JSON: .*double quotes"),
        ("[1, 2]", r"expected a JSON object, got list"),
        ('{"prompt": "a", "chosen": "b"}', r"no 'rejected' \(the row has 'prompt', 'chosen'\)"),
        ('{"prompt": "a", "chosen": null, "rejected": "b"}', r"no 'chosen'"),
        (
            '{"prompt": "a", "chosen": 3, "rejected": "b"}',
            r"chosen must be a string or a list .* got int",
        ),
        (
            '{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]}',
            r"both be strings or both be lists of messages, got a string and a list of messages",
        ),
        (
            '{"prompt": "a", "chosen": ["b"], "rejected": ["c"]}',
            r"chosen\[0\] must be a message .* got str",
        ),
        (
            '{"prompt": "a", "chosen": [{"from": "gpt", "value": "x"}], "rejected": []}',
            r"chosen\[0\] must be a message .*got \['from', 'value'\]",
        ),
        (
            '{"prompt": "a", "chosen": [{"role": "user", "content": [{"type": "image"}]}], "rejected": []}',
            r"chosen\[0\]\.content must be text, got \{'type': 'image'\}",
        ),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}',
            r"prompt is a list of messages, so chosen and rejected must be",
        ),
        (
            '{"chosen": "b", "rejected": "c"}',
            r"prompt and chosen are absent and text, but text and text in .*line 1",
        ),
        ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "b"}', r"not valid UTF-8 text"),
    ],
)
def test_bad_json_line_names_file_and_line(line: str, problem: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "prefs.jsonl", [PLAIN[0], "", PLAIN[1], line, PLAIN[2]])
    with pytest.raises(ValueError, match=problem) as info:
        load_preferences(path)
    assert str(info.value).startswith(f"{path}, line 4: ")


def test_bad_bytes_and_bad_arrays_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(json.dumps(PLAIN[0]).encode() + b'\n{"chosen": "\xff", "rejected": "b"}\n')
    with pytest.raises(ValueError, match=r"prefs\.jsonl, line 2: not valid UTF-8 text"):
        load_preferences(path)
    array = tmp_path / "prefs.json"
    array.write_text(json.dumps(PLAIN, indent=1).replace('"bad 0"\n', '"bad 0",\n'))
    with pytest.raises(ValueError, match=r"prefs\.json, line [56]: not valid JSON"):
        load_preferences(array)
    array.write_text(json.dumps([*PLAIN, {"chosen": "a"}]))
    with pytest.raises(ValueError, match=r"prefs\.json, row 4 \(from 0\): no 'rejected'"):
        load_preferences(array)
    for empty in ("", "\n\n", "[]"):
        array.write_text(empty)
        with pytest.raises(ValueError, match=r"prefs\.json: no rows"):
            load_preferences(array)


def test_bad_parquet_names_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    pq.write_table(pa.Table.from_pylist([*PLAIN[:2], {**PLAIN[2], "rejected": None}]), path)
    with pytest.raises(ValueError, match=r"prefs\.parquet, row 2 \(from 0\): no 'rejected'"):
        load_preferences(path)
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "chosen": "b"}]), path)
    with pytest.raises(
        ValueError,
        match=r"prefs\.parquet: no column 'rejected', the columns are \['prompt', 'chosen'\]",
    ):
        load_preferences(path)
    path.write_bytes(b"PAR1 and nothing of use")
    with pytest.raises(ValueError, match=r"prefs\.parquet: not a readable Parquet file"):
        load_preferences(path)
    text = tmp_path / "prefs.csv"
    text.write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"prefs\.csv: expected a file that ends in .*got '\.csv'"):
        load_preferences(text)


# --- the Hub ---------------------------------------------------------------------------------------------


def test_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    dataset = datasets.Dataset.from_list([ultrafeedback_row(1)])

    def load_dataset(name: str, split: str | None = None) -> Any:
        asked.append((name, split))
        parts = datasets.DatasetDict({"train_prefs": dataset, "test_prefs": dataset})
        return parts[split] if split else parts

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_preferences("someone/ultrafeedback_binarized", split="train_prefs")
    assert asked == [("someone/ultrafeedback_binarized", "train_prefs")]
    assert loaded.to_list() == wanted([ultrafeedback_row(1)])
    with pytest.raises(
        ValueError, match=r"someone/ultra has \['test_prefs', 'train_prefs'\]; say which one"
    ):
        load_preferences("someone/ultra")


def test_unknown_hub_name_is_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str | None = None) -> Any:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        FileNotFoundError, match=r"no file or directory 'someone/typo'.*doesn't exist on the Hub"
    ):
        load_preferences("someone/typo")


def test_import_fastpo_does_not_import_datasets() -> None:
    code = "import fastpo, sys; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
