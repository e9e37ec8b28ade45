"""The benchmark of long contexts on a tiny model: its figures, its end at what does not fit, its table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastpo.benchmarks import long_context


def test_both_libraries_train_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """Two lengths each; the losses of all steps are those of the same training."""
    found: dict[str, list[dict[str, Any]]] = {}
    for way in ("TRL", "fastpo", "fastpo, shared prompts"):
        long_context.work(way, "tiny", torch.device("cpu"), (32, 64), seconds=600)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("found ")]
        found[way] = [json.loads(line[6:]) for line in lines]
        assert [one["length"] for one in found[way]] == [32, 64]
        for one in found[way]:
            assert len(one["loss"]) == long_context.STEPS
            assert one["loss"][2] < one["loss"][1] < one["loss"][0]
            assert one["tokens_per_second"] == pytest.approx(2 * one["length"] / one["seconds"])
    for one, other, third in zip(*found.values(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert third["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_it_ends_at_the_first_length_that_does_not_fit() -> None:
    def run(length: int) -> dict[str, Any]:
        if length > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"length": length, "tokens_per_second": 1e3, "peak_bytes": 3 << 30}

    seen = list(long_context.grow((100, 200, 400, 800), run, lambda: False))
    assert [one["length"] for one in seen] == [100, 200, 400]
    assert seen[2] == {"length": 400, "error": "out of memory"}
    late = iter((False, True))
    stopped = list(long_context.grow((100, 200), run, lambda: next(late)))
    assert stopped[1] == {"length": 200, "not_run": "time is up"}

    document = {
        "ways": [
            {"way": "A", "lengths": seen},
            {"way": "B", "lengths": stopped},
            {"way": "C", "lengths": [], "error": "no such package"},
        ]
    }
    assert long_context.table(document).splitlines() == [
        "| tokens of a sequence | A | B | C |",
        "|---|---|---|---|",
        "| 100 | 1000/s, 3.0 GiB | 1000/s, 3.0 GiB | no such package |",
        "| 200 | 1000/s, 3.0 GiB | time is up | no such package |",
        "| 400 | out of memory | – | no such package |",
    ]


def test_a_way_that_fails_is_kept_with_its_reason() -> None:
    written: list[Any] = []
    (entry,) = long_context.measure(
        ["fastpo"], "no such shape", torch.device("cpu"), (32,), 1.0, written.append
    )
    assert entry["lengths"] == []
    assert "no such shape" in entry["error"]
    assert written == [[entry]]
