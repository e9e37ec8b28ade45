"""Tokenised pairs → rows without padding between sequences, with each prompt once or twice.

How the rows lie is :mod:`fastpo.packed_rows`' business. Which tokens see which is told by ``groups`` and
``branches``; :mod:`fastpo.head.packed_attention` makes masks of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpo.packed_rows import Piece, lay_out, pieces_of_pair

from .collator import IGNORE_INDEX

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class PackedCollator:
    """Packs pairs into rows of equal length.

    Args:
        pad_token_id: fills what is left of a row.
        prefix_sharing: a prompt stands once for both answers.
        one_row: all of a batch in one row. False: rows as long as the longest piece, filled up with shorter
            ones, for attention whose work grows with the square of a row.
        pad_to_multiple_of: rounds the rows' length up.

    Called with B rows of :func:`~fastpo.data.tokenize_preferences` it returns, for R packed rows of L tokens
    and answers of at most A scored tokens:

    - ``rows`` (B,) int64, the rows' index in the source data set;
    - ``input_ids``, ``position_ids`` (R, L) int64; positions begin at 0 in each sequence;
    - ``groups`` (R, L) int32: the number of the sequence, or pair, that a token belongs to; −1 on padding;
    - ``branches`` (R, L) int8: 0, and with shared prompts 1 in chosen and 2 in rejected answers;
    - ``completion_labels`` (2B, A) int64, chosen answers first: the answers' tokens, −100 after their end;
    - ``hidden_index`` (2B, A) int64: the place of the hidden state in (R·L) that scores each label;
    - ``sequence_tokens`` () int64: tokens of all 2B sequences, prompts twice;
    - ``ref_logps`` (2B,) float64, where the rows hold ``ref_chosen_logps`` and ``ref_rejected_logps``.

    Raises:
        ValueError: no rows, an answer without a token to score, or a multiple below 1.
    """

    pad_token_id: int
    prefix_sharing: bool = False
    one_row: bool = False
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.pad_to_multiple_of, int) or self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of: got {self.pad_to_multiple_of!r}, expected an integer ≥ 1"
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows: got none, expected at least one pair")
        pieces = [piece for k, row in enumerate(rows) for piece in self._pieces(k, row)]
        laid = lay_out(pieces, self.pad_token_id, self.one_row, self.pad_to_multiple_of)
        batch = {
            "rows": torch.tensor([row["row"] for row in rows]),
            "input_ids": laid.input_ids,
            "position_ids": laid.position_ids,
            "groups": laid.groups,
            "branches": laid.branches,
        }
        batch |= _label_columns(
            [laid.answers[side, k] for side in (0, 1) for k in range(len(rows))],
            laid.input_ids.numel(),
        )
        whole = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in SIDES]
        batch["sequence_tokens"] = torch.tensor(sum(whole))
        if "ref_chosen_logps" in rows[0]:
            logps = [row[f"ref_{side}_logps"] for side in SIDES for row in rows]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float64)
        return batch

    def _pieces(self, k: int, row: Mapping[str, Any]) -> list[Piece]:
        prompt = torch.tensor(list(row["prompt_ids"]), dtype=torch.int64)
        answers = [torch.tensor(list(row[f"{side}_ids"]), dtype=torch.int64) for side in SIDES]
        for side, answer in zip(SIDES, answers, strict=True):
            if len(answer) - (len(prompt) == 0) < 1:
                raise ValueError(
                    f"row {row['row']}: {side} has no token that a prompt or BOS precedes"
                )
        return pieces_of_pair(k, prompt, answers, self.prefix_sharing)


def _label_columns(answers: Sequence[tuple[Tensor, Tensor]], tokens: int) -> dict[str, Tensor]:
    """``completion_labels`` and ``hidden_index`` into so many tokens, filled up to the longest answer."""
    width = max(len(labels) for labels, _ in answers)
    labels = torch.full((len(answers), width), IGNORE_INDEX)
    # What is not scored points to places of its own, one each: many gradients of 0 to one would queue up.
    index = torch.arange(len(answers) * width).view(len(answers), width) % tokens
    for k, (own, places) in enumerate(answers):
        labels[k, : len(own)] = own
        index[k, : len(own)] = places
    return {"completion_labels": labels, "hidden_index": index}
