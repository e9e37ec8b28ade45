"""A tiny Llama, made-up pairs of token ids, and runs of a few steps on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import tiny_llama, tokenized_pairs
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo.demo.model import build_tokenizer
from fastpo.trainer import PreferenceConfig, PreferenceTrainer

Runner = Callable[..., PreferenceTrainer]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Precomputed log-probs go nowhere else."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("FASTPO_CACHE", str(directory))
    return directory


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer), seed)


@pytest.fixture
def pairs(tokenizer: PreTrainedTokenizerFast, seed: int) -> datasets.Dataset:
    return tokenized_pairs(30, len(tokenizer), seed)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., PreferenceConfig]:
    """``settings(**overrides)``: a configuration for a few quick, logged steps."""

    def make(**overrides: Any) -> PreferenceConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 7,
        }
        return PreferenceConfig(**(defaults | overrides))

    return make


@pytest.fixture
def trainer(
    model: LlamaForCausalLM,
    pairs: datasets.Dataset,
    tokenizer: PreTrainedTokenizerFast,
    settings: Callable[..., PreferenceConfig],
) -> Runner:
    """``trainer(**settings)``: a trainer on fresh copies of ``model``; or with a ``model=`` of one's own."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def make(
        model: Any = None,
        train_dataset: datasets.Dataset = pairs,
        eval_dataset: Any = None,
        ref_model: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        **overrides: Any,
    ) -> PreferenceTrainer:
        if model is None:
            model = tiny_llama(len(tokenizer), 0)
            model.load_state_dict(start)
        return PreferenceTrainer(
            model,
            settings(**overrides),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            ref_model=ref_model,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with a tiny model and its tokenizer, for runs in processes of their own."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_llama(len(tokenizer), 0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
