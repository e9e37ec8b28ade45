"""The architectures that the head is tested on: tiny, random, with logits as large as a trained model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


# Every key is rotated: the gradient of a key's bias is zero in exact arithmetic where it is not.
FULLY_ROTARY = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}


class Architecture(NamedTuple):
    """A model class, its configuration class, what differs from ``SIZES``, and what follows its head."""

    model: str
    config: str
    changes: dict[str, object]
    scale: float = 1.0
    softcap: float | None = None
    inflation: float = 1.0  # standard deviation of the head's weights: makes logits of about ±5


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {}),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        softcap=30.0,
        inflation=4.0,
    ),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {"tie_word_embeddings": True}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", {"sliding_window": 6}),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", {"rope_parameters": FULLY_ROTARY}),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", {}),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", {"tie_word_embeddings": True}),
    "cohere": Architecture(
        "CohereForCausalLM", "CohereConfig", {"logit_scale": 0.0625}, scale=0.0625, inflation=16
    ),
    "granite": Architecture(
        "GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 6.0}, scale=1 / 6, inflation=6
    ),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


def build(name: str, **changes: object) -> PreTrainedModel:
    """The architecture's model in evaluation mode, float32, from the current random state."""
    architecture = ARCHITECTURES[name]
    settings = {**SIZES, **architecture.changes, **changes}
    config = getattr(transformers, architecture.config)(**settings)
    model = getattr(transformers, architecture.model)(config).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
        head.weight.normal_(std=architecture.inflation)
        if head.bias is not None:
            head.bias.normal_(std=3.0)
    return model


class Batch(NamedTuple):
    """What a model is called with."""

    input_ids: torch.Tensor  # (B, T)
    attention_mask: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), shifted


def make_batch(padding: bool = True) -> Batch:
    """Three sequences of up to 13 tokens, each with a prompt that is not scored."""
    input_ids = torch.randint(3, SIZES["vocab_size"], (3, 13))
    mask = torch.ones_like(input_ids)
    if padding:  # one sequence whole, one padded on the right, one on the left
        mask[1, 9:] = 0
        mask[2, :4] = 0
        input_ids = torch.where(mask.bool(), input_ids, 0)
    completion = mask.bool() & (mask.cumsum(1) > torch.tensor([[3], [5], [2]]))
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = torch.where(completion[:, 1:], input_ids[:, 1:], -100)
    return Batch(input_ids, mask, labels)


@pytest.fixture
def build_model(seed: int) -> Callable[..., PreTrainedModel]:
    """``build_model("llama", **changes_of_the_configuration)``."""
    return build


@pytest.fixture(name="make_batch")
def make_batch_fixture(seed: int) -> Callable[..., Batch]:
    """``make_batch(padding=True)``."""
    return make_batch


@pytest.fixture
def batch(seed: int) -> Batch:
    """A padded batch."""
    return make_batch()


@pytest.fixture
def unpadded_batch(seed: int) -> Batch:
    """A batch without padding."""
    return make_batch(padding=False)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each of the architectures by name."""
    return request.param


@pytest.fixture
def expected_tail(architecture: str) -> tuple[float, float | None]:
    """(scale, softcap) of ``architecture``."""
    return ARCHITECTURES[architecture].scale, ARCHITECTURES[architecture].softcap


@pytest.fixture
def plain_logprobs() -> Callable[..., torch.Tensor]:
    """The reference: all logits, log-softmax, pick the labels; 0 where there is none."""

    def compute(model: torch.nn.Module, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logps = torch.log_softmax(logits / temperature, dim=-1)
        picked = logps.gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
        return torch.where(batch.labels == -100, 0.0, picked)

    return compute


@pytest.fixture
def gradients(seed: int) -> Callable[..., dict[str, torch.Tensor]]:
    """Gradient of every parameter under one random coefficient per token, the same in every call."""

    def compute(
        model: torch.nn.Module, logps: torch.Tensor, extra: torch.Tensor | float = 0.0
    ) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        coefficients = torch.randn(logps.shape, generator=generator)
        model.zero_grad()
        ((logps * coefficients).sum() + extra).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    return compute
