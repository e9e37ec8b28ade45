"""What the scorers that run a model themselves share: settings, device, lengths, and token sequences → numbers.

Sequences are padded on the right and masked, those of like lengths together. In what company one is computed
depends on the sequences of its batch of rows, not on their order: the same batch gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import ScorerError

SHORTEST = 16  # tokens that max_length must leave, so that every part of an input has some

Ids = tuple[int, ...]
Input = TypeVar("Input", bound=Hashable)


def check_settings(batch_size: int, max_length: int | None) -> None:
    """Raises ValueError where a number is out of range."""
    if batch_size < 1:
        raise ValueError(f"scorer.batch_size: got {batch_size}, expected an integer ≥ 1")
    if max_length is not None and max_length < SHORTEST:
        raise ValueError(f"scorer.max_length: got {max_length}, expected an integer ≥ {SHORTEST}")


def pick_device(device: str | None) -> str:
    """``device``, or an accelerator if there is one."""
    if device is not None:
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def without_beginning(ids: Sequence[int], limit: int | None, kept: int) -> list[int]:
    """At most ``limit`` ids: the first ``kept`` ones, and the last."""
    if limit is None or len(ids) <= limit:
        return list(ids)
    return [*ids[:kept], *ids[len(ids) - limit + kept :]]


def score_inputs(
    inputs: Iterable[Input],
    batch_size: int,
    forward: Callable[[list[Input]], Tensor],
    length: Callable[[Any], int] = len,
) -> dict[Input, float]:
    """A number for every different input.

    Args:
        inputs: token ids, or tuples that hold them.
        batch_size: inputs in one forward.
        forward: takes n inputs, gives their numbers, (n, 1).
        length: of an input, in tokens.

    Raises:
        ScorerError: something else comes from ``forward``.
    """
    scores: dict[Input, float] = {}
    ordered = sorted(set(inputs), key=lambda x: (length(x), x))
    for start in range(0, len(ordered), batch_size):
        some = ordered[start : start + batch_size]
        with torch.no_grad():
            numbers = forward(some)
        if numbers.shape != (len(some), 1):
            raise ScorerError(
                f"the model gave an output of shape {tuple(numbers.shape)} for {len(some)} inputs, expected "
                "one number each"
            )
        scores.update(zip(some, numbers[:, 0].double().tolist(), strict=True))
    return scores


def padded(sequences: Sequence[Ids], pad: int, device: torch.device) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, (n, T) int64 each, padded on the right."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
