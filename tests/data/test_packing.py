"""Packed rows by hand, and batches under a budget of tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fastpo.data import PackedCollator, PreferenceCollator, TokenBudgetSampler

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12], "row": 40},
    {"prompt_ids": [13], "chosen_ids": [14], "rejected_ids": [15], "row": 2},
]


def test_shared_prompts_by_hand() -> None:
    batch = PackedCollator(0, prefix_sharing=True)(ROWS)
    assert batch["rows"].tolist() == [40, 2]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["groups"].tolist() == [[0] * 8, [1, 1, 1, -1, -1, -1, -1, -1]]
    assert batch["branches"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch["completion_labels"].tolist() == [
        [8, 9, -100], [14, -100, -100], [10, 11, 12], [15, -100, -100],
    ]  # fmt: skip
    scored = batch["completion_labels"] != -100
    # The first token of each answer is scored from the prompt's last one.
    assert batch["hidden_index"][scored].tolist() == [2, 3, 8, 2, 5, 6, 8]
    assert int(batch["sequence_tokens"]) == 5 + 6 + 2 + 2


def test_whole_sequences_by_hand() -> None:
    batch = PackedCollator(0, one_row=True)(ROWS)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 5, 6, 7, 10, 11, 12, 13, 14, 13, 15]
    ]  # fmt: skip
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1]]
    assert batch["groups"].tolist() == [[0] * 5 + [1] * 6 + [2] * 2 + [3] * 2]
    assert not batch["branches"].any()
    scored = batch["completion_labels"] != -100
    assert batch["completion_labels"][scored].tolist() == [8, 9, 14, 10, 11, 12, 15]
    assert batch["hidden_index"][scored].tolist() == [2, 3, 11, 7, 8, 9, 13]


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("one_row", [False, True])
def test_every_scored_token_and_its_context_is_there(
    sharing: bool, one_row: bool, seed: int
) -> None:
    """Read back from groups, branches and index, each sequence is what the padded batch holds."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 1000) for _ in range(draw.randint(low, high))]

    rows = [
        {
            "prompt_ids": ids(0 if k % 5 == 0 else 1, 9), "chosen_ids": ids(2, 7), "rejected_ids": ids(2, 7),
            "ref_chosen_logps": -1.0 - k, "ref_rejected_logps": -2.0 - k, "row": k,
        }
        for k in range(17)
    ]  # fmt: skip
    packed = PackedCollator(0, prefix_sharing=sharing, one_row=one_row)(rows)
    padded = PreferenceCollator(0)(rows)
    flat = {n: packed[n].flatten() for n in ("input_ids", "position_ids", "groups", "branches")}
    assert torch.equal(packed["ref_logps"], padded["ref_logps"])
    for k in range(2 * len(rows)):
        labels = padded["completion_labels"][k]
        own = packed["completion_labels"][k]
        assert own[own != -100].tolist() == labels[labels != -100].tolist()
        index = packed["hidden_index"][k][own != -100]
        last = int(index[-1])
        seen = (flat["groups"] == flat["groups"][last]) & (
            torch.arange(len(flat["groups"])) <= last
        )
        seen &= (flat["branches"] == 0) | (flat["branches"] == flat["branches"][last])
        context = flat["input_ids"][seen].tolist()
        sequence = padded["input_ids"][k][padded["attention_mask"][k].bool()].tolist()
        assert context == sequence[:-1]
        assert flat["position_ids"][seen].tolist() == list(range(len(context)))
    assert len(set(packed["hidden_index"].flatten().tolist())) > 1
    # Rows are no longer than the longest piece, and no two could be one.
    used = (packed["groups"] >= 0).sum(dim=1)
    if one_row:
        assert len(used) == 1
        assert int(used) == packed["input_ids"].shape[1]
    else:
        assert packed["input_ids"].shape[1] == int(used.max())
        shortest = used.sort().values[:2]
        assert len(used) == 1 or int(shortest.sum()) > int(used.max())


def test_an_answer_without_a_scored_token_is_named() -> None:
    rows = [{"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5], "row": 7}]
    for sharing in (False, True):
        with pytest.raises(ValueError, match="row 7: rejected has no token that a prompt or BOS"):
            PackedCollator(0, prefix_sharing=sharing)(rows)
    with pytest.raises(ValueError, match="rows: got none"):
        PackedCollator(0)([])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_keep_to_the_budget_and_give_ranks_equally_many(
    padded: bool, ranks: int, seed: int
) -> None:
    draw = random.Random(seed)
    tokens = [draw.randint(5, 100) for _ in range(500)]
    sampler = TokenBudgetSampler(tokens, 256, padded=padded, ranks=ranks, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert len(batches) % ranks == 0
    rows = [row for batch in batches for row in batch]
    assert set(rows) == set(range(500))
    assert len(rows) < 500 + ranks
    full = 0
    for step in range(0, len(batches), ranks):
        of_ranks = batches[step : step + ranks]
        assert len({len(batch) for batch in of_ranks}) == 1
        for batch in of_ranks:
            lengths = [tokens[row] for row in batch]
            cost = len(batch) * max(lengths) if padded else sum(lengths)
            assert cost <= 256
            full += cost > 256 - 100
    assert full > 0.8 * len(batches)  # the budget is used
    sampler.set_epoch(1)
    again = list(sampler)
    assert again != batches
    assert sorted(map(sorted, again)) == sorted(map(sorted, batches))
    sampler.set_epoch(0)
    assert list(sampler) == batches


def test_budgets_that_do_not_work_are_named() -> None:
    with pytest.raises(
        ValueError, match="tokens_per_batch: got 9, expected at least 10, what row 1"
    ):
        TokenBudgetSampler([5, 10], 9, padded=False)
    with pytest.raises(ValueError, match="dataset: got 2 rows for 3 processes"):
        TokenBudgetSampler([5, 10], 20, padded=False, ranks=3)
