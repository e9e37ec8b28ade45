"""``fastpo score`` with a function of the user's own: what is scored, what is left out, what stops it."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from selfplay_files import read_jsonl, write_jsonl

from fastpo.cli import main
from fastpo.selfplay.score import ScoreConfig, score, score_rows
from fastpo.selfplay.scorers import Candidates, ScorerError

FUNCTION = """
def length(prompt, response, row):
    return len(response) + row.get("bonus", 0)

def broken(prompt, response, row):
    return float("nan") if response == "bad" else 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module beside the configuration, under a name of its own."""
    name = f"rules_{abs(hash(request.node.nodeid)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    return name


def test_responses_and_the_given_answer_are_scored(tmp_path: Path, module: str) -> None:
    rows = [
        {"prompt": "p", "completion": "four", "responses": ["a", "bb"], "bonus": k}
        for k in range(3)
    ]
    made = write_jsonl(tmp_path / "r.jsonl", rows)
    scorer = {"kind": "callable", "function": f"{module}:length"}
    score(ScoreConfig(str(made), str(tmp_path / "o.jsonl"), scorer))
    assert [row["scores"] for row in read_jsonl(tmp_path / "o.jsonl")] == [[1, 2], [2, 3], [3, 4]]
    score(ScoreConfig(str(made), str(tmp_path / "c.jsonl"), scorer, completion=True))
    got = read_jsonl(tmp_path / "c.jsonl")
    assert [row["scores"] for row in got] == [[1, 2], [2, 3], [3, 4]]
    assert [row["completion_score"] for row in got] == [4, 5, 6]
    assert got[0]["completion"] == "four"


def test_a_changed_function_is_another_stage(tmp_path: Path, module: str) -> None:
    made = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"]}])
    scorer = {"kind": "callable", "function": f"{module}:length"}
    config = ScoreConfig(str(made), str(tmp_path / "o.jsonl"), scorer)
    score(config)
    (tmp_path / f"{module}.py").write_text(FUNCTION + "\nx = 1\n")
    with pytest.raises(ValueError, match=r"\(the content of scorer\.source changed\)"):
        score(config)


def test_a_score_that_is_not_finite_stops_and_keeps_what_was_finished(
    tmp_path: Path, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "responses": [text]} for text in ("ok", "fine", "bad", "never")]
    made = write_jsonl(tmp_path / "r.jsonl", rows)
    out = tmp_path / "o.jsonl"
    arguments = ["score", "--responses", str(made), "--output", str(out)]
    arguments += ["--scorer.kind", "callable", "--scorer.function", f"{module}:broken"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "r.jsonl, line 3" in message
    assert "nan" in message
    assert not out.exists()
    journal = (tmp_path / "o.jsonl.partial/journal.jsonl").read_text().splitlines()
    assert len(journal) == 2


class NoVerdict:
    """A scorer that finds no score for every second row."""

    batch_rows = 3

    def identity(self) -> dict[str, Any]:
        return {"kind": "none"}

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        for batch in batches:
            for item in batch:
                counts["asked"] += 1
                yield item.number, None if item.number % 2 else [1.0] * len(item.responses)

    def close(self) -> None:
        self.closed = True


def test_rows_without_a_score_are_left_out_and_counted(tmp_path: Path) -> None:
    made = write_jsonl(
        tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"], "n": n} for n in range(7)]
    )
    scorer = NoVerdict()
    manifest = score_rows(made, tmp_path / "o.jsonl", scorer)
    assert manifest.counts == {"in": 7, "out": 4, "no_score": 3, "asked": 7}
    assert [row["n"] for row in read_jsonl(tmp_path / "o.jsonl")] == [0, 2, 4, 6]
    assert scorer.closed


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (None, "scorer: got None, expected a mapping with its kind"),
        ({"kind": "oracle"}, r"scorer\.kind: got 'oracle', expected one of reward_model, ranker"),
        ({"kind": "callable"}, r"scorer\.function: got None, expected module:function"),
        (
            {"kind": "callable", "function": "os:getcwd", "retries": 5},
            r"scorer\.retries: has no effect",
        ),
        ({"kind": "reward_model"}, r"scorer\.model: got None"),
        ({"kind": "reward_model", "model": "/no"}, "/no is not a directory"),
        ({"kind": "callable", "function": "no_such_module_here:f"}, "no_such_module_here"),
    ],
)
def test_mistakes_are_named(scorer: Any, message: str, tmp_path: Path) -> None:
    made = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"]}])
    with pytest.raises((ValueError, FileNotFoundError, ImportError), match=message):
        score(ScoreConfig(str(made), str(tmp_path / "o.jsonl"), scorer))


def test_a_row_without_responses_is_named(tmp_path: Path, module: str) -> None:
    made = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a"]}, {"prompt": "p"}])
    scorer = {"kind": "callable", "function": f"{module}:length"}
    with pytest.raises(
        (ValueError, ScorerError), match="line 2: 'responses' must be a list of texts"
    ):
        score(ScoreConfig(str(made), str(tmp_path / "o.jsonl"), scorer))


def test_a_module_beside_the_configuration_is_found_from_elsewhere(
    tmp_path: Path,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["abc"]}])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = tmp_path / "score.yaml"
    config.write_text(
        f"responses: {made}\noutput: {tmp_path}/o.jsonl\n"
        f"scorer: {{kind: callable, function: '{module}:length'}}\n"
    )
    assert main(["score", "--config", str(config)]) == 0
    assert read_jsonl(tmp_path / "o.jsonl")[0]["scores"] == [3]
    assert main(["score", "--config", str(config), "--responses", "nope.jsonl"]) == 2
    assert "error: responses: no file 'nope.jsonl'" in capsys.readouterr().err


def test_a_fault_that_was_removed_does_not_block_the_retry(tmp_path: Path, module: str) -> None:
    made = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["bad"]}])
    scorer = {"kind": "callable", "function": f"{module}:broken"}
    config = ScoreConfig(str(made), str(tmp_path / "o.jsonl"), scorer)
    with pytest.raises(ScorerError, match="is nan"):
        score(config)
    (tmp_path / f"{module}.py").write_text(FUNCTION.replace('float("nan")', "0.5"))
    del sys.modules[module]
    importlib.invalidate_caches()
    score(config)
    assert read_jsonl(tmp_path / "o.jsonl")[0]["scores"] == [0.5]
