"""The demo's problems, its careless annotators and its preference pairs."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from fastpo.data import load_preferences
from fastpo.demo.pairs import FLIPPED_SHARE, build_pairs, write_pairs
from fastpo.demo.task import CARELESS_SHARE, Problem, annotate, draw_problems


def test_problems_are_disjoint_and_their_answers_sorted(seed: int) -> None:
    sets = draw_problems(400, 300, 50, seed=seed)
    assert [len(s) for s in sets] == [400, 300, 50]
    problems = [p for s in sets for p in s]
    assert len({p.prompt for p in problems}) == 750
    for p in problems:
        digits = p.prompt.removeprefix("sort ")
        assert len(digits) == 5
        assert Counter(p.answer) == Counter(digits)
        assert all(a <= b for a, b in zip(p.answer, p.answer[1:], strict=False))
    assert draw_problems(400, 300, 50, seed=seed) == sets
    assert draw_problems(400, 300, 50, seed=seed + 1) != sets


def test_more_problems_than_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="counts: got 100001"):
        draw_problems(100_000, 1, seed=0)


def test_careless_answers_come_at_their_share_and_are_wrong_in_two_ways(seed: int) -> None:
    (problems,) = draw_problems(4000, seed=seed)
    examples = annotate(problems, seed=seed)
    right = 0
    for problem, (prompt, answer) in zip(problems, examples, strict=True):
        assert prompt == problem.prompt
        backwards, once = problem.answer[::-1], "".join(sorted(set(problem.answer)))
        assert answer in (problem.answer, backwards, once)
        right += answer == problem.answer
    # Binomial with n = 4000: 5 standard deviations are 0.039.
    assert abs(right / 4000 - (1 - CARELESS_SHARE)) < 0.039


def test_pairs_hold_right_against_wrong_and_an_exact_share_is_flipped(seed: int) -> None:
    (problems,) = draw_problems(300, seed=seed)
    answers = [p.answer if i % 3 == 0 else f"wrong{i}" for i, p in enumerate(problems)]
    answers[1] = ""  # no answer makes no pair
    rows = build_pairs(problems, answers, count=100, seed=seed)
    by_prompt = {p.prompt: p.answer for p in problems}
    assert [r["prompt"] for r in rows] == [
        p.prompt for p, a in zip(problems, answers, strict=True) if a and a != p.answer
    ][:100]
    flipped = 0
    for row in rows:
        contents = []
        for side in ("chosen", "rejected"):
            question, reply = row[side]
            assert question == {"role": "user", "content": row["prompt"]}
            assert reply["role"] == "assistant"
            contents.append(reply["content"])
        right = by_prompt[row["prompt"]]
        assert contents.count(right) == 1
        flipped += contents[1] == right
    assert flipped == round(FLIPPED_SHARE * 100) == 30


def test_the_written_pairs_load_as_preferences(seed: int, tmp_path) -> None:
    rows = build_pairs([Problem("sort 31524", "12345")], ["54321"], count=5, seed=seed)
    write_pairs(tmp_path / "train.jsonl", rows)
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    loaded = load_preferences(tmp_path / "train.jsonl")
    assert len(loaded) == 1
    assert loaded[0]["chosen"][1]["content"] == "12345"  # 30 % of one row round to no flip
