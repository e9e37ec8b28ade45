"""Sequences in parts on two and four ranks against whole ones: log-probs, statistics, all gradients."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import sequence_ranks_worker
from ranks import finish, start

from fastpo.head.sequence_attention import part_of
from fastpo.ops.certified import DEFAULT_TOL
from fastpo.trainer import PreferenceConfig
from fastpo.trainer.sequence_parallel import sequence_size

EXACT = 5e-6  # of float32 sums taken in another order


@pytest.fixture(scope="module", params=[2, 4])
def found(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """The number of ranks, and what ``sequence_ranks_worker`` writes."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    finish([start("sequence_ranks_worker.py", str(request.param), out)])
    return request.param, json.loads(out.read_text())


def test_parts_equal_the_whole(found: tuple[int, dict[str, Any]]) -> None:
    ranks, cases = found
    compared = [name for name in cases if any(family in name for family in ("Llama", "GPT-2"))]
    compared += [n for n in cases if n.startswith(("Qwen3 ", "Mistral ", "Gemma3 "))]
    assert len(compared) == (17 if ranks == 2 else 9)
    for name in compared:
        for kind, difference in cases[name].items():
            if not kind.endswith("itself"):
                assert difference <= EXACT, (name, kind)


def test_a_certified_backward_keeps_its_promise_in_parts(
    found: tuple[int, dict[str, Any]],
) -> None:
    seen = found[1]["certified"]
    assert 0 < seen["dropped itself"] <= DEFAULT_TOL
    assert 0 < seen["active share itself"] <= 1
    assert seen["log-probs"] <= EXACT
    assert 0 < seen["gradient"] <= 4 * DEFAULT_TOL  # parts have other blocks of rows


def test_a_planted_fault_is_seen(found: tuple[int, dict[str, Any]]) -> None:
    for fault in sequence_ranks_worker.FAULTS:
        largest = max(found[1][fault]["log-probs"], found[1][fault]["gradient"])
        assert largest > 1000 * EXACT, fault


def test_what_cannot_be_served_is_refused(found: tuple[int, dict[str, Any]]) -> None:
    ranks, messages = found[0], found[1]["refusals"]
    start = f"sequence_parallel_size: got {ranks}"
    assert messages["heads"].startswith(f"{start}, expected a divisor of the 3 attention heads")
    assert messages["eager"].startswith(f"{start} with attn_implementation 'eager'")
    for name, reason in {
        "longrope": "its rotary embedding (longrope) depends on the longest position",
        "dynamic": "its rotary embedding (dynamic) depends on the longest position",
        "chunks": "it has layers of the kind chunked_attention",
    }.items():
        assert messages[name].startswith(f"{start}, expected 1 for LlamaForCausalLM: {reason}")
    assert "does not give the parts of a sequence what it gives the whole" in messages["recurrent"]
    assert messages["ranks"] == (
        f"sequence_parallel_size: got {ranks + 1} with {ranks} processes, expected a divisor of them"
    )


@pytest.mark.parametrize("size", [0, -2, 1.5, "two"])
def test_a_size_that_is_none(size: Any) -> None:
    with pytest.raises(
        ValueError, match=r"sequence_parallel_size: got .*, expected an integer ≥ 1"
    ):
        PreferenceConfig(sequence_parallel_size=size, use_cpu=True)


def test_noise_is_not_taken_in_parts() -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size: got 2, expected 1 with method"):
        PreferenceConfig(sequence_parallel_size=2, method="dnpo", use_cpu=True)


@pytest.mark.parametrize(
    ("parallelism", "settings", "message"),
    [
        ({"sp_size": 2}, {}, "parallelism_config: got sp_size 2, expected 1 and the field"),
        (
            {"cp_size": 2},
            {"sequence_parallel_size": 2},
            "sequence_parallel_size: got 2 with cp_size 2",
        ),
        ({"cp_size": 4}, {}, "parallelism_config: got cp_size 4 on as many processes"),
        ({"cp_size": 2, "tp_size": 2}, {}, "parallelism_config: got cp_size 2 and tp_size 2"),
        (
            {"cp_size": 2},
            {"padding_free": True},
            "parallelism_config: got cp_size 2 with packed rows",
        ),
        (
            {"cp_size": 2},
            {"prefix_sharing": True},
            "parallelism_config: got cp_size 2 with packed rows",
        ),
        (
            {"cp_size": 2},
            {"method": "dnpo"},
            "parallelism_config: got cp_size 2, expected 1 with method",
        ),
    ],
)
def test_parallelism_of_accelerate_that_does_not_go_with_pairs(
    parallelism: dict[str, int], settings: dict[str, Any], message: str
) -> None:
    sizes = {"cp_size": 1, "sp_size": 1, "tp_size": 1} | parallelism
    enabled = {f"{name[:2]}_enabled": size > 1 for name, size in sizes.items()}
    accelerator: Any = SimpleNamespace(
        parallelism_config=SimpleNamespace(**sizes, **enabled), num_processes=4
    )
    with pytest.raises(ValueError, match=message):
        sequence_size(PreferenceConfig(use_cpu=True, **settings), accelerator)
    accelerator.parallelism_config = None
    asked = settings.get("sequence_parallel_size", 1)
    assert sequence_size(PreferenceConfig(use_cpu=True, **settings), accelerator) == asked


def test_tokens_that_cannot_be_shared_out() -> None:
    import torch

    with pytest.raises(ValueError, match="input_ids: got 5 tokens, expected a multiple of 2"):
        part_of({"input_ids": torch.zeros(1, 5, dtype=torch.int64)}, 0, 2)
