"""What makes text: the protocol of engines, what they are asked and what they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from fastpo.data.formats import Message

Prompt = str | list[Message]  # text to be continued, or a conversation to be answered


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        n: completions of a prompt, ≥ 1.
        temperature: ≥ 0; 0: the likeliest token always.
        top_p: in (0, 1], share of the probability that may be drawn from.
        top_k: tokens that may be drawn; None: all.
        repetition_penalty: > 0, 1: none.
        max_tokens: of a completion, ≥ 1.
        stop: texts that end a completion, which is cut before them.

    Raises:
        ValueError: a number out of range; the message names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, good, expected in (
            ("n", self.n >= 1, "an integer ≥ 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "a number ≥ 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "an integer ≥ 1, or null"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a number > 0"),
            ("max_tokens", self.max_tokens >= 1, "an integer ≥ 1"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not good:
                raise ValueError(
                    f"sampling.{name}: got {getattr(self, name)!r}, expected {expected}"
                )
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"sampling.n: got {self.n} with temperature 0, expected 1: all would be the same"
            )


class Request(NamedTuple):
    """One prompt to be completed ``Sampling.n`` times."""

    number: int  # that the completions come back with
    prompt: Prompt
    seed: int  # in [0, 2⁶³), for engines that draw for each request by itself


class RequestBatch(NamedTuple):
    """Requests that are completed together."""

    requests: Sequence[Request]
    seed: int  # in [0, 2⁶³), for engines that draw for the batch as a whole


class Completion(NamedTuple):
    """A text that was made."""

    text: str  # without the prompt, special tokens and what stopped it
    finish_reason: str  # "stop", or "length": cut off at max_tokens
    tokens: int


class Refused(NamedTuple):
    """A request that this engine cannot complete, however often it is asked."""

    reason: str  # snake_case, counted: "prompt_too_long", …


class Engine(Protocol):
    """Something that completes prompts: a model in this process, or a server.

    Its model is loaded when it is first asked, not before: a stage that is done asks for nothing.
    """

    batch_rows: int  # requests of a batch; 1: each is completed by itself, many at a time

    def identity(self) -> dict[str, Any]:
        """Plain values that decide what is made: kind, model and its revision, chat template, precision."""

    def generate(
        self, batches: Iterable[RequestBatch], sampling: Sampling, counts: Counter[str]
    ) -> Iterator[tuple[int, list[Completion] | Refused]]:
        """(number, its n completions) of every request, as they are finished, in any order.

        ``batches`` is read as far as there is work to do, never as a whole. Requests that had to be made again
        are counted in ``counts``.
        """

    def close(self) -> None:
        """Let go of the model."""


class EngineError(Exception):
    """Text could not be made, for a reason that the message tells in full; what was finished is kept."""
