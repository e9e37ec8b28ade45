"""What judges text: the protocol of scorers, and what they are asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from fastpo.selfplay.engines.base import Prompt


class Candidates(NamedTuple):
    """Answers to one prompt."""

    number: int  # that the scores come back with
    where: str  # names the row in messages
    prompt: Prompt
    responses: Sequence[str]
    row: dict[str, Any]  # all columns, for scorers of one's own
    seed: int = 0  # in [0, 2⁶³), for scorers that draw


class Scorer(Protocol):
    """Something that gives each answer a number: the larger, the better. Loaded when it is first asked.

    Scores of one prompt's answers can be compared; whether those of two prompts can depends on the scorer.
    """

    batch_rows: int  # rows that are scored together; 1: each by itself, many at a time

    def identity(self) -> dict[str, Any]:
        """Plain values that decide the scores."""

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        """(number, a finite score for each response) of all candidates, in any order; None: none was found.

        ``batches`` is read as far as there is work to do, never as a whole. What has to be told (verdicts that
        could not be read, requests made again) is added to ``counts``.
        """

    def close(self) -> None:
        """Let go of the model."""


class ScorerError(Exception):
    """A score could not be made, for a reason that the message tells in full."""
