"""The report of a loop directory made by hand: every number that it tells, its words, its order, its plots."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from fastpo.selfplay import report as report_module
from fastpo.selfplay.manifest import manifest_path
from fastpo.selfplay.report import report_loop
from fastpo.selfplay.stage import write_stage

Finish = Callable[..., None]


@pytest.fixture
def loop(tmp_path: Path) -> Path:
    (tmp_path / "loop.json").write_text(
        json.dumps({"method": "dnpo", "model_name_or_path": "a-model", "search": None})
    )
    return tmp_path


@pytest.fixture
def finish(loop: Path) -> Finish:
    """A stage that is done: its rows, further counts, and the second at which it was finished."""

    def make(name: str, rows: list[dict[str, Any]], second: int = 0, **counts: int) -> None:
        output = loop / name
        output.parent.mkdir(parents=True, exist_ok=True)

        def rows_of(found: Any) -> list[dict[str, Any]]:
            found.update(counts)
            return rows

        write_stage("by hand", output, {}, {}, rows_of, quiet=True)
        date_manifest(output, second)

    return make


def date_manifest(output: Path, second: int) -> None:
    file = manifest_path(output)
    document = json.loads(file.read_text())
    document["finished"] = f"2026-01-01T00:00:{second:02}+00:00"
    file.write_text(json.dumps(document))


def train(output: Path, second: int) -> None:
    """A model that is trained."""
    manifest = {
        "format": "fastpo stage 1", "stage": "train", "inputs": {}, "settings": {}, "paths": {}, "counts": {},
        "output_sha256": "", "seconds": 12.5,
    }  # fmt: skip
    output.mkdir(parents=True)
    manifest_path(output).write_text(json.dumps(manifest))
    date_manifest(output, second)


def pair(prompt: str, chosen: float | None, rejected: float | None, source: str) -> dict[str, Any]:
    return {
        "prompt": prompt, "chosen": "one two three", "rejected": "one", "chosen_score": chosen,
        "rejected_score": rejected, "chosen_source": source,
    }  # fmt: skip


def versus(*scores: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{k}", "responses": ["a", "b"], "scores": list(s)}
        for k, s in enumerate(scores)
    ]


def evaluated(finish: Finish, k: int, scores: list[float]) -> None:
    rows = [{"prompt": f"p{i}", "responses": ["two words"]} for i in range(4)]
    folder = f"evaluation/iteration-{k}"
    finish(f"{folder}/responses.jsonl", rows)
    finish(
        f"{folder}/scored.jsonl", [{**r, "scores": [s]} for r, s in zip(rows, scores, strict=False)]
    )


def read(loop: Path) -> tuple[dict[str, Any], str]:
    page = report_loop(loop)
    return json.loads((loop / "report.json").read_text()), page.read_text()


def test_scores_and_win_rates(loop: Path, finish: Finish) -> None:
    evaluated(finish, 0, [0.0, 1.0, 2.0, 3.0])
    evaluated(finish, 1, [0.0, 1.0, 3.0, 5.0])
    finish(
        "evaluation/iteration-1/versus-previous-scored.jsonl",
        versus((2, 1), (1, 1), (0, 3), (4, 3)),
    )
    document, page = read(loop)
    start, first = document["evaluation"]
    assert start["score"]["mean"] == 1.5
    assert first["score"]["mean"] == 2.25
    # deviations from 1.5: 1.5, 0.5, 0.5, 1.5; variance 5/3
    assert start["score"]["standard_error"] == pytest.approx((5 / 3) ** 0.5 / 2)
    assert start["score"]["quantiles"] == {"0.05": 0, "0.25": 1, "0.5": 2, "0.75": 3, "0.95": 3}
    expected = {
        "prompts": 4, "wins": 2, "ties": 1, "losses": 1, "rate": 2.5 / 4, "mean_gap": (1 + 0 - 3 + 1) / 4,
    }  # fmt: skip
    assert first["win_rate_previous"] == first["win_rate_first"] == expected
    assert "| 62.5 % (2 wins, 1 ties, 1 losses) |" in page
    assert "A percentage counts wins, and half of the ties" in page
    assert document["best_iteration"] == 1
    assert "Best mean score on the held-out prompts: iteration 1." in page
    assert "search" not in page


def test_no_iteration_beats_the_start(loop: Path, finish: Finish) -> None:
    evaluated(finish, 0, [1.0, 1.0])
    assert read(loop)[0]["best_iteration"] is None
    evaluated(finish, 1, [2.0, 0.0])
    document, page = read(loop)
    assert document["best_iteration"] == 0
    assert "By mean score on the held-out prompts no iteration beats the start." in page
    assert "Best" not in page


def test_held_out_rows_of_which_none_got_a_score(loop: Path, finish: Finish) -> None:
    for k in (0, 1):
        evaluated(finish, k, [])
    finish("evaluation/iteration-1/versus-previous-scored.jsonl", [])
    document, _ = read(loop)
    assert [sorted(entry) for entry in document["evaluation"]] == [["iteration", "length"]] * 2
    assert document["best_iteration"] is None


def test_a_search_is_said_to_bias_the_numbers(loop: Path, finish: Finish) -> None:
    settings = json.loads((loop / "loop.json").read_text()) | {"search": {"beta": [1, 2]}}
    (loop / "loop.json").write_text(json.dumps(settings))
    evaluated(finish, 0, [1.0])
    assert "chosen on the same held-out prompts" in read(loop)[1]


PAIRS = [
    pair("p1", 3.0, 1.0, "completion"),
    pair("p2", 2.0, 1.0, "response 0"),
    pair("p3", 1.0, 0.0, "completion"),
    pair("p4", 5.0, 1.0, "completion"),
]


def test_pairs_are_told_with_their_winners_gaps_and_lengths(loop: Path, finish: Finish) -> None:
    finish("seeds/train.jsonl", [{"prompt": p["prompt"]} for p in PAIRS])
    counts = {"in": 9, "small_gap": 3, "equal_answers": 2, "response_chosen": 1}
    finish("iteration-1/pairs.jsonl", PAIRS, **counts)
    finish("iteration-2/pairs.jsonl", [pair("p1", None, None, "completion")])
    document, page = read(loop)
    first, second = document["iterations"]
    assert first["generated_winners"] == 0.25
    assert first["gap"]["mean"] == 2.0
    assert first["chosen_length"]["words"]["mean"] == 3
    assert first["rejected_length"]["words"]["mean"] == 1
    assert second["generated_winners"] == 0.0
    assert "gap" not in second
    # what rows that stay have is not among the reasons for leaving rows out
    assert "| 1 | pairs | 9 | 4 | small_gap 3, equal_answers 2 | 1 won by the model |" in page
    assert "| 1 | 4 | 25.0% | 2 | 3.0 | 1.0 | 0.000 |" in page
    assert "| 2 | 1 | 0.0% |  | 3.0 | 1.0 | 0.000 |" in page
    assert "## Pairs of iteration 2, drawn at random" in page


def test_stages_stand_in_the_order_in_which_they_were_finished(loop: Path, finish: Finish) -> None:
    finish("seeds/train.jsonl", [{"prompt": "p"}])
    finish("synpo/generator.jsonl", [{}], second=1)
    train(loop / "synpo/generator", second=2)
    finish("iteration-1/scored.jsonl", [{}], second=4, retried_timeout=3, prompt_too_long=1)
    finish("iteration-1/pairs.jsonl", PAIRS, second=5)
    finish("iteration-1/responses.jsonl", [{}], second=3)
    finish("iteration-1/improver.jsonl", [{}], second=6)
    train(loop / "iteration-1/improver", second=7)
    train(loop / "iteration-1/model", second=9)
    train(loop / "iteration-1/search-0/model", second=8)
    document, page = read(loop)
    stages = [
        line.split(" | ")[:2] for line in page.splitlines() if line.startswith(("| 1 | ", "| – | "))
    ]
    assert [name for _, name in stages[:10]] == [
        "seeds/train", "synpo/generator", "training of synpo/generator", "responses", "scored", "pairs",
        "improver", "training of improver", "training of search-0/model", "training of model",
    ]  # fmt: skip
    assert [k for k, _ in stages[:4]] == ["| –", "| –", "| –", "| 1"]
    assert "| 1 | training of model |  |  |  |  | 12.5 |" in page
    assert "| prompt_too_long 1 | 3 retried_timeout |" in page
    assert document["iterations"][0]["counts"]["pairs"]["out"] == 4


def test_stages_of_one_second_are_ordered_by_their_files(loop: Path, finish: Finish) -> None:
    for place, name in enumerate(("b", "c", "a")):
        finish(f"seeds/{name}.jsonl", [])
        os.utime(manifest_path(loop / f"seeds/{name}.jsonl"), (place, place))
    assert list(read(loop)[0]["once"]["seconds"]) == ["seeds/b", "seeds/c", "seeds/a"]


# ---- Plots ----


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of all figures that are drawn."""
    found: list[Axes] = []
    figure = report_module._figure

    def kept(count: int) -> tuple[Any, list[Axes]]:
        made = figure(count)
        found.extend(made[1])
        return made

    monkeypatch.setattr(report_module, "_figure", kept)
    return found


def test_scores_of_few_values_have_their_standard_error(
    loop: Path, finish: Finish, panels: list[Axes]
) -> None:
    evaluated(finish, 0, [0.0, 1.0, 0.0, 1.0])
    evaluated(finish, 1, [1.0, 1.0, 0.0, 1.0])
    read(loop)
    scores = panels[0]
    assert scores.get_title(loc="left") == "Score, held out: mean ± standard error"
    (band,) = scores.collections
    heights = band.get_paths()[0].vertices[:, 1]
    error = (1 / 3) ** 0.5 / 2  # of 0, 1, 0, 1
    assert heights.min() == pytest.approx(0.5 - error)


def test_scores_of_many_values_have_their_quantiles(panels: list[Axes], tmp_path: Path) -> None:
    entries = []
    for k in (0, 1):
        score = report_module._distribution([k + i / 20 for i in range(20)])
        entries.append({"iteration": k, "score": score})
    assert report_module._plot_scores({"evaluation": entries}, tmp_path / "scores.png")
    assert panels[0].get_title(loc="left").endswith("middle 50 and 90 %")
    assert len(panels[0].collections) == 2


def test_scores_that_do_not_change_lie_in_an_axis_of_some_height(
    loop: Path, finish: Finish, panels: list[Axes]
) -> None:
    for k in (0, 1):
        evaluated(finish, k, [20.0, 20.0])
    read(loop)
    low, high = panels[0].get_ylim()
    assert high - low >= 2.0
    assert low < 20 < high


def test_a_single_iteration_and_equal_lengths_can_be_seen(
    loop: Path, finish: Finish, panels: list[Axes]
) -> None:
    finish("seeds/train.jsonl", [{"prompt": "p"}])
    finish("iteration-1/pairs.jsonl", [{**PAIRS[0], "rejected": "three other words"}])
    read(loop)
    bars, lengths, _ = panels
    assert bars.get_xlim() == (0, 2)
    assert lengths.get_ylim()[1] > 3 * 1.1
    rejected, chosen = lengths.lines
    assert list(rejected.get_ydata()) == list(chosen.get_ydata()) == [3]
    assert rejected.get_markersize() > chosen.get_markersize()  # behind, and larger


def test_what_is_no_loop_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no loop\.json, expected the output_dir of fastpo iterate"
    ):
        report_loop(tmp_path)
