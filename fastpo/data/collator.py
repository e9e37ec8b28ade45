"""Tokenised rows → one padded batch: pairs, chosen half first, rejected half second, or single examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastpo

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PreferenceCollator:
    """Pads on the right and shifts the labels.

    Args:
        pad_token_id: fills ``input_ids``; what fills it is never attended to and never scored.
        pad_to_multiple_of: rounds T up, e.g. to 8 for tensor cores.

    Called with B rows of :func:`~fastpo.data.tokenize_preferences` it returns, for 2B sequences (chosen
    first) of at most T tokens:

    - ``input_ids`` (2B, T) int64, prompt + answer;
    - ``attention_mask`` (2B, T) int64, 1 on tokens and 0 on padding;
    - ``completion_labels`` (2B, T) int64: position t scores ``completion_labels[:, t]``, −100 where it scores
      nothing. The name is not ``labels``: transformers' Trainer would count those and rescale the loss;
    - ``rows`` (B,) int64, the rows' index in the source data set;
    - ``ref_logps`` (2B,) float64, where the rows hold ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Raises:
        ValueError: no rows, or an answer without a token to score.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise ValueError(f"pad_token_id: got {self.pad_token_id!r}, expected a token id ≥ 0")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of: got {self.pad_to_multiple_of!r}, expected None or an int ≥ 1"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows: got none, expected at least one pair")
        pairs = [(row, side) for side in ("chosen", "rejected") for row in rows]
        input_ids, attention_mask, labels = _pad(pairs, self.pad_token_id, self.pad_to_multiple_of)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_labels": labels,
            "rows": torch.tensor([row["row"] for row in rows]),
        }
        if "ref_chosen_logps" in rows[0]:
            logps = [row[f"ref_{side}_logps"] for row, side in pairs]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float64)
        return batch


@dataclass(frozen=True)
class ExampleCollator:
    """Pads on the right and shifts the labels.

    Args:
        pad_token_id: as for :class:`PreferenceCollator`.

    Called with B rows of :func:`~fastpo.data.tokenize_examples` it returns ``input_ids``, ``attention_mask``
    and ``completion_labels``, each (B, T) int64 as :class:`PreferenceCollator` has them, and ``rows`` (B,).

    Raises:
        ValueError: no rows, or a completion without a token to score.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows: got none, expected at least one example")
        answers = [(row, "completion") for row in rows]
        input_ids, attention_mask, labels = _pad(answers, self.pad_token_id, None)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_labels": labels,
            "rows": torch.tensor([row["row"] for row in rows]),
        }


def _pad(
    answers: Sequence[tuple[Mapping[str, Any], str]], pad_token_id: int, multiple: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and shifted labels, (len(answers), T) each, of prompt + the named answer of a row."""
    width = max(len(row["prompt_ids"]) + len(row[f"{name}_ids"]) for row, name in answers)
    if multiple:
        width = -(-width // multiple) * multiple
    input_ids = torch.full((len(answers), width), pad_token_id)
    attention_mask = torch.zeros(len(answers), width, dtype=torch.int64)
    completion_mask = torch.zeros(len(answers), width, dtype=torch.bool)
    for k, (row, name) in enumerate(answers):
        prompt, answer = list(row["prompt_ids"]), list(row[f"{name}_ids"])
        start, end = len(prompt), len(prompt) + len(answer)
        input_ids[k, :end] = torch.tensor(prompt + answer)
        attention_mask[k, :end] = 1
        completion_mask[k, start:end] = True
    labels = fastpo.shift_labels(input_ids, completion_mask, ignore_index=IGNORE_INDEX)
    for k in (labels != IGNORE_INDEX).any(dim=1).logical_not().nonzero().flatten().tolist():
        row, name = answers[k]
        raise ValueError(f"row {row['row']}: {name} has no token that a prompt or BOS precedes")
    return input_ids, attention_mask, labels
