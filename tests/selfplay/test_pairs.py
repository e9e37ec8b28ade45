"""Pairs of every rule against tables made by hand, and every reason why a row makes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selfplay_files import read_jsonl, write_jsonl

from fastpo.cli import main
from fastpo.data import load_preferences
from fastpo.selfplay.manifest import load_manifest
from fastpo.selfplay.pairs import PairsConfig, make_pairs

# completion, its score, responses, scores → chosen, rejected, source, or the reason; by rule, threshold 0.25
TABLE: dict[str, list[tuple[Any, ...]]] = {
    "spin": [
        ("right", None, ["wrong"], None, ("right", "wrong", "completion")),
        ("right", None, ["right "], None, "equal_answers"),
        ("right", None, [" "], None, "empty_answer"),
    ],
    "dsl": [
        ("human", 0.9, ["made"], [0.5], ("human", "made", "completion")),
        ("human", 0.2, ["made"], [0.5], ("made", "human", "response 0")),
        ("human", 0.5, ["made"], [0.75], "small_gap"),  # a gap of just the threshold
        ("human", 0.75, ["made"], [0.5], "small_gap"),
        ("human", 0.5, ["made"], [0.5], "small_gap"),
        ("same", 0.1, ["same"], [0.9], "equal_answers"),
        ("human", 0.1, [""], [0.9], "empty_answer"),
        ("human", -3.0, ["made"], [-2.5], ("made", "human", "response 0")),
    ],
    "best_worst": [
        (None, None, ["a", "b", "c"], [0.5, 0.9, 0.1], ("b", "c", "response 1")),
        (None, None, ["a", "b", "c"], [0.1, 0.5, 0.2], ("b", "a", "response 1")),
        (None, None, ["a", "b"], [0.5, 0.6], "small_gap"),
        (None, None, ["a", "a"], [0.0, 1.0], "equal_answers"),
    ],
    "ordered": [
        (None, None, ["improved", "first"], [0.9, 0.1], ("improved", "first", "response 0")),
        (None, None, ["improved", "first"], [0.1, 0.9], "small_gap"),
        (None, None, ["improved", "first"], [0.35, 0.1], "small_gap"),
    ],
}  # fmt: skip


def rows_of(rule: str) -> list[dict[str, Any]]:
    rows = []
    for k, (completion, completion_score, responses, scores, _) in enumerate(TABLE[rule]):
        row: dict[str, Any] = {"prompt": f"question {k}", "responses": responses, "scores": scores}
        row |= {"completion": completion, "completion_score": completion_score}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


@pytest.mark.parametrize("rule", TABLE)
@pytest.mark.parametrize("chat", [False, True])
def test_rules_by_hand(rule: str, chat: bool, tmp_path: Path) -> None:
    rows = rows_of(rule)
    if chat:
        for row in rows:
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            if "completion" in row:
                row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    scored = write_jsonl(tmp_path / "scored.jsonl", rows)
    out = tmp_path / "pairs.jsonl"
    manifest = make_pairs(PairsConfig(str(scored), str(out), rule, threshold=0.25))
    expected = [
        (k, *outcome) for k, (*_, outcome) in enumerate(TABLE[rule]) if isinstance(outcome, tuple)
    ]
    got = read_jsonl(out)
    assert len(got) == len(expected)
    for pair, (k, chosen, rejected, source) in zip(got, expected, strict=True):
        assert pair["prompt"] == rows[k]["prompt"]
        wrap = (lambda t: [{"role": "assistant", "content": t}]) if chat else (lambda t: t)
        assert pair["chosen"] == wrap(chosen)
        assert pair["rejected"] == wrap(rejected)
        assert pair["chosen_source"] == source
        if rule != "spin":
            assert pair["chosen_score"] - pair["rejected_score"] > 0.25
    reasons = [outcome for *_, outcome in TABLE[rule] if isinstance(outcome, str)]
    for reason in set(reasons):
        assert manifest.counts[reason] == reasons.count(reason)
    winners = sum(source != "completion" for *_, source in expected)
    assert manifest.counts.get("response_chosen", 0) == winners
    assert len(load_preferences(out)) == len(expected)


def test_repetitive_answers_make_no_pair(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["one two three four", bad], "scores": [1, 0]}
        for bad in ("five six", "ha " * 40)
    ]
    scored = write_jsonl(tmp_path / "s.jsonl", rows)
    config = PairsConfig(str(scored), str(tmp_path / "o.jsonl"), "ordered", max_repetition=0.5)
    assert make_pairs(config).counts == {"in": 2, "out": 1, "repetitive": 1, "response_chosen": 1}


def test_of_too_many_pairs_a_fair_share_is_drawn_and_the_same_every_time(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{k}", "responses": ["a", "b"], "scores": [float(k % 3), 0.0]}
        for k in range(300)
    ]
    scored = write_jsonl(tmp_path / "s.jsonl", rows)
    taken = []
    for seed in (0, 0, 1):
        out = tmp_path / f"o{len(taken)}.jsonl"
        config = PairsConfig(str(scored), str(out), "ordered", max_pairs=50, seed=seed)
        counts = make_pairs(config).counts
        assert counts == {
            "in": 300, "out": 50, "small_gap": 100, "over_max_pairs": 150, "response_chosen": 50,
        }  # fmt: skip
        taken.append([row["prompt"] for row in read_jsonl(out)])
    assert taken[0] == taken[1] != taken[2]
    numbers = [int(p[1:]) for p in taken[0]]
    assert numbers == sorted(numbers)
    assert 70 < sum(numbers) / 50 < 230  # 150 ± 6 deviations of the mean
    config = PairsConfig(str(scored), str(tmp_path / "all.jsonl"), "ordered", max_pairs=200)
    assert make_pairs(config).counts["out"] == 200


@pytest.mark.parametrize(
    ("rule", "row", "message"),
    [
        ("spin", {"prompt": "p", "responses": ["a"]}, "line 1: no answer, expected a column 'completion'"),
        ("spin", {"prompt": "p", "completion": "c"}, "line 1: 'responses' must be a list of texts"),
        ("dsl", {"prompt": "p", "completion": "c", "responses": ["a"]}, "line 1: 'scores' must be 1 numbers"),
        ("dsl", {"prompt": "p", "completion": "c", "responses": ["a"], "scores": [1]}, "no 'completion_score'"),
        ("best_worst", {"prompt": "p", "responses": ["a"], "scores": [1]}, "needs 2 responses, the row has 1"),
        ("ordered", {"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "'scores' must be 2 numbers"),
        ("ordered", {"prompt": "p", "responses": ["a", "b"], "scores": [1, None]},
         r"line 1: score of response 1 \(from 0\) is None, expected a finite number"),
        ("best_worst", {"prompt": "p", "responses": ["a", "b"], "scores": ["1", 2]}, r"0 \(from 0\) is '1'"),
        ("dsl", {"prompt": "p", "completion": "c", "responses": ["a"], "scores": [1], "completion_score": True},
         "completion_score is True, expected a finite number"),
    ],
)  # fmt: skip
def test_rows_that_lack_something_are_named(
    rule: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    scored = write_jsonl(tmp_path / "s.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        make_pairs(PairsConfig(str(scored), str(tmp_path / "o.jsonl"), rule))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "rule: got 'best', expected one of spin, dsl, best_worst, ordered"),
        ({"threshold": -0.1}, "threshold: got -0.1"),
        ({"max_repetition": 2}, "max_repetition: got 2"),
        ({"max_pairs": 0}, "max_pairs: got 0"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairsConfig("a.jsonl", "b.jsonl", **change)


def test_the_command_says_what_became_of_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = write_jsonl(tmp_path / "s.jsonl", rows_of("dsl"))
    out = tmp_path / "o.jsonl"
    arguments = ["pairs", "--scored", str(scored), "--output", str(out), "--rule", "dsl"]
    assert main([*arguments, "--threshold", "0.25"]) == 0
    line = capsys.readouterr().out
    assert "3 rows of 8 (2 won by the model); left out: small_gap 3, " in line
    assert load_manifest(out).counts["out"] == 3


def test_a_pair_keeps_the_other_columns_and_training_takes_no_notice(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "p"}]
    row = {
        "prompt": chat, "messages": [*chat, {"role": "assistant", "content": "c"}], "id": "x7", "n": 3,
        "responses": ["a", "b"], "scores": [2.0, 1.0], "finish_reasons": ["stop", "stop"], "draft": "d",
        "completion": "c", "completion_score": 1.5, "chosen": "of another stage", "keywords": ["k"],
    }  # fmt: skip
    rows = [row, {**row, "n": "three", "id": None}]
    scored = write_jsonl(tmp_path / "s.jsonl", rows)
    out = tmp_path / "o.jsonl"
    make_pairs(PairsConfig(str(scored), str(out), "ordered"))
    first, second = read_jsonl(out)
    assert first == {
        "prompt": chat, "id": "x7", "n": 3, "keywords": ["k"], "chosen_score": 2.0, "rejected_score": 1.0,
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}], "chosen_source": "response 0",
    }  # fmt: skip
    assert (second["n"], second["id"]) == ("three", None)
    loaded = load_preferences(out)
    assert sorted(loaded.column_names) == ["chosen", "prompt", "rejected"]
    assert len(loaded) == 2


def test_spin_writes_scores_down_and_filters_by_none(tmp_path: Path) -> None:
    scored_row = {
        "prompt": "p", "completion": "c", "responses": ["r"], "scores": [0.9], "completion_score": 0.1,
    }  # fmt: skip
    plain_row = {"prompt": "q", "completion": "c", "responses": ["r"]}
    scored = write_jsonl(tmp_path / "s.jsonl", [scored_row, plain_row])
    make_pairs(PairsConfig(str(scored), str(tmp_path / "o.jsonl"), "spin"))
    first, second = read_jsonl(tmp_path / "o.jsonl")
    assert (first["chosen"], first["chosen_score"], first["rejected_score"]) == ("c", 0.1, 0.9)
    assert (second["chosen_score"], second["rejected_score"]) == (None, None)


def test_no_pair_at_all_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "p", "responses": ["a", "a"], "scores": [1, 1]}
    scored = write_jsonl(tmp_path / "s.jsonl", [row])
    argv = ["pairs", "--scored", str(scored), "--output", str(tmp_path / "o.jsonl")]
    assert main(argv) == 0
    told = capsys.readouterr()
    assert "0 rows of 1; left out: equal_answers 1" in told.out
    assert "fastpo pairs: warning: " in told.err
    assert "o.jsonl: no row of 1; left out: equal_answers 1" in told.err
