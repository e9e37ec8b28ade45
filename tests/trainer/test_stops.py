"""A number that is not finite stops training before the optimiser step, and the last checkpoint stays good."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastpo.trainer import PreferenceTrainer
from fastpo.trainer.checkpoint import find_resume_point

Runner = Callable[..., PreferenceTrainer]


class Poison(TrainerCallback):
    """From a given step on, one sequence of every batch has a bad number in its last hidden states."""

    def __init__(self, step: int, value: float, sequence: int) -> None:
        self.step, self.value, self.sequence = step, value, sequence

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        norm = kwargs["model"].model.norm
        if state.global_step == self.step:
            norm.register_forward_hook(self._spoil)

    def _spoil(self, module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
        spoilt = torch.zeros_like(hidden)
        spoilt[self.sequence] = self.value
        return hidden + spoilt


def watched_rows(run: PreferenceTrainer, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Data rows of every micro-step, filled in while the run goes on."""
    seen: list[list[int]] = []
    original = run.compute_loss

    def watch(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["rows"].tolist())
        return original(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run, "compute_loss", watch)
    return seen


@pytest.mark.parametrize("margin", ["fixed", "gamma"])
@pytest.mark.parametrize(
    ("value", "half"), [(math.nan, "chosen"), (math.nan, "rejected"), (math.inf, "rejected")]
)
def test_bad_hidden_state_stops_with_step_and_row(
    value: float,
    half: str,
    margin: str,
    trainer: Runner,
    pairs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison = Poison(3, value, sequence=2 if half == "chosen" else 4 + 2)
    rows = pairs.select(range(24))
    run = trainer(
        train_dataset=rows, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2,
        max_steps=6, loss_type="simpo", margin=margin, callbacks=[poison],
    )  # fmt: skip
    seen = watched_rows(run, monkeypatch)
    weights: dict[str, Tensor] = {}

    class Remember(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights.update({k: v.clone() for k, v in kwargs["model"].state_dict().items()})

    run.add_callback(Remember())
    with pytest.raises(FloatingPointError) as stopped:
        run.train()
    first = seen[6]  # the first micro-step of the fourth optimiser step
    last = tmp_path / "run" / "checkpoint-3"
    assert str(stopped.value) == (
        "training stopped before optimiser step 4: the loss is nan in micro-step 1 of 2, "
        f"data rows {first[2]}. "
        f"No weight was changed by it; the last checkpoint is {last}"
    )
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert find_resume_point(tmp_path / "run", "auto") == last
    resumed = trainer(
        train_dataset=rows,
        gradient_accumulation_steps=2,
        max_steps=6,
        loss_type="simpo",
        margin=margin,
    )
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 6


def test_bad_gradient_of_a_finite_loss_stops_too(trainer: Runner) -> None:
    class BadGradient(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                weight = kwargs["model"].model.embed_tokens.weight
                weight.register_hook(lambda grad: grad * math.nan)

    for clip in (1.0, 0.0):
        run = trainer(callbacks=[BadGradient()], max_grad_norm=clip)
        with pytest.raises(
            FloatingPointError,
            match=r"step 2: the loss is finite but the gradient's norm is nan, data rows 1",
        ):
            run.train()
        assert all(p.isfinite().all() for p in run.model.parameters())


def test_bad_reference_stops(trainer: Runner) -> None:
    run = trainer()
    with torch.no_grad():
        run.ref_model.lm_head.weight.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match=r"step 1: the loss is nan .* there is no checkpoint yet"
    ):
        run.train()
