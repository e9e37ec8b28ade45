"""Two gloo processes against one with the doubled batch: losses, weights, γ, evaluation, a bad number."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from ranks import finish, start_ranks
from safetensors.torch import load_file

from fastpo.trainer import PreferenceTrainer

SHARED: dict[str, Any] = {
    "max_steps": 4, "learning_rate": 0.05, "optim": "sgd", "logging_steps": 1, "save_strategy": "no",
    "disable_tqdm": True, "seed": 7, "train_sampling_strategy": "sequential", "beta": 0.5,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"gradient_accumulation_steps": 2},
    "gamma-batch": {"margin": "gamma", "gamma_scope": "batch", "gamma_tau": 0.3},
    "gamma-queue": {
        "margin": "gamma",
        "gamma_queue_size": 10,
        "gamma_sample_size": 8,
        "gamma_tau": 0.3,
    },
    "kto": {"loss_type": "kto_pair", "sft_weight": 0.3},
    "precomputed": {"precompute_ref_log_probs": True},
    "shared-prompts": {"prefix_sharing": True, "gradient_accumulation_steps": 2},
    "dnpo": {
        "method": "dnpo",
        "gradient_accumulation_steps": 2,
        "noise_learning_rate": 0.5,
        "noise_sigma_limit": 1e9,
        "noise_rank": 5,
    },
    "dnpo-alternating": {
        "method": "dnpo",
        "noise_schedule": "alternating",
        "noise_learning_rate": 0.5,
        "noise_sigma_limit": 1e9,
        "margin": "gamma",
        "gamma_tau": 0.3,
    },
}
PAIRS_PER_RANK = 2


@pytest.fixture
def start(model: Any, pairs: datasets.Dataset) -> tuple[Any, Any, Any, Any]:
    """Policy, reference, training and evaluation pairs (11: a short last batch)."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, reference, pairs.select(range(16)), pairs.select(range(16, 27))


def test_two_ranks_equal_one_process(
    start: tuple[Any, Any, Any, Any],
    trainer: Callable[..., PreferenceTrainer],
    tokenizer: Any,
    tmp_path: Path,
    cache: Path,
) -> None:
    policy, reference, train, evaluation = start
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reference.save_pretrained(tmp_path / "reference")
    train.save_to_disk(tmp_path / "train")
    evaluation.save_to_disk(tmp_path / "eval")
    runs = {
        name: {"settings": {**SHARED, "per_device_train_batch_size": PAIRS_PER_RANK,
                            "per_device_eval_batch_size": PAIRS_PER_RANK, **settings}, "poison": False}
        for name, settings in RUNS.items()
    }  # fmt: skip
    runs["poisoned"] = {"settings": runs["dpo"]["settings"], "poison": True}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    finish(start_ranks("rank.py", tmp_path, world=2, FASTPO_CACHE=cache))

    for name, settings in RUNS.items():
        # One process has its reference live, also where the ranks computed it beforehand.
        settings = {k: v for k, v in settings.items() if k != "precompute_ref_log_probs"}
        batch = {f"per_device_{kind}_batch_size": 2 * PAIRS_PER_RANK for kind in ("train", "eval")}
        one = trainer(
            copy.deepcopy(policy), ref_model=copy.deepcopy(reference), train_dataset=train,
            eval_dataset=evaluation, **SHARED, **batch, **settings,
        )  # fmt: skip
        one.train()
        metrics = one.evaluate()
        seen = [json.loads((tmp_path / name / f"seen-{r}.json").read_text()) for r in (0, 1)]
        assert [s["ranks"] for s in seen] == [2, 2]
        assert not any(s["matplotlib"] for s in seen)  # imported for a plot alone
        assert seen[0]["log"][:4] == seen[1]["log"][:4]
        for line, expected in zip(seen[0]["log"][:4], one.state.log_history[:4], strict=True):
            assert line["num_tokens"] == expected["num_tokens"]
            # entropy and its like are means over tokens, taken per rank and micro-step
            for metric in (
                "loss",
                "grad_norm",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
            ):
                assert line[metric] == pytest.approx(expected[metric], rel=1e-5, abs=1e-6), (
                    name,
                    metric,
                )
            if "loss/model" in expected:
                for metric in ("loss/model", "noise/margin_shift", "noise/grad_norm"):
                    # A shift is a small difference of large float32 sums, and the gradient follows it.
                    assert line[metric] == pytest.approx(expected[metric], rel=1e-3, abs=3e-5), (
                        name,
                        metric,
                    )
            if "gamma/mean" in expected:
                for metric in ("gamma/min", "gamma/max", "gamma/mean"):
                    assert line[metric] == pytest.approx(expected[metric], rel=1e-5), (name, metric)
        for metric in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
            if name in ("dpo", "precomputed"):  # the others couple the pairs of a batch
                assert seen[0]["eval"][metric] == pytest.approx(
                    metrics[metric], rel=1e-5, abs=3e-5
                ), (
                    name,
                    metric,
                )
        for rank in (0, 1):
            weights = load_file(tmp_path / name / f"weights-{rank}.safetensors")
            for key, tensor in one.model.state_dict().items():
                torch.testing.assert_close(
                    weights[key], tensor, rtol=0, atol=2e-6, msg=f"{name} {key}"
                )
            state = load_file(tmp_path / name / f"loss-{rank}.safetensors")
            assert state.keys() == one._state_tensors().keys()
            for key, tensor in one._state_tensors().items():
                torch.testing.assert_close(
                    state[key], tensor, rtol=1e-5, atol=1e-5, msg=f"{name} {key}"
                )

    for rank in (0, 1):
        stopped = json.loads((tmp_path / "poisoned" / f"seen-{rank}.json").read_text())["error"]
        assert "before optimiser step 2" in stopped
        assert "rank 1: the loss is nan in micro-step 1 of 2, data rows" in stopped
