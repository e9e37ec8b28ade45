"""Batches of as many pairs as a budget of tokens allows, the same number on every rank."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

WINDOW = 4096  # rows that are sorted by length together


class TokenBudgetSampler:
    """Rows of each micro-step, for all ranks in turn: step 0 of rank 0, of rank 1, …, step 1 of rank 0, …

    Rows of like length come together, so every rank of a step has equally many and about the same work, and
    means over the ranks stay means over pairs. Which rows make a step is fixed, the order of the steps changes
    with the epoch. Where rows are left for less than one per rank, the first ones come once more.

    Args:
        tokens: of each row, all that the model reads of it.
        budget: tokens that one rank reads in a micro-step, at most.
        padded: whether rows are padded to the longest of the step (``tokens`` is then what the longest takes).
        ranks: processes that train.
        seed: of the order.

    Raises:
        ValueError: a row that is larger than the budget, or fewer rows than ranks.
    """

    def __init__(
        self, tokens: Sequence[int], budget: int, *, padded: bool, ranks: int = 1, seed: int = 0
    ) -> None:
        largest = max(range(len(tokens)), key=tokens.__getitem__)
        if tokens[largest] > budget:
            raise ValueError(
                f"tokens_per_batch: got {budget}, expected at least {tokens[largest]}, what row {largest} of "
                "the data set takes"
            )
        if len(tokens) < ranks:
            raise ValueError(
                f"dataset: got {len(tokens)} rows for {ranks} processes, expected more"
            )
        self.ranks, self.seed, self.epoch = ranks, seed, 0
        self._steps = list(_steps(tokens, budget, padded, ranks, seed))

    @property
    def sampler(self) -> TokenBudgetSampler:
        """Itself: accelerate looks for ``set_epoch`` here."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of all ranks in an epoch."""
        return len(self._steps) * self.ranks

    def __iter__(self) -> Iterator[list[int]]:
        steps = list(self._steps)
        random.Random(f"{self.seed}/{self.epoch}").shuffle(steps)
        for step in steps:
            for rank in range(self.ranks):
                yield step[rank :: self.ranks]


def _steps(
    tokens: Sequence[int], budget: int, padded: bool, ranks: int, seed: int
) -> Iterator[list[int]]:
    """Rows of one step of all ranks, longest first; rank r gets every ``ranks``-th from r on."""
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    rows = iter(order)
    left: list[int] = []
    while window := list(islice(rows, WINDOW)):
        left = sorted(left + window, key=lambda row: -tokens[row])
        while len(left) >= ranks:
            # The first rank's rows are the longest at every place, so what fits there fits everywhere.
            own = [tokens[row] for row in left[::ranks]]
            costs = ((n + 1) * own[0] for n in range(len(own))) if padded else accumulate(own)
            fits = sum(1 for _ in _while_at_most(costs, budget))
            count = ranks * min(fits, len(left) // ranks)
            yield left[:count]
            left = left[count:]
    if left:
        yield left + order[: ranks - len(left)]


def _while_at_most(costs: Iterator[int], budget: int) -> Iterator[int]:
    for cost in costs:
        if cost > budget:
            return
        yield cost
