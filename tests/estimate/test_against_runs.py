"""The estimate beside what PyTorch's allocator is asked for in a real run of two optimiser steps, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured_runs import measured_bytes
from tiny_models import llama
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, Qwen3MoeConfig

from fastpo.estimate import EstimateConfig, ledger
from fastpo.estimate import estimate as estimate_memory

SIMPO = {"loss_type": "simpo", "beta": 2.0}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpo": (llama(), {}),
    "dpo-checkpointing": (llama(num_hidden_layers=6), {"gradient_checkpointing": True}),
    "dpo-accumulated-eager": (
        llama(num_attention_heads=8),
        {"gradient_accumulation_steps": 2, "attn_implementation": "eager"},
    ),
    "simpo-tied": (llama(vocab_size=8000, tie_word_embeddings=True), SIMPO),
    "simpo-large-vocabulary": (llama(vocab_size=16_000, hidden_size=64), SIMPO),
    "lora": (llama(), {"peft": {"r": 8}}),
    "lora-saved-head": (llama(), {"peft": {"r": 8, "modules_to_save": ["lm_head"]}}),
    "bf16-autocast": (llama(), {"bf16": True}),
    "bf16-weights-sgd": (llama(), {"dtype": "bfloat16", "optim": "sgd"}),
    "dnpo": (llama(vocab_size=8000), {"method": "dnpo", "noise_rank": 8}),
    "gemma2": (
        Gemma2Config(
            vocab_size=3000, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        ),
        SIMPO,
    ),
    "gpt2-adafactor": (
        GPT2Config(vocab_size=3000, n_embd=96, n_layer=3, n_head=4, n_positions=256),
        SIMPO | {"optim": "adafactor"},
    ),
    "mixture-of-experts": (
        Qwen3MoeConfig(
            vocab_size=3000, hidden_size=96, moe_intermediate_size=64, num_experts=4,
            num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, intermediate_size=256,
        ),
        SIMPO,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_within_a_tenth(name: str, settings: Callable[..., dict[str, Any]]) -> None:
    model_config, fields = RUNS[name]
    given = settings(model_config, **fields)
    estimate = estimate_memory(EstimateConfig(**given))
    measured = measured_bytes(given)
    print(
        f"{name}: estimate {estimate.total}, measured {measured}, {estimate.total / measured:.3f}"
    )
    assert estimate.total == pytest.approx(measured, rel=0.1)


def test_the_comparison_sees_what_is_left_out(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the workspace of the loss layer, or without the optimizer's state, it is off by more."""
    given = settings(*RUNS["simpo-large-vocabulary"][:1], **SIMPO)
    measured = measured_bytes(given)
    whole = estimate_memory(EstimateConfig(**given))
    assert whole.at_peak["optimizer"] > 0.1 * measured
    original = ledger.Ledger.__init__
    monkeypatch.setattr(
        ledger.Ledger, "__init__", lambda self, workspace: original(self, lambda *_: 0)
    )
    assert estimate_memory(EstimateConfig(**given)).total < 0.9 * measured


def test_the_weights_are_never_read(
    settings: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = settings(llama())
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["config.json"]
    estimate = estimate_memory(EstimateConfig(**given))
    model = AutoModelForCausalLM.from_config(llama())
    assert estimate.parameters == estimate.trained == model.num_parameters()
