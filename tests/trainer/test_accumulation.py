"""Gradient accumulation against one large batch: losses, gradient norms and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
from equal_runs import assert_equal_runs

from fastpo.trainer import PreferenceTrainer

PER_PAIR = ["dpo", "simpo", "ipo", "robust", "apo_zero", "sppo_hard"]


def run(trainer: Callable[..., PreferenceTrainer], **settings: Any) -> PreferenceTrainer:
    # Plain SGD: Adam would turn a difference of 1e-9 in a tiny gradient into one of the learning rate.
    made = trainer(
        optim="sgd", learning_rate=0.05, train_sampling_strategy="sequential", num_train_epochs=2,
        max_steps=-1, **settings,
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("loss_type", PER_PAIR)
def test_equals_one_large_batch(
    loss_type: str, trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "train_dataset": pairs.select(range(20))}
    if loss_type == "robust":
        options["label_smoothing"] = 0.1
    large = run(trainer, per_device_train_batch_size=10, **options)
    small = run(trainer, per_device_train_batch_size=2, gradient_accumulation_steps=5, **options)
    assert large.state.global_step == 4
    assert_equal_runs(small, large)


@pytest.mark.parametrize(
    ("count", "size", "steps"),
    [(14, 2, 5), (13, 4, 2), (9, 4, 3), (11, 3, 3)],
    ids=["fewer micro-steps", "a smaller one", "a single one", "both"],
)
def test_equals_one_large_batch_where_the_last_window_is_short(
    count: int,
    size: int,
    steps: int,
    trainer: Callable[..., PreferenceTrainer],
    pairs: datasets.Dataset,
) -> None:
    rows = pairs.select(range(count))
    large = run(trainer, train_dataset=rows, per_device_train_batch_size=size * steps)
    small = run(
        trainer,
        train_dataset=rows,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
    )
    assert small.state.global_step == large.state.global_step == 2 * -(-count // (size * steps))
    assert_equal_runs(small, large)


def test_batch_coupled_losses_are_taken_per_micro_step(
    trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    """As documented, and as their authors do: the two runs differ once policy and reference differ."""
    rows = pairs.select(range(12))
    large, small = (
        run(
            trainer, train_dataset=rows, loss_type="kto_pair", beta=1.0,
            per_device_train_batch_size=12 // k, gradient_accumulation_steps=k,
        )
        for k in (1, 4)
    )  # fmt: skip
    second = [[e["loss"] for e in r.state.log_history if "loss" in e][1] for r in (large, small)]
    assert second[0] != pytest.approx(second[1], abs=1e-6)
