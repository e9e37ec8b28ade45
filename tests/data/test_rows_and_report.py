"""Rows that cannot be used as they are, lengths, the account of both, arguments and repeatability."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fastpo.data import DataReport, tokenize_preferences
from fastpo.data.report import DROPPED, NOTED

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def tokenize(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> tuple[list[dict[str, Any]], DataReport]:
    """Results and report, whose counts must add up."""
    options.setdefault("max_length", 10_000)
    out, report = tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer, **options)
    assert out.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    assert report.rows == len(rows)
    assert report.kept == len(out) == len(rows) - sum(f.count for f in report.dropped.values())
    return out.to_list(), report


# --- lengths ---------------------------------------------------------------------------------------------

LONG = {"prompt": "One Two Three Be brief.", "chosen": " a longer answer", "rejected": " brief"}


@pytest.mark.parametrize("add_bos", [False, True])
def test_max_prompt_length_keeps_the_end(add_bos: bool, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    (long,), _ = tokenize([LONG], tokenizer)
    full, chosen, rejected = long["prompt_ids"], long["chosen_ids"], long["rejected_ids"]
    for limit in range(1, len(full) + 3):
        (result,), report = tokenize([LONG], tokenizer, max_prompt_length=limit)
        if limit >= len(full):
            expected = full
        elif add_bos and limit > 1:
            expected = [tokenizer.bos_token_id] + full[-(limit - 1) :]
        else:
            expected = full[-limit:]
        assert result["prompt_ids"] == expected
        assert (result["chosen_ids"], result["rejected_ids"]) == (chosen, rejected)
        assert ("prompt_shortened" in report.noted) == (limit < len(full))


def test_max_length_drops_what_does_not_fit_and_never_cuts(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    short = {"prompt": "Be", "chosen": " it", "rejected": " is"}
    swapped = {**LONG, "chosen": LONG["rejected"], "rejected": LONG["chosen"]}
    rows = [short, LONG, short, swapped]
    (long,), _ = tokenize([LONG], tokenizer)
    prompt, chosen, rejected = long["prompt_ids"], long["chosen_ids"], long["rejected_ids"]
    need = len(prompt) + max(len(chosen), len(rejected))
    results, report = tokenize(rows, tokenizer, max_length=need)
    assert [r["row"] for r in results] == [0, 1, 2, 3]
    assert (results[1]["prompt_ids"], results[1]["chosen_ids"]) == (prompt, chosen)
    results, report = tokenize(rows, tokenizer, max_length=need - 1)
    assert [r["row"] for r in results] == [0, 2]
    assert report.dropped["too_long"].count == 2
    assert report.dropped["too_long"].first_rows == [1, 3]
    # a shorter prompt makes room
    results, report = tokenize(
        rows, tokenizer, max_length=need - 1, max_prompt_length=len(prompt) - 1
    )
    assert [r["row"] for r in results] == [0, 1, 2, 3]
    assert (results[1]["prompt_ids"], results[1]["chosen_ids"]) == (prompt[1:], chosen)
    assert report.noted["prompt_shortened"].first_rows == [1, 3]
    unbounded, _ = tokenize(rows, tokenizer, max_length=None)
    assert len(unbounded) == 4


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_length": 0}, r"max_length: got 0, expected a number of tokens ≥ 1"),
        ({"max_length": 10.0}, r"max_length: got 10\.0"),
        ({"max_length": True}, r"max_length: got True"),
        ({"max_length": 10, "max_prompt_length": -1}, r"max_prompt_length: got -1"),
        (
            {"max_length": 10, "max_prompt_length": 10},
            r"max_prompt_length: got 10, expected less than max_length",
        ),
    ],
)
def test_bad_lengths(lengths: dict[str, Any], message: str, make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize([LONG], make_tokenizer(), **lengths)


# --- rows without a preference, and the report -----------------------------------------------------------


def test_unusable_rows_are_counted_and_named(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    good = {"prompt": "Is it?", "chosen": " It is.", "rejected": " No"}
    rows = [
        {**good, "rejected": " It is."},
        {**good, "rejected": " It is.</s>"},  # the same once EOS is there
        {**good, "chosen": ""},
        good,
        {**good, "rejected": " \n"},
        {**good, "rejected": "</s>"},
        {"prompt": "", "chosen": "It is.", "rejected": "No"},  # no BOS: nothing precedes the answer
        {**good, "chosen": " It" * 50},
        good,
    ]
    results, report = tokenize(rows, tokenizer, max_length=40, source="prefs.jsonl")
    assert [r["row"] for r in results] == [3, 8]
    assert {key: (f.count, f.first_rows) for key, f in report.dropped.items()} == {
        "equal_answers": (2, [0, 1]),
        "empty_answer": (3, [2, 4, 5]),
        "no_prompt": (1, [6]),
        "too_long": (1, [7]),
    }
    text = str(report)
    assert text.splitlines()[0] == "prefs.jsonl: 9 rows, 2 kept"
    assert "2  chosen equals rejected (rows 0, 1)" in text
    assert "3  an answer is empty (rows 2, 4, 5)" in text
    lengths = [len(r["chosen_ids"]) for r in results]
    counts = report.tokens["chosen"]
    assert (counts.total, counts.min, counts.mean, counts.median, counts.max) == (
        sum(lengths), min(lengths), sum(lengths) / 2, sum(lengths) / 2, max(lengths),
    )  # fmt: skip
    assert json.loads(json.dumps(report.to_dict()))["dropped"]["too_long"] == {
        "count": 1,
        "first_rows": [7],
        "detail": "",
    }


def test_unusable_conversations(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("gemma")
    ask = [user("Is it?")]
    good = {"prompt": ask, "chosen": [assistant("It is.")], "rejected": [assistant("No")]}
    rows = [
        {**good, "rejected": [assistant("It is.")]},
        {**good, "chosen": [assistant(" \n")]},  # Gemma's <end_of_turn> still follows it
        {**good, "chosen": []},
        {
            "prompt": [],
            "chosen": [user("Is it?"), assistant("It is.")],
            "rejected": [user("What?"), assistant("No")],
        },
        {"prompt": [], "chosen": [assistant("It is.")], "rejected": [assistant("No")]},
        good,
        {
            "prompt": [],
            "chosen": ask + [assistant("One")],
            "rejected": ask + [assistant("One"), user("x"), assistant("Two")],
        },
    ]
    results, report = tokenize(rows, tokenizer)
    assert [r["row"] for r in results] == [5, 6]
    assert {key: f.first_rows for key, f in report.dropped.items()} == {
        "equal_answers": [0],
        "empty_answer": [1, 2],
        "no_common_prompt": [3],
        "no_prompt": [4],
    }
    # an answer that continues the other one: both keep the assistant's first turn
    assert tokenizer.decode(results[1]["chosen_ids"]) == "One<end_of_turn>\n</s>"
    assert tokenizer.decode(results[1]["rejected_ids"]).startswith(
        "One<end_of_turn>\n<start_of_turn>user\nx"
    )


def test_a_template_that_refuses_a_row_is_counted(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        + tokenizer.chat_template
    )
    good = {
        "prompt": [user("Is it?")],
        "chosen": [assistant("It is.")],
        "rejected": [assistant("No")],
    }
    system = {**good, "prompt": [{"role": "system", "content": "Be brief."}, user("Is it?")]}
    results, report = tokenize([good, system], tokenizer)
    assert [r["row"] for r in results] == [0]
    assert report.dropped["template_error"].first_rows == [1]
    assert "no system role here" in str(report)
    tokenizer.chat_template = (
        "{{ messages[0]['role'] }}"  # would make the answers equal, but they are not
    )
    with pytest.raises(ValueError, match="it renders chosen and rejected alike"):
        tokenize([good], tokenizer)


def test_answer_of_white_space_alone_is_empty(make_tokenizer: MakeTokenizer) -> None:
    good = {"prompt": None, "chosen": "Is it? It is.", "rejected": "Is it? No"}
    rows = [
        good,
        {**good, "rejected": "Is it?\n \n"},  # implicit prompt
        {**good, "rejected": "Is it?"},
        {"prompt": "Is it?", "chosen": " It is.", "rejected": " \n</s>"},
    ]
    results, report = tokenize(rows, make_tokenizer())
    assert [r["row"] for r in results] == [0]
    assert report.dropped["empty_answer"].first_rows == [1, 2, 3]


def test_empty_prompt_with_bos_is_noted(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    (result,), report = tokenize([{"prompt": "", "chosen": "It is.", "rejected": "No"}], tokenizer)
    assert result["prompt_ids"] == [tokenizer.bos_token_id]
    assert report.noted["empty_prompt"].count == 1


def test_nothing_left_is_an_error_with_the_counts(make_tokenizer: MakeTokenizer) -> None:
    rows = [{**LONG, "rejected": LONG["chosen"]}] * 7 + [LONG]
    with pytest.raises(ValueError) as info:  # noqa: PT011
        tokenize(rows, make_tokenizer(), max_length=5, source="prefs.jsonl")
    assert str(info.value).splitlines()[1] == "prefs.jsonl: 8 rows, 0 kept"
    assert "7  chosen equals rejected (rows 0, 1, 2, 3, 4, …)" in str(info.value)
    assert "1  prompt and the longer answer exceed max_length (row 7)" in str(info.value)


def test_bad_arguments(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    chat = {"prompt": [user("x")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(
        ValueError,
        match=r"chat_template: prefs, row 0 \(from 0\) is a conversation.*set `chat_template`",
    ):
        tokenize([chat], tokenizer, source="prefs")
    with pytest.raises(ValueError, match=r"prefs, row 1 \(from 0\): no 'rejected'"):
        tokenize([LONG, {**LONG, "rejected": None}], tokenizer, source="prefs")
    with pytest.raises(
        ValueError,
        match=r"prefs: no column 'rejected', the columns are \['prompt', 'bad', 'chosen'\]",
    ):
        tokenize([{"prompt": "a", "bad": "b", "chosen": "c"}], tokenizer, source="prefs")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([LONG])})
    with pytest.raises(TypeError, match=r"dataset: got DatasetDict, expected a datasets\.Dataset"):
        tokenize_preferences(splits, tokenizer, max_length=100)  # type: ignore[arg-type]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: it has no eos_token"):
        tokenize([LONG], tokenizer)


def test_every_reason_has_a_meaning() -> None:
    source = Path(importlib.util.find_spec("fastpo.data.tokenization").origin).parent
    code = (source / "tokenization.py").read_text() + (source / "formats.py").read_text()
    for reason in {**DROPPED, **NOTED}:
        assert f'"{reason}"' in code


# --- determinism and processes ---------------------------------------------------------------------------


def test_no_stale_cache_and_processes_agree(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [user(f"{k} + 1")],
            "chosen": [assistant(f"{k + 1}")],
            "rejected": [assistant("x")],
        }
        for k in range(40)
    ]
    rows[7]["chosen"] = rows[7]["rejected"]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    dataset = datasets.load_from_disk(str(tmp_path / "saved"))  # memory-mapped: map would cache it
    tokenizer = make_tokenizer("chatml")
    first, report = tokenize_preferences(dataset, tokenizer, max_length=100)
    again, _ = tokenize_preferences(dataset, tokenizer, max_length=100)
    assert again.to_list() == first.to_list()
    assert not list((tmp_path / "saved").glob("cache-*"))
    two, report_two = tokenize_preferences(dataset, tokenizer, max_length=100, num_proc=2)
    assert two.to_list() == first.to_list()
    assert report_two == report
    tokenizer.chat_template = "Be brief. " + tokenizer.chat_template
    other, _ = tokenize_preferences(dataset, tokenizer, max_length=100)
    assert tokenizer.decode(other[0]["prompt_ids"]).startswith("Be brief. <|im_start|>user")
    longest = max(
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in other
    )
    shorter, report = tokenize_preferences(dataset, tokenizer, max_length=longest - 1)
    assert len(shorter) < len(other)
    assert report.dropped["too_long"].count == len(other) - len(shorter)
