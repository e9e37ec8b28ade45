"""Preference pairs of the demo's task as a JSONL file in UltraFeedback's format."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fastpo.demo.task import Problem

FLIPPED_SHARE = 0.3


def build_pairs(
    problems: list[Problem], answers: list[str], *, count: int, seed: int
) -> list[dict]:
    """Rows for the first `count` problems answered wrongly: the right answer chosen, the given one rejected.

    `FLIPPED_SHARE` of the rows, drawn at random, have the two exchanged. An empty answer makes no pair, and
    there are fewer rows where there are fewer wrong answers.
    """
    wrong = [(p, a) for p, a in zip(problems, answers, strict=True) if a and a != p.answer][:count]
    rng = random.Random(f"flips/{seed}")
    flipped = set(rng.sample(range(len(wrong)), round(FLIPPED_SHARE * len(wrong))))
    return [
        _row(problem.prompt, given, problem.answer)
        if i in flipped
        else _row(problem.prompt, problem.answer, given)
        for i, (problem, given) in enumerate(wrong)
    ]


def _row(prompt: str, chosen: str, rejected: str) -> dict:
    question = {"role": "user", "content": prompt}
    return {
        "prompt": prompt,
        "chosen": [question, {"role": "assistant", "content": chosen}],
        "rejected": [question, {"role": "assistant", "content": rejected}],
    }


def write_pairs(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
