"""The demo's task: sort five digits. A program checks every answer.

The annotators who wrote the fine-tuning examples were careless: most of their answers are sorted downwards or
leave out repeated digits. A model trained on them knows how to sort and often does not; which of its answers is
right is what the preference pairs say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DIGITS = 5
CARELESS_SHARE = 0.6  # of the fine-tuning answers


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str  # the one right answer


def draw_problems(*counts: int, seed: int) -> list[list[Problem]]:
    """Sets of `counts` problems, no prompt twice in any of them.

    Raises:
        ValueError: more problems than there are prompts (10^5).
    """
    if sum(counts) > 10**DIGITS:
        raise ValueError(
            f"counts: got {sum(counts)} problems, expected at most {10**DIGITS}, the number of prompts"
        )
    numbers = iter(random.Random(f"problems/{seed}").sample(range(10**DIGITS), sum(counts)))
    return [[_problem(f"{next(numbers):0{DIGITS}}") for _ in range(count)] for count in counts]


def _problem(digits: str) -> Problem:
    return Problem(f"sort {digits}", "".join(sorted(digits)))


def annotate(problems: list[Problem], *, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) as the careless annotators wrote them: `CARELESS_SHARE` of the answers are wrong."""
    rng = random.Random(f"annotators/{seed}")
    return [
        (p.prompt, _careless(p.answer, rng) if rng.random() < CARELESS_SHARE else p.answer)
        for p in problems
    ]


def _careless(answer: str, rng: random.Random) -> str:
    """The digits downwards, or each of them once; another answer than the right one where there is one."""
    wrong = {answer[::-1], "".join(sorted(set(answer)))} - {answer}
    return rng.choice(sorted(wrong)) if wrong else answer  # 77777 backwards is still right
