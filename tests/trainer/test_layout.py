"""Padded, packed and prefix-sharing runs are the same runs; batches under a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from equal_runs import assert_equal_runs
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fastpo.trainer import PreferenceConfig, PreferenceTrainer
from fastpo.trainer.layout import label_positions, tokens_read

Runner = Callable[..., PreferenceTrainer]
LAYOUTS = [{"padding_free": True}, {"prefix_sharing": True}]
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "train_sampling_strategy": "sequential",
}


def trained(trainer: Runner, **settings: Any) -> PreferenceTrainer:
    run = trainer(**{**SGD, **settings})
    run.train()
    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "simpo", "beta": 2.0, "margin": "gamma", "gamma_beta_ratio": 0.4},
        {"precompute_ref_log_probs": True},
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}},
    ],
    ids=["live reference", "γ-SimPO", "precomputed", "accumulated", "LoRA"],
)
def test_a_layout_changes_nothing_but_the_work(
    layout: dict[str, Any], options: dict[str, Any], trainer: Runner, model: LlamaForCausalLM
) -> None:
    peft = options.get("peft")

    def start() -> Any:
        if peft is None:
            return None
        from peft import LoraConfig, get_peft_model

        copy = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        torch.manual_seed(5)
        return get_peft_model(copy, LoraConfig(task_type="CAUSAL_LM", **peft))

    options = {k: v for k, v in options.items() if k != "peft"} | {"model": start()}
    padded = trained(trainer, **options)
    options["model"] = start()
    other = trained(trainer, **options, **layout)
    assert_equal_runs(padded, other)
    first, second = (
        [e for e in r.state.log_history if "tokens/shared" in e] for r in (padded, other)
    )
    for before, after in zip(first, second, strict=True):
        assert before["tokens/shared"] == 0
        if "padding_free" in layout:
            assert after["tokens/padding"] <= before["tokens/padding"]
        assert (after["tokens/shared"] > 0.1) == ("prefix_sharing" in layout)
        assert (after["num_tokens"] < before["num_tokens"]) == ("prefix_sharing" in layout)
    assert other.evaluate(other.train_dataset)["eval_loss"] == pytest.approx(
        padded.evaluate(padded.train_dataset)["eval_loss"], abs=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["packed", "shared"])
@pytest.mark.parametrize("precomputed", [False, True])
def test_noise_does_not_depend_on_the_layout(
    layout: dict[str, Any], precomputed: bool, trainer: Runner
) -> None:
    noise = {
        "method": "dnpo", "loss_type": "spin", "noise_learning_rate": 0.5, "noise_sigma_limit": 1e9,
        "max_length": 64, "precompute_ref_log_probs": precomputed,
    }  # fmt: skip
    padded, other = trained(trainer, **noise), trained(trainer, **noise, **layout)
    assert_equal_runs(padded, other)
    generators = [r.loss_module.noise.weight for r in (padded, other)]
    torch.testing.assert_close(*generators, rtol=1e-4, atol=1e-6)
    assert generators[0].abs().max() > 0.01
    shifts = [e["noise/margin_shift"] for e in padded.state.log_history if "loss" in e]
    assert any(abs(s) > 1e-3 for s in shifts)


def test_positions_of_labels_are_those_of_the_sequence(trainer: Runner) -> None:
    batches = [
        run.data_collator([run.train_dataset[k] for k in range(4)])
        for run in (trainer(), trainer(prefix_sharing=True))
    ]
    positions = [label_positions(b)[b["completion_labels"] != -100] for b in batches]
    assert torch.equal(*positions)
    assert tokens_read(batches[1]) < tokens_read(batches[0])


def test_a_budget_of_tokens(trainer: Runner, pairs: datasets.Dataset) -> None:
    """Each step keeps to it, an epoch has every pair once, and the loss is the mean over the pairs."""
    run = trainer(
        tokens_per_batch=70, padding_free=True, max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=2, learning_rate=0.0, loss_type="simpo", beta=2.0,
    )  # fmt: skip
    seen: list[dict[str, torch.Tensor]] = []
    score = run._score
    run._score = lambda model, inputs: (seen.append(inputs), score(model, inputs))[1]  # type: ignore[method-assign]
    run.train()
    assert all(int(b["sequence_tokens"]) <= 70 for b in seen)
    rows = [b["rows"].tolist() for b in seen]
    half = len(rows) // 2
    for epoch in (rows[:half], rows[half:]):
        assert sorted(row for batch in epoch for row in batch) == sorted(pairs["row"])
    assert rows[:half] != rows[half:]
    assert len({len(r) for r in rows}) > 1
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    counts = [len(r) for r in rows[:half]]
    weights = [sum(counts[k : k + 2]) for k in range(0, half, 2)]
    # Weights do not move, so the mean over an epoch's pairs is that of one large batch.
    whole = trainer(
        per_device_train_batch_size=len(pairs), max_steps=1, learning_rate=0.0, loss_type="simpo", beta=2.0
    )  # fmt: skip
    whole.train()
    expected = next(e["loss"] for e in whole.state.log_history if "loss" in e)
    got = sum(w * v for w, v in zip(weights, losses[: len(weights)], strict=True)) / sum(weights)
    assert got == pytest.approx(expected, abs=2e-5)


def test_a_padded_budget(trainer: Runner) -> None:
    run = trainer(tokens_per_batch=80, max_steps=6)
    seen = []
    score = run._score
    run._score = lambda model, inputs: (
        seen.append(inputs["input_ids"].numel()),
        score(model, inputs),
    )[1]  # type: ignore[method-assign]
    run.train()
    assert max(seen) <= 80
    assert sum(seen) > 0.6 * 80 * len(seen)


def test_resumed_within_an_epoch_of_a_budget(trainer: Runner, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "tokens_per_batch": 70, "prefix_sharing": True, "max_steps": -1, "num_train_epochs": 2,
        "learning_rate": 0.05, "optim": "sgd",
    }  # fmt: skip
    whole = trainer(
        **settings, output_dir=str(tmp_path / "whole"), save_strategy="steps", save_steps=1
    )
    whole.train()
    steps = whole.state.max_steps
    for stop in (2, steps // 2 + 1):
        again = trainer(**settings, output_dir=str(tmp_path / f"again-{stop}"))
        again.train(str(tmp_path / f"whole/checkpoint-{stop}"))
        assert_equal_runs(whole, again)
        for name, parameter in whole.model.named_parameters():
            assert torch.equal(parameter, again.model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_batch": 0}, "tokens_per_batch: got 0, expected an integer ≥ 1"),
        (
            {"tokens_per_batch": 50, "train_sampling_strategy": "sequential"},
            "train_sampling_strategy: got 'sequential', expected random with tokens_per_batch",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    change: dict[str, Any], message: str, settings: Callable[..., PreferenceConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_a_budget_below_the_longest_pair_is_named(trainer: Runner) -> None:
    with pytest.raises(ValueError, match="tokens_per_batch: got 5, expected at least"):
        trainer(tokens_per_batch=5).train()


def test_a_router_is_refused(trainer: Runner, tokenizer: Any) -> None:
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef: got .* with packed rows, expected 0"
    ):
        trainer(model=MixtralForCausalLM(config), padding_free=True)
    run = trainer(model=MixtralForCausalLM(config), padding_free=True, router_aux_loss_coef=0.0)
    assert run.layout.packed
