"""Tokenised pairs → rows without padding between sequences, with each prompt once or twice.

Without sharing a row holds whole sequences, prompt + chosen or prompt + rejected. With ``prefix_sharing`` a
pair is one piece, [prompt | chosen | rejected]: both answers begin right after the prompt in position, and the
first token of each is scored from the prompt's last. Which tokens see which is told by ``groups`` and
``branches``; :mod:`fastpo.head.packed_attention` makes masks of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        ValueError: no rows, or an answer without a token to score.
    """

    pad_token_id: int
    prefix_sharing: bool = False
    one_row: bool = False
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("rows: got none, expected at least one pair")
        pieces = [piece for k, row in enumerate(rows) for piece in self._pieces(k, row)]
        placed = _arrange([len(piece.tokens) for piece in pieces], self.one_row)
        length = max(start + len(p.tokens) for p, (_, start) in zip(pieces, placed, strict=True))
        length += -length % self.pad_to_multiple_of
        shape = (1 + max(row for row, _ in placed), length)
        input_ids = torch.full(shape, self.pad_token_id)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        groups = torch.full(shape, -1, dtype=torch.int32)
        branches = torch.zeros(shape, dtype=torch.int8)
        answers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (side, pair) → labels, index
        for number, (piece, (row, start)) in enumerate(zip(pieces, placed, strict=True)):
            here = slice(start, start + len(piece.tokens))
            input_ids[row, here] = piece.tokens
            position_ids[row, here] = piece.positions
            groups[row, here] = number
            branches[row, here] = piece.branches
            for key, (labels, index) in piece.answers.items():
                answers[key] = labels, index + (row * length + start)
        batch = {
            "rows": torch.tensor([row["row"] for row in rows]),
            "input_ids": input_ids,
            "position_ids": position_ids,
            "groups": groups,
            "branches": branches,
        }
        batch |= _label_columns(
            [answers[side, k] for side in (0, 1) for k in range(len(rows))], shape
        )
        whole = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for row in rows for side in SIDES]
        batch["sequence_tokens"] = torch.tensor(sum(whole))
        if "ref_chosen_logps" in rows[0]:
            logps = [row[f"ref_{side}_logps"] for side in SIDES for row in rows]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float64)
        return batch

    def _pieces(self, k: int, row: Mapping[str, Any]) -> list[_Piece]:
        """What cannot be taken apart: a pair with its prompt, or each of its sequences."""
        prompt = torch.tensor(list(row["prompt_ids"]), dtype=torch.int64)
        answers = [torch.tensor(list(row[f"{side}_ids"]), dtype=torch.int64) for side in SIDES]
        for side, answer in zip(SIDES, answers, strict=True):
            if len(answer) - (len(prompt) == 0) < 1:
                raise ValueError(
                    f"row {row['row']}: {side} has no token that a prompt or BOS precedes"
                )
        if self.prefix_sharing and len(prompt):
            return [_shared(k, prompt, answers)]
        return [_single(k, side, prompt, answer) for side, answer in enumerate(answers)]


@dataclass(frozen=True)
class _Piece:
    tokens: Tensor  # (n,)
    positions: Tensor  # (n,)
    branches: Tensor  # (n,)
    # By (side, pair): labels (a,) and the place in the piece that scores each.
    answers: dict[tuple[int, int], tuple[Tensor, Tensor]]


def _single(k: int, side: int, prompt: Tensor, answer: Tensor) -> _Piece:
    tokens = torch.cat([prompt, answer])
    first = max(len(prompt), 1)  # of the labels; nothing comes before a sequence's first token
    places = torch.arange(len(tokens))
    return _Piece(
        tokens,
        places,
        torch.zeros_like(tokens),
        {(side, k): (tokens[first:], places[first - 1 : -1])},
    )


def _shared(k: int, prompt: Tensor, answers: Sequence[Tensor]) -> _Piece:
    begin = len(prompt)
    tokens = torch.cat([prompt, *answers])
    positions, branches, scored = [torch.arange(begin)], [torch.zeros_like(prompt)], {}
    at = begin
    for side, answer in enumerate(answers):
        positions.append(torch.arange(begin, begin + len(answer)))
        branches.append(torch.full_like(answer, side + 1))
        index = torch.arange(at - 1, at + len(answer) - 1)
        index[0] = begin - 1
        scored[side, k] = answer, index
        at += len(answer)
    return _Piece(tokens, torch.cat(positions), torch.cat(branches), scored)


def _arrange(lengths: Sequence[int], one_row: bool) -> list[tuple[int, int]]:
    """(row, start) of each piece: in one row, or in rows as long as the longest, in the first with room."""
    if one_row:
        starts = [0]
        for length in lengths[:-1]:
            starts.append(starts[-1] + length)
        return [(0, start) for start in starts]
    room = max(lengths)
    used: list[int] = []
    placed = [(0, 0)] * len(lengths)
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        row = next((r for r, n in enumerate(used) if n + lengths[k] <= room), len(used))
        if row == len(used):
            used.append(0)
        placed[k] = row, used[row]
        used[row] += lengths[k]
    return placed


def _label_columns(
    answers: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """``completion_labels`` and ``hidden_index``, filled up to the longest answer."""
    width = max(len(labels) for labels, _ in answers)
    labels = torch.full((len(answers), width), IGNORE_INDEX)
    # What is not scored points to places of its own, one each: many gradients of 0 to one would queue up.
    index = torch.arange(len(answers) * width).view(len(answers), width) % (shape[0] * shape[1])
    for k, (own, places) in enumerate(answers):
        labels[k, : len(own)] = own
        index[k, : len(own)] = places
    return {"completion_labels": labels, "hidden_index": index}
