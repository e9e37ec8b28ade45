"""The estimate beside real runs: packed rows, shared prompts, token budgets, LoRA on the head, offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from measured_runs import measured_bytes
from tiny_models import LENGTH, PAIRS, llama
from transformers import Gemma2Config

from fastpo.estimate import EstimateConfig
from fastpo.estimate import estimate as estimate_memory

SIMPO = {"loss_type": "simpo", "beta": 2.0}
CHECKPOINTS = {"gradient_checkpointing": True}
# Settings; what micro-steps look like where they are not two pairs of 128 tokens with a prompt of one.
RUNS: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "packed": (llama(), {"padding_free": True, **SIMPO}, {}),
    "shared": (
        llama(num_attention_heads=8),
        {"prefix_sharing": True, "attn_implementation": "eager", "gradient_accumulation_steps": 2},
        {"prompt": 40},
    ),
    "shared, long prompts": (llama(), {"prefix_sharing": True, **SIMPO}, {"prompt": 100}),
    "shared, two masks": (
        Gemma2Config(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=64,
        ),
        {"prefix_sharing": True, **SIMPO},
        {"prompt": 30},
    ),
    "long prompts": (llama(vocab_size=8000), SIMPO, {"prompt": 100}),
    # Three pairs of 116 tokens fill 696 of 700.
    "budget": (llama(), {"tokens_per_batch": 700, **SIMPO}, {"pairs": 3, "length": 116}),
    # A pair takes 2·122 − 50 = 194 tokens, three of them 582 of 583.
    "budget, shared": (
        llama(),
        {"tokens_per_batch": 583, "prefix_sharing": True, **SIMPO},
        {"pairs": 3, "length": 122, "prompt": 50},
    ),
    "LoRA on the head": (
        llama(vocab_size=8000),
        {"peft": {"r": 8, "target_modules": ["q_proj", "lm_head"]}},
        {},
    ),
    "offloaded": (
        llama(num_hidden_layers=6),
        {**CHECKPOINTS, "activation_offloading": True, "padding_free": True, **SIMPO},
        {},
    ),
    "DNPO, shared": (
        llama(vocab_size=4000),
        {"method": "dnpo", "noise_rank": 8, "prefix_sharing": True},
        {"prompt": 40},
    ),
}  # fmt: skip


def estimate_of(given: dict[str, Any], micro_step: dict[str, int]) -> Any:
    return estimate_memory(EstimateConfig(**given, prompt_length=micro_step.get("prompt", 1)))


@pytest.mark.parametrize("name", RUNS)
def test_within_a_tenth(name: str, settings: Callable[..., dict[str, Any]]) -> None:
    model_config, fields, micro_step = RUNS[name]
    given = settings(model_config, **fields)
    estimate = estimate_of(given, micro_step)
    assert estimate.sequences == 2 * micro_step.get("pairs", PAIRS)
    assert estimate.sequence_tokens == micro_step.get("length", LENGTH)
    measured = measured_bytes(given, **micro_step)
    print(
        f"{name}: estimate {estimate.total}, measured {measured}, {estimate.total / measured:.3f}"
    )
    assert estimate.total == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", ["shared, long prompts", "long prompts", "LoRA on the head"])
def test_the_comparison_sees_what_is_left_out(
    name: str, settings: Callable[..., dict[str, Any]]
) -> None:
    """With another layout, prompts that are scored, or the head as the base has it, it is off by more."""
    model_config, fields, micro_step = RUNS[name]
    given = settings(model_config, **fields)
    measured = measured_bytes(given, **micro_step)
    other = given | {"prefix_sharing": False}
    if name == "LoRA on the head":
        other = given | {"peft": {"r": 8, "target_modules": ["q_proj"]}}
    wrong = estimate_of(other, {} if name == "long prompts" else micro_step).total
    assert wrong != pytest.approx(measured, rel=0.1)
