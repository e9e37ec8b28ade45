"""The largest micro-step of a run: how many sequences, how they lie, what is scored and what is offloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tiny_models import LENGTH, PAIRS, llama

from fastpo.estimate import Estimate, EstimateConfig, estimate

Settings = Callable[..., dict[str, Any]]
SIMPO = {"loss_type": "simpo", "beta": 2.0}


@pytest.mark.parametrize(
    ("fields", "micro_step"),
    [
        ({}, (4, 128, 4, 128)),
        ({"padding_free": True}, (4, 128, 4, 128)),
        ({"padding_free": True, "attn_implementation": "flash_attention_2"}, (4, 128, 1, 512)),
        ({"prefix_sharing": True}, (4, 128, 2, 255)),
        ({"prefix_sharing": True, "prompt_length": 28}, (4, 128, 2, 228)),
        ({"prefix_sharing": True, "prompt_length": 28, "attn_implementation": "flex_attention"},
         (4, 128, 1, 456)),
        ({"tokens_per_batch": 1024}, (8, 128, 8, 128)),
        ({"tokens_per_batch": 900}, (8, 112, 8, 112)),
        ({"tokens_per_batch": 100}, (2, 50, 2, 50)),  # longer pairs would be refused by the run
        ({"tokens_per_batch": 300, "prefix_sharing": True, "prompt_length": 28}, (4, 89, 2, 150)),
    ],
)  # fmt: skip
def test_the_largest_micro_step(
    fields: dict[str, Any], micro_step: tuple[int, ...], estimated: Callable[..., Estimate]
) -> None:
    run = estimated(**fields, **SIMPO)
    assert (run.sequences, run.sequence_tokens, run.rows, run.row_tokens) == micro_step


def test_attention_without_a_mask(estimated: Callable[..., Estimate]) -> None:
    long = {"max_length": 1024, "per_device_train_batch_size": 1, "prefix_sharing": True, **SIMPO}
    masked, blocks = (
        estimated(attn_implementation=name, **long).most["activations"]
        for name in ("sdpa", "flex_attention")
    )
    # Bytes for every pair of places in a row, at a moment at which others are not at their most.
    assert 0.5 * 2047**2 < masked - blocks < 2 * 2047**2
    assert estimated(attn_implementation="flash_attention_2", padding_free=True).total > 0


def test_prompts_are_not_scored(estimated: Callable[..., Estimate]) -> None:
    all_scored, few = (
        estimated(backward="certified", prompt_length=n, **SIMPO).most["loss layer"]
        for n in (1, 100)
    )
    assert few < 0.4 * all_scored


# ---- Offloading ----


@pytest.mark.parametrize(
    "option",
    [{"activation_offloading": True}, {"gradient_checkpointing_kwargs": {"offload": True}}],
)
def test_what_waits_on_the_host(option: dict[str, Any], settings: Settings) -> None:
    given = settings(llama(num_hidden_layers=6), gradient_checkpointing=True, **SIMPO)
    given |= {"use_cpu": False, "bf16": False}
    stays, goes = (estimate(EstimateConfig(**given, **more)) for more in ({}, option))
    hidden = 2 * PAIRS * LENGTH * 128 * 4  # bytes of a layer's input
    assert (stays.host_memory, goes.host_memory) == (0, 6 * hidden)
    # The layer that is at work has its own back, and the last one's output is there anyway.
    saved = stays.most["activations"] - goes.most["activations"]
    assert 4 * hidden <= saved <= 6 * hidden
    on_host = estimate(EstimateConfig(**(given | {"use_cpu": True}), **option))
    assert on_host.host_memory == 0
    assert on_host.most["activations"] == pytest.approx(stays.most["activations"], rel=0.05)
