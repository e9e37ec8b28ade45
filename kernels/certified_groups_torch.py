"""Which blocks and columns of a certified backward are worked on together, in PyTorch.

A group takes a few blocks of similar union; its columns are walked in pieces. Unions of growing size are nearly
nested (what a peaked row needs, flat rows need too), so in the order of the smallest block that needs a column
each block's columns lie nearly side by side: few pieces hold much that is not needed, a column is gathered once
for all blocks of the group, and the products are tall.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import CertifiedPlan, spans
from .nucleus import WORD_BITS, block_rows, column_mask, words


class Group(NamedTuple):
    """Rows whose products are made together: those of a few blocks that have a coefficient."""

    places: Tensor  # (R,) int64, block after block
    blocks: Tensor  # (B,) int64, largest union first
    starts: list[int]  # (B + 1): block k has the rows starts[k] to starts[k + 1] of the group
    dense: bool  # every block takes all columns


def make_groups(grad: Tensor, counts: Tensor, vocab: int, plan: CertifiedPlan) -> list[Group]:
    """The rows with a coefficient, blocks of similar union together, large ones first."""
    height = block_rows(grad.device)
    active = grad.nonzero().squeeze(1)
    block = torch.div(active, height, rounding_mode="floor")
    numbers, lengths = block.unique_consecutive(return_counts=True)
    places = active.split(lengths.tolist())
    order = torch.argsort(counts[numbers], descending=True, stable=True)
    groups = []
    for of_group in order.split(plan.group_rows // height) if len(order) else ():
        chosen = [places[k] for k in of_group.tolist()]
        starts = [0, *itertools.accumulate(len(p) for p in chosen)]
        blocks = numbers[of_group]
        dense = bool((counts[blocks] == vocab).all())
        groups.append(Group(torch.cat(chosen), blocks, starts, dense))
    return groups


class Piece(NamedTuple):
    """Some columns that a group needs, and which of its blocks need them."""

    columns: Tensor  # (C,) int64, relative to the slice of the vocabulary
    label: Tensor  # (R,) int64 in [0, C): where among them the row's label is
    inside: Tensor  # (R,) bool: whether it is there at all
    needed: Tensor  # (B, C) bool
    whole: list[bool]  # (B): the block needs all of them
    runs: list[tuple[int, int]]  # blocks first to last − 1 of which each needs some


def column_pieces(
    labels: Tensor,  # (R,)
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    vocab: int,
    v: slice,
    group: Group,
    length: int,
) -> Iterator[Piece]:
    """The columns of the slice v that the group needs, ``length`` at a time.

    They come in the order of the smallest block that needs them: the unions are nearly nested, so a piece is
    needed by most of its rows or by none.
    """
    width = v.stop - v.start
    needed = column_mask(columns[group.blocks, v.start // WORD_BITS : words(v.stop)], width)
    needed |= (counts[group.blocks] == vocab).unsqueeze(1)
    smallest = torch.full((width,), -1, device=labels.device)  # block that needs it; −1: none
    for k, of_block in enumerate(needed):
        smallest.masked_fill_(of_block, k)
    cols = torch.argsort(smallest, descending=True, stable=True)
    cols = cols[: int((smallest >= 0).sum())]
    position = torch.full((width + 1,), -1, device=labels.device)
    position[cols] = torch.arange(cols.numel(), device=labels.device)
    label = torch.where((labels >= v.start) & (labels < v.stop), labels - v.start, width)
    at_label = position[label]  # among cols, −1 where the label is elsewhere
    for piece in spans(cols.numel(), length):
        c = cols[piece]
        of_piece = needed[:, c]
        yield Piece(
            c,
            (at_label - piece.start).clamp_(0, c.numel() - 1),
            (at_label >= piece.start) & (at_label < piece.stop),
            of_piece,
            of_piece.all(dim=1).tolist(),
            list(_runs(of_piece.any(dim=1).tolist())),
        )


def keep_needed(tile: Tensor, piece: Piece, group: Group, first: int, last: int) -> None:
    """Zero what lies outside each block's own union in the rows of the blocks ``first`` to ``last`` − 1."""
    start = group.starts[first]
    for k in range(first, last):
        if not piece.whole[k]:
            tile[group.starts[k] - start : group.starts[k + 1] - start].mul_(piece.needed[k])


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of true flags."""
    places = itertools.groupby(range(len(flags)), flags.__getitem__)
    for flag, run in places:
        if flag:
            of_run = list(run)
            yield of_run[0], of_run[-1] + 1
