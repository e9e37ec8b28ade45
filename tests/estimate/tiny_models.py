"""Configurations of tiny models, and how long the sequences are that they are trained on."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

LENGTH, PAIRS = 128, 2  # tokens of a sequence, pairs of a micro-step


def llama(**changes: Any) -> LlamaConfig:
    """Three layers, hidden 128, vocabulary 2000."""
    sizes: dict[str, Any] = {
        "vocab_size": 2000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**(sizes | changes))
