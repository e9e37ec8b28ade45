"""A tiny Llama and made-up pairs of token ids, for tests and for the processes that they start."""

from __future__ import annotations

import random

import datasets
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocab: int, seed: int) -> LlamaForCausalLM:
    """Two layers, hidden 32; its logits are well away from zero."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def tokenized_pairs(count: int, vocab: int, seed: int) -> datasets.Dataset:
    """Pairs of random ids and lengths: the chosen answer counts upwards, the rejected one is noise."""
    draw = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, vocab) for _ in range(draw.randint(low, high))]

    def counting(low: int, high: int) -> list[int]:
        start = draw.randrange(3, vocab - high)
        return list(range(start, start + draw.randint(low, high)))

    return datasets.Dataset.from_list(
        [
            {
                "prompt_ids": [1, *ids(1, 6)],
                "chosen_ids": [*counting(1, 8), 2],
                "rejected_ids": [*ids(1, 8), 2],
                "row": 100 + k,
            }
            for k in range(count)
        ]
    )
