"""The trainer's loss against dense arithmetic on full logits, losses of every kind, and metrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.trainer import PreferenceTrainer

BATCH = 5


def dense_sums(
    model: torch.nn.Module, rows: Mapping[str, Any], answer: str
) -> tuple[Tensor, Tensor]:
    """Log-prob sums and lengths of one answer per row, from full logits, one unpadded row at a time."""
    sums, lengths = [], []
    for prompt, ids in zip(rows["prompt_ids"], rows[answer], strict=True):
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
        scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(scored.gather(1, torch.tensor(ids)[:, None]).sum())
        lengths.append(len(ids))
    return torch.stack(sums), torch.tensor(lengths, dtype=torch.float64)


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def dense_loss(
    loss_type: str, policy: torch.nn.Module, ref: torch.nn.Module, rows: Mapping[str, Any]
) -> Tensor:
    chosen, chosen_lengths = dense_sums(policy, rows, "chosen_ids")
    rejected, rejected_lengths = dense_sums(policy, rows, "rejected_ids")
    with torch.no_grad():
        gap_ref = dense_sums(ref, rows, "chosen_ids")[0] - dense_sums(ref, rows, "rejected_ids")[0]
    beta, gamma0 = 0.7, 0.7 * 0.4
    if "simpo" in loss_type:
        gaps = beta * (chosen / chosen_lengths - rejected / rejected_lengths)
        margin: Tensor | float = gamma0
    else:
        gaps = beta * (chosen - rejected - gap_ref)
        margin = 0.0
    if loss_type.startswith("gamma"):
        gamma = fastpo.solve_margins(gaps.detach(), gamma0, 3.0)
        margin = gamma if "simpo" in loss_type else gamma - gamma0
    return -logsigmoid(gaps - margin).mean()


@pytest.mark.parametrize("loss_type", ["dpo", "simpo", "gamma-dpo", "gamma-simpo"])
def test_first_step_equals_dense_arithmetic(
    loss_type: str, trainer: Callable[..., PreferenceTrainer], model: Any, pairs: datasets.Dataset
) -> None:
    reference = perturbed(model)
    rows = pairs.select(range(BATCH))
    expected = dense_loss(loss_type, model, reference, rows[:])
    expected.backward()
    run = trainer(
        ref_model=None if "simpo" in loss_type else reference,
        train_dataset=rows,
        per_device_train_batch_size=BATCH,
        loss_type=loss_type.removeprefix("gamma-"),
        margin="gamma" if loss_type.startswith("gamma") else "fixed",
        beta=0.7,
        gamma_beta_ratio=None if loss_type == "dpo" else 0.4,
        gamma_tau=3.0,
        max_steps=1,
        max_grad_norm=1e9,
        optim="sgd",
        learning_rate=1.0,
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        step = before[name] - run.model.get_parameter(name)
        assert parameter.grad is not None
        torch.testing.assert_close(step, parameter.grad, rtol=1e-4, atol=1e-5)
    assert any(p.grad.abs().max() > 1e-3 for p in model.parameters() if p.grad is not None)


def test_policy_equal_to_its_reference_loses_log_two(
    trainer: Callable[..., PreferenceTrainer],
) -> None:
    run = trainer(max_steps=1)
    run.train()
    first = run.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dpo"},
        {"loss_type": "dpo", "margin": "gamma", "gamma_scope": "batch"},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "simpo", "beta": 2.0, "margin": "gamma", "gamma_sample_size": 8},
        {"loss_type": "orpo"},
        {"loss_type": "beta_dpo"},
        {"loss_type": "kto_pair"},
        {"loss_type": "exo_pair", "label_smoothing": 1e-3},
        {"loss_type": "rdpo", "loss_kwargs": {"rdpo_alpha": 0.01}},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_losses_train(
    options: dict[str, Any], trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    rows = pairs.select(range(8))
    run = trainer(train_dataset=rows, per_device_train_batch_size=8, max_steps=8, **options)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert (
        run.state.log_history[-2]["rewards/margins"] > run.state.log_history[0]["rewards/margins"]
    )


def test_metrics_have_trls_names(trainer: Callable[..., PreferenceTrainer]) -> None:
    run = trainer(max_steps=2, loss_type="simpo", margin="gamma", sft_weight=0.1)
    run.train()
    expected = {
        "loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "entropy",
        "mean_token_accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies", "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected",
        "nll_loss", "gamma/mean", "gamma/std", "gamma/min", "gamma/max", "tokens/shared", "tokens/padding",
    }  # fmt: skip
    assert set(run.state.log_history[0]) == expected


def test_metrics_are_means_over_the_window_and_tokens_a_running_total(
    trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    every = trainer(max_steps=4, gradient_accumulation_steps=2)
    every.train()
    halved = trainer(max_steps=4, gradient_accumulation_steps=2, logging_steps=2)
    halved.train()
    fine = [e for e in every.state.log_history if "loss" in e]
    coarse = [e for e in halved.state.log_history if "loss" in e]
    assert [e["step"] for e in coarse] == [2, 4]
    # 30 pairs in batches of 4: an optimiser step has 8 pairs, the epoch's last one 6.
    for (one, two), both, weights in zip(
        [fine[:2], fine[2:]], coarse, [(8, 8), (8, 6)], strict=True
    ):
        for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "rewards/accuracies"):
            mean = (weights[0] * one[name] + weights[1] * two[name]) / sum(weights)
            assert both[name] == pytest.approx(mean, rel=1e-9), name
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in pairs
    )
    assert fine[-1]["num_tokens"] == coarse[-1]["num_tokens"] == tokens


def test_steps_after_the_last_log_line_are_logged_at_the_end(
    trainer: Callable[..., PreferenceTrainer],
) -> None:
    def lines(**settings: Any) -> list[dict[str, float]]:
        run = trainer(**settings)
        run.train()
        return [e for e in run.state.log_history if "loss" in e]

    fine = lines(max_steps=5)
    for every, steps in ((2, [2, 4, 5]), (5, [5]), (10, [5])):
        coarse = lines(max_steps=5, logging_steps=every)
        assert [e["step"] for e in coarse] == steps
        rest = fine[steps[-2] if len(steps) > 1 else 0 :]  # full batches of 4 pairs
        mean = sum(e["rewards/margins"] for e in rest) / len(rest)
        assert coarse[-1]["rewards/margins"] == pytest.approx(mean, rel=1e-9)
        assert coarse[-1]["num_tokens"] == fine[-1]["num_tokens"]
        assert {"grad_norm", "learning_rate"} <= set(coarse[-1])
    assert lines(max_steps=1, logging_strategy="no") == []


def test_gamma_extremes_are_those_of_the_window(
    trainer: Callable[..., PreferenceTrainer],
) -> None:
    shared: dict[str, Any] = {
        "max_steps": 4,
        "loss_type": "simpo",
        "margin": "gamma",
        "gamma_tau": 0.3,
    }
    fine, coarse = trainer(**shared), trainer(logging_steps=4, **shared)
    fine.train()
    coarse.train()
    lines = [e for e in fine.state.log_history if "loss" in e]
    assert coarse.state.log_history[0]["gamma/min"] == min(e["gamma/min"] for e in lines)
    assert coarse.state.log_history[0]["gamma/max"] == max(e["gamma/max"] for e in lines)
    assert len({e["gamma/max"] for e in lines}) > 1


def test_evaluation_is_the_mean_over_all_pairs(
    trainer: Callable[..., PreferenceTrainer], model: Any, pairs: datasets.Dataset
) -> None:
    reference = perturbed(model)
    rows = pairs.select(range(11))  # the last batch of 4 is short
    run = trainer(ref_model=reference, eval_dataset=rows, beta=0.7)
    metrics = run.evaluate()
    expected = dense_loss("dpo", model, reference, rows[:])
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    chosen = dense_sums(model, rows[:], "chosen_ids")[0]
    ref_chosen = dense_sums(reference, rows[:], "chosen_ids")[0]
    assert metrics["eval_logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    rewards = 0.7 * (chosen - ref_chosen).mean().item()
    assert metrics["eval_rewards/chosen"] == pytest.approx(rewards, rel=1e-4)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_named_evaluation_sets_and_the_best_checkpoint(
    trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    run = trainer(
        eval_dataset={"near": pairs.select(range(4)), "far": pairs.select(range(4, 12))},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_far_rewards/margins",
        greater_is_better=True,
    )
    run.train()
    margins = [e["eval_far_rewards/margins"] for e in run.state.log_history if "eval_far_loss" in e]
    assert run.state.best_metric == max(margins)
    assert any("eval_near_rewards/accuracies" in e for e in run.state.log_history)
    with pytest.raises(ValueError, match="eval_dataset: got one named 'train'"):
        trainer(eval_dataset={"train": pairs})


def test_evaluation_leaves_the_margin_queue_alone(
    trainer: Callable[..., PreferenceTrainer], pairs: datasets.Dataset
) -> None:
    run = trainer(margin="gamma", eval_dataset=pairs)
    run.train()
    before = copy.deepcopy(run.loss_module.state_dict())
    first = run.evaluate()
    assert first == {
        **run.evaluate(),
        **{k: v for k, v in first.items() if "second" in k or "time" in k},
    }
    after = run.loss_module.state_dict()
    assert before
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_gradient_checkpointing_changes_nothing(trainer: Callable[..., PreferenceTrainer]) -> None:
    plain, checkpointed = trainer(), trainer(gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.args.gradient_checkpointing
    assert checkpointed.model.model.gradient_checkpointing
    for name in ("loss", "grad_norm"):
        assert [e[name] for e in checkpointed.state.log_history if name in e] == pytest.approx(
            [e[name] for e in plain.state.log_history if name in e], rel=1e-6
        )


def test_bfloat16_autocast_keeps_log_probs_in_float32(
    trainer: Callable[..., PreferenceTrainer],
) -> None:
    exact, mixed = trainer(), trainer(bf16=True, use_cpu=True)
    exact.train()
    mixed.train()
    assert mixed.accelerator.mixed_precision == "bf16"
    assert mixed.model.dtype == torch.float32
    first, other = exact.state.log_history[0], mixed.state.log_history[0]
    assert other["logps/chosen"] == pytest.approx(first["logps/chosen"], rel=2e-2)
    assert other["logps/chosen"] != first["logps/chosen"]
    assert other["rewards/chosen"] == 0.0  # policy and reference are rounded alike
    assert other["loss"] == pytest.approx(math.log(2), abs=1e-7)
