"""How sequences lie in packed rows: pieces that cannot be taken apart, one after another.

A piece is a whole sequence, prompt + answer, or with a shared prompt a pair, [prompt | chosen | rejected]: both
answers begin right after the prompt in position, and the first token of each is scored from the prompt's last.
This module needs PyTorch alone, as both the data's collator and the trial of a model's attention build rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Answer = tuple[int, int]  # side (0 chosen, 1 rejected), number of the pair


class Piece(NamedTuple):
    """What cannot be taken apart, n tokens."""

    tokens: Tensor  # (n,) int64
    positions: Tensor  # (n,) int64
    branches: Tensor  # (n,) int64: 0, and with a shared prompt 1 in the chosen and 2 in the rejected answer
    # Labels (a,) int64 and the place in the piece (a,) int64 whose hidden state scores each.
    answers: dict[Answer, tuple[Tensor, Tensor]]


class PackedRows(NamedTuple):
    """R rows of L tokens."""

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64, from 0 in each sequence
    groups: Tensor  # (R, L) int32: the number of the piece that a token belongs to, −1 on padding
    branches: Tensor  # (R, L) int8
    # As in a piece, places in the flattened rows (R·L).
    answers: dict[Answer, tuple[Tensor, Tensor]]


def pieces_of_pair(
    pair: int, prompt: Tensor, answers: Sequence[Tensor], share_prompt: bool
) -> list[Piece]:
    """The pieces of a pair's prompt (p,) and its two answers (a,), all int64.

    An empty prompt cannot be shared: the answers are then sequences of their own, and their first tokens are
    not scored.
    """
    if share_prompt and len(prompt):
        return [_shared(pair, prompt, answers)]
    return [_single((side, pair), prompt, answer) for side, answer in enumerate(answers)]


def _single(key: Answer, prompt: Tensor, answer: Tensor) -> Piece:
    tokens = torch.cat([prompt, answer])
    first = max(len(prompt), 1)  # of the labels; nothing comes before a sequence's first token
    places = torch.arange(len(tokens))
    scored = {key: (tokens[first:], places[first - 1 : -1])}
    return Piece(tokens, places, torch.zeros_like(tokens), scored)


def _shared(pair: int, prompt: Tensor, answers: Sequence[Tensor]) -> Piece:
    begin = len(prompt)
    tokens = torch.cat([prompt, *answers])
    positions, branches, scored = [torch.arange(begin)], [torch.zeros_like(prompt)], {}
    at = begin
    for side, answer in enumerate(answers):
        positions.append(torch.arange(begin, begin + len(answer)))
        branches.append(torch.full_like(answer, side + 1))
        index = torch.arange(at - 1, at + len(answer) - 1)
        index[0] = begin - 1
        scored[side, pair] = answer, index
        at += len(answer)
    return Piece(tokens, torch.cat(positions), torch.cat(branches), scored)


def lay_out(
    pieces: Sequence[Piece], pad_token_id: int, one_row: bool, multiple: int = 1
) -> PackedRows:
    """All pieces in one row, or in rows as long as the longest, filled up with others; at least one piece.

    Rows are rounded up to a ``multiple`` of tokens.
    """
    placed = _arrange([len(piece.tokens) for piece in pieces], one_row)
    length = max(start + len(p.tokens) for p, (_, start) in zip(pieces, placed, strict=True))
    length += -length % multiple
    shape = (1 + max(row for row, _ in placed), length)
    rows = PackedRows(
        torch.full(shape, pad_token_id),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -1, dtype=torch.int32),
        torch.zeros(shape, dtype=torch.int8),
        {},
    )
    for number, (piece, (row, start)) in enumerate(zip(pieces, placed, strict=True)):
        here = slice(start, start + len(piece.tokens))
        rows.input_ids[row, here] = piece.tokens
        rows.position_ids[row, here] = piece.positions
        rows.groups[row, here] = number
        rows.branches[row, here] = piece.branches
        for key, (labels, index) in piece.answers.items():
            rows.answers[key] = labels, index + (row * length + start)
    return rows


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
