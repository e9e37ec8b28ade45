"""``fastpo pairs``: scored answers → preference pairs, in TRL's format.

| rule | chosen | rejected | source |
|---|---|---|---|
| ``spin`` | the given completion | the first response | Chen et al., arXiv 2401.01335 |
| ``dsl`` | the better scored of both, whichever it is | the other | DNPO, Yang et al., arXiv 2502.05400 |
| ``best_worst`` | the best scored response | the worst | |
| ``ordered`` | the first response | the second | SynPO, Dong et al., arXiv 2410.06961 |

All but ``spin`` keep a pair only if its scores differ by more than ``threshold``; ``ordered`` in its own order.
``spin`` writes down the scores of rows that have them. A pair keeps the other columns of its row.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .conversation import answer, read_completion, read_prompt, read_responses, read_scores
from .engines.base import Prompt
from .manifest import Manifest
from .rows import Row, check_readable, read_rows
from .stage import Batch, Result, Work, run_stage, seed_of
from .text_measures import repetition

# Columns that a pair's own replace, or that say how its row was made or is to be read.
OF_ANSWERS = (
    "messages", "completion", "completion_score", "responses", "scores", "finish_reasons", "draft", "tools",
    "chat_template_kwargs",
)  # fmt: skip
RULES = ("spin", "dsl", "best_worst", "ordered")


@dataclass
class PairsConfig:
    """Settings of ``fastpo pairs``."""

    scored: str = field(
        metadata={
            "help": "JSONL or Parquet as fastpo score writes it (rule spin: as fastpo generate does)"
        }
    )
    output: str = field(
        metadata={
            "help": "JSONL or Parquet of prompt, chosen, rejected, their scores, and chosen_source"
        }
    )
    rule: str = field(
        default="best_worst",
        metadata={
            "help": "spin (completion over response), dsl (the better of completion and response), "
            "best_worst (of the responses), ordered (first response over the second)"
        },
    )
    threshold: float = field(
        default=0.0,
        metadata={"help": "scores must differ by more than this; ≥ 0, no effect with rule spin"},
    )
    max_repetition: float = field(
        default=1.0,
        metadata={
            "help": "in [0, 1]: an answer of which a larger share repeats itself makes no pair (SynPO: 0.5)"
        },
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "of more, so many are drawn at random; unset: all"}
    )
    seed: int = field(default=0, metadata={"help": "of that draw"})

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: got {self.rule!r}, expected one of {', '.join(RULES)}")
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold: got {self.threshold}, expected a number ≥ 0")
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(
                f"max_repetition: got {self.max_repetition}, expected a number in [0, 1]"
            )
        if self.max_pairs is not None and self.max_pairs < 1:
            raise ValueError(f"max_pairs: got {self.max_pairs}, expected an integer ≥ 1, or null")


class Pair(NamedTuple):
    """What a rule makes of a row."""

    chosen: str
    rejected: str
    chosen_score: float | None
    rejected_score: float | None
    chosen_source: str  # "completion", or "response K"


class NoPair(Exception):
    """A row that makes no pair; the argument is the reason, which is counted."""


def make_pairs(config: PairsConfig) -> Manifest:
    """Make the pairs of every row; counts say why rows make none, and how often a response was chosen.

    Raises:
        FileNotFoundError, ValueError: files, rows or settings that cannot be used.
    """
    rows = Path(config.scored)
    check_readable(rows, "scored")

    def run(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        last = _last_drawn(rows, config)
        for batch in batches:
            for number, where, row in batch.items:
                try:
                    pair = pair_of(row, where, config)
                except NoPair as reason:
                    yield Result(number, None, str(reason))
                    continue
                if last is not None and _place(config.seed, number) > last:
                    yield Result(number, None, "over_max_pairs")
                    continue
                if pair.chosen_source != "completion":
                    counts["response_chosen"] += 1
                yield Result(number, pair_columns(read_prompt(row, where), pair))

    settings = {
        name: getattr(config, name) for name in ("rule", "threshold", "max_repetition", "max_pairs")
    }
    return run_stage(
        "pairs", Path(config.output), {"rows": rows}, settings, Work(run),
        seed=config.seed, leave_out=OF_ANSWERS,
    )  # fmt: skip


def pair_of(row: Mapping[str, Any], where: str, config: PairsConfig) -> Pair:
    """The pair of a row.

    Raises:
        NoPair: it makes none.
        ValueError: the row lacks what the rule needs.
    """
    responses = read_responses(row, where)
    needed = 2 if config.rule in ("best_worst", "ordered") else 1
    if len(responses) < needed:
        raise ValueError(
            f"{where}: rule {config.rule!r} needs {needed} responses, the row has {len(responses)}"
        )
    pair = _RULES[config.rule](row, where, responses)
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise NoPair("empty_answer")
    if pair.chosen.strip() == pair.rejected.strip():
        raise NoPair("equal_answers")
    if config.rule != "spin":
        assert pair.chosen_score is not None
        assert pair.rejected_score is not None
        if not pair.chosen_score - pair.rejected_score > config.threshold:
            raise NoPair("small_gap")
    if config.max_repetition < 1 and (
        max(repetition(pair.chosen), repetition(pair.rejected)) > config.max_repetition
    ):
        raise NoPair("repetitive")
    return pair


def pair_columns(prompt: Prompt, pair: Pair) -> Row:
    """A pair as a row in TRL's format."""
    return {
        "prompt": prompt,
        "chosen": answer(prompt, pair.chosen),
        "rejected": answer(prompt, pair.rejected),
        "chosen_score": pair.chosen_score,
        "rejected_score": pair.rejected_score,
        "chosen_source": pair.chosen_source,
    }


def response_scores(row: Mapping[str, Any], where: str, count: int) -> list[float]:
    """The scores of a row's ``count`` responses, finite numbers.

    Raises:
        ValueError: none, not as many, or one that is no finite number.
    """
    return [
        _finite(score, where, f"score of response {k} (from 0)")
        for k, score in enumerate(read_scores(row, where, count))
    ]


def completion_score(row: Mapping[str, Any], where: str) -> float:
    """The score of a row's given answer, a finite number.

    Raises:
        ValueError: none, or no finite number.
    """
    if row.get("completion_score") is None:
        raise ValueError(
            f"{where}: no 'completion_score', expected one, as fastpo score writes it with completion set"
        )
    return _finite(row["completion_score"], where, "completion_score")


def _finite(value: Any, where: str, name: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {value!r:.60}, expected a finite number")
    return value


def _spin(row: Mapping[str, Any], where: str, responses: list[str]) -> Pair:
    given_score = made_score = None
    if row.get("completion_score") is not None and row.get("scores") is not None:
        given_score = completion_score(row, where)
        made_score = response_scores(row, where, len(responses))[0]
    given = read_completion(row, where)
    return Pair(given, responses[0], given_score, made_score, "completion")


def _dsl(row: Mapping[str, Any], where: str, responses: list[str]) -> Pair:
    given, made = read_completion(row, where), responses[0]
    made_score = response_scores(row, where, len(responses))[0]
    given_score = completion_score(row, where)
    if made_score > given_score:
        return Pair(made, given, made_score, given_score, "response 0")
    return Pair(given, made, given_score, made_score, "completion")


def _best_worst(row: Mapping[str, Any], where: str, responses: list[str]) -> Pair:
    scores = response_scores(row, where, len(responses))
    order = sorted(
        range(len(scores)), key=scores.__getitem__
    )  # of equal scores the first comes first
    worst, best = order[0], order[-1]
    return Pair(responses[best], responses[worst], scores[best], scores[worst], f"response {best}")


def _ordered(row: Mapping[str, Any], where: str, responses: list[str]) -> Pair:
    scores = response_scores(row, where, len(responses))
    return Pair(responses[0], responses[1], scores[0], scores[1], "response 0")


_RULES = {"spin": _spin, "dsl": _dsl, "best_worst": _best_worst, "ordered": _ordered}


def _place(seed: int, number: int) -> int:
    """Where a row stands in the random order of a draw."""
    return seed_of(seed, "pairs", number)


def _last_drawn(rows: Path, config: PairsConfig) -> int | None:
    """Place of the last row that is drawn, None where all are: one pass that holds ``max_pairs`` numbers."""
    if config.max_pairs is None:
        return None
    drawn: list[int] = []  # a heap of negated places, the last one first
    for number, (where, row) in enumerate(read_rows(rows)):
        try:
            pair_of(row, where, config)
        except NoPair:
            continue
        place = -_place(config.seed, number)
        if len(drawn) < config.max_pairs:
            heapq.heappush(drawn, place)
        else:
            heapq.heappushpop(drawn, place)
    return -drawn[0] if len(drawn) == config.max_pairs else None
