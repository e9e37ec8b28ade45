"""The Triton kernels on shards of a vocabulary, under the interpreter, in two gloo processes.

Tiles are 16 rows × 32 columns × 16 there. The budget is so small that the certified forward takes 16 rows at a
time if it plans for the wider shard, and 32 in the other if each plans for its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_vocab_parallel import (
    CAPPED,
    PROMISED,
    check_gradients,
    check_near,
    check_promise,
    check_results,
    forbidden,
    problem,
    run_ranks,
    seeded,
)

BUDGET = 5000


def triton_cases() -> dict[str, dict[str, Any]]:
    few: dict[str, Any] = {"rows": 9, "sizes": [40, 25], "dtype": torch.float32}
    promised = PROMISED | few
    low = few | {"dtype": torch.bfloat16}
    return {
        "exact": problem(2, **few),
        "exact, capped": problem(2, transform=CAPPED, **few),
        "exact, bfloat16": problem(2, **low),
        "exact, a forbidden shard": forbidden(2, **few),
        "certified": problem(2, **promised),
        "certified, capped": problem(2, transform=CAPPED, **promised),
        "certified, a forbidden shard": forbidden(2, **few | {"backward": "certified"}),
        "certified, checked": problem(2, check=True, **few | {"backward": "certified"}),
        "certified, many rows": problem(2, **few | {"rows": 70, "backward": "certified"}),
        "certified, bfloat16": problem(2, backward="auto", **low),
        "fault": problem(2, spread=0.1, **promised) | {"fault": "whole_tolerance_for_every_shard"},
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    seeded(0)
    cases, folder = triton_cases(), tmp_path_factory.mktemp("ranks")
    ranks = run_ranks(2, {"cases": cases, "budget": BUDGET}, folder, TRITON_INTERPRET="1")
    return {name: (case, [rank["cases"][name] for rank in ranks]) for name, case in cases.items()}


@pytest.mark.parametrize("name", [*triton_cases()])
def test_equals_one_process(found: dict[str, Any], name: str) -> None:
    case, shares = found[name]
    if name == "fault":
        with pytest.raises(AssertionError):
            check_promise(case, shares)
    elif case.get("per_row"):
        check_promise(case, shares)
    elif case["options"]["backward"] == "exact":
        check_gradients(case, shares, check_results(case, shares))
    else:
        check_near(case, shares)
