"""A tiny checkpoint, and one thread for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastpo.demo.model import build_model, build_tokenizer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights and the demo's character tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=16, layers=1, seed=5).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
