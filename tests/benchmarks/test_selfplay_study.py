"""The study of self-improvement loops: its command, its tables, and the committed page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fastpo.benchmarks import selfplay_study as study


def test_the_command_runs_every_method_from_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(method: str) -> Any:
        """Half of the start's answers count as right, so that there are pairs of both kinds."""
        config = whole(method)
        return dataclasses.replace(
            config, iterations=1, held_out=8,
            scorer={"kind": "callable", "function": "study_rules:score"}, threshold=0.0,
            sampling={**config.sampling, "temperature": 1.5}, train={**config.train, "max_steps": 2},
        )  # fmt: skip

    whole = study.recipe
    monkeypatch.setattr(study, "recipe", small)
    (tmp_path / "study_rules.py").write_text(
        "def score(prompt, response, row):\n    return float(sum(map(ord, response)) % 2)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "study.json"
    methods = [
        "spin",
        "dnpo",
        "dpo",
    ]  # SynPO's generator has no time to learn its tags at this size
    study.main(["--seeds", "0", "--scale", "0.02", "--out", str(out), "--methods", *methods])
    document = json.loads(out.read_text("utf-8"))
    runs = {run["method"]: run for run in document["runs"]}
    assert list(runs) == methods
    assert len({run["accuracy"][0] for run in runs.values()}) == 1  # one start, one held-out set
    for run in runs.values():
        assert len(run["accuracy"]) == 2
        (made,) = run["iterations"]
        assert made["counts"]["out"] == made["pairs_trained_on"] > 0
    assert 0 < runs["dnpo"]["iterations"][0]["generated_winners"] < 1

    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {n} -->\n<!-- end {n} -->\n" for n in study.tables(document)))
    study.report(out, page, tmp_path / "plot.png")
    for table in study.tables(document).values():
        assert table in page.read_text("utf-8")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plain_synpo_is_the_recipe_without_its_sft_term() -> None:
    plain, own = study.recipe("synpo-plain"), study.recipe("synpo")
    assert own.train["sft_weight"] > 0
    assert plain.train == {**own.train, "sft_weight": 0}


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    document = json.loads(study.RESULTS.read_text("utf-8"))
    for method in study.METHODS:
        recipe = json.loads(json.dumps(dataclasses.asdict(study.recipe(method))))
        kept = document["settings"][method]
        # A field that came later has its default.
        assert {k: recipe[k] for k in kept} == kept
        runs = study.runs_of(document, method)
        assert [run["seed"] for run in runs] == [0, 1, 2]
        assert all(len(run["accuracy"]) == 4 and run["seconds"] < 15 * 60 for run in runs)
    page = study.PAGE.read_text("utf-8")
    for table in study.tables(document).values():
        assert table in page
