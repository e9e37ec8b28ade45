"""Real runs of two optimiser steps on a tiny model, on a CPU: what PyTorch's allocator is asked for in them."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import datasets
import torch
from tiny_models import LENGTH, PAIRS
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory import peak_extra_bytes
from fastpo.demo.model import build_tokenizer
from fastpo.trainer import PreferenceConfig, PreferenceTrainer
from fastpo.trainer.launch import model_to_train


def full_pairs(count: int, vocab: int, length: int, prompt: int) -> datasets.Dataset:
    """Answers that fill the sequences but for a token of padding in half of them, so that masks are made."""
    draw = random.Random(0)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(length)]

    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": [1, *ids(prompt - 1)],
                "chosen_ids": [*ids(length - prompt - 1), 2],
                "rejected_ids": [*ids(length - prompt - 2), 2],
                "row": k,
            }
            for k in range(count)
        ]
    )


def write_weights(directory: str) -> Any:
    """Beside a configuration, which is returned, the weights of such a model, where they are not there yet."""
    model_config = AutoConfig.from_pretrained(directory)
    if not (Path(directory) / "model.safetensors").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)
    return model_config


def measured_bytes(
    settings: dict[str, Any], *, pairs: int = PAIRS, length: int = LENGTH, prompt: int = 1
) -> int:
    """Weights that are there before training, and the most that training holds beside them.

    Micro-steps have so many pairs of sequences of so many tokens.
    """
    model_config = write_weights(settings["model_name_or_path"])
    config = PreferenceConfig(**settings)
    trainer = PreferenceTrainer(
        model_to_train(config),
        config,
        train_dataset=full_pairs(
            2 * pairs * config.gradient_accumulation_steps, model_config.vocab_size, length, prompt
        ),
        processing_class=build_tokenizer(),
    )
    modules = [trainer.model, trainer.ref_model, trainer.loss_module]
    tensors = [t for m in modules if m for t in (*m.parameters(), *m.buffers())]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    def train() -> list[Any]:
        trainer.train()
        return []

    gc.collect()  # what an earlier test left would be freed in the middle and count as less
    return sum(held.values()) + peak_extra_bytes(train)
