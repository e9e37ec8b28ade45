"""Finding the causal language model inside whatever wraps it, and what its head is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def find_causal_lm(model: nn.Module) -> tuple[PreTrainedModel, nn.Module]:
    """The causal language model in ``model`` (itself, or inside PEFT, DDP, FSDP, DeepSpeed, torch.compile) and
    its head, the module that turns hidden states into logits.

    Raises:
        TypeError: there is no transformers model in it.
        ValueError: the model is one that this package does not serve: no head, encoder-decoder, masked,
            multimodal, tensor-parallel, or in ``nn.DataParallel``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a transformers causal LM")
    core = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if core is None:
        raise TypeError(
            f"model: got {type(model).__name__} without a transformers model in it, expected a causal LM"
        )
    reason = _refusal(core)
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        reason = (
            "is in nn.DataParallel, whose replicas cannot be patched; use DistributedDataParallel"
        )
    if reason:
        raise ValueError(f"model: {type(core).__name__} {reason}")
    return core, core.get_output_embeddings()


def _refusal(core: PreTrainedModel) -> str | None:
    """Why this model cannot be served, or None."""
    config = core.config
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder model; expected a decoder-only causal LM"
    modalities = getattr(core, "input_modalities", "text")
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    parts = getattr(type(config), "sub_configs", None) or {}
    # A text decoder taken out of a multimodal family still names the family's modalities, but has no parts.
    if (
        core.main_input_name != "input_ids"
        or (parts and modalities != {"text"})
        or any("vision" in part or "audio" in part for part in parts)
    ):
        return "is a multimodal model; expected a text-only causal LM"
    if core.get_output_embeddings() is None:
        return "has no output embedding, it makes no logits; expected a causal LM"
    if type(core).__name__.endswith("ForMaskedLM"):
        return "is a masked language model; expected a causal LM"
    if (getattr(core, "tp_size", None) or 1) > 1:
        return "is tensor-parallel, which shards its head; expected a whole one"
    return None


def linear_layers(head: nn.Module) -> list[nn.Linear] | None:
    """The plain linear layers of which one is the head at any time, or None if the head is something else.

    One, or, under PEFT's ``modules_to_save``, the original and each adapter's copy.
    """
    copies = getattr(head, "modules_to_save", None)
    original = getattr(head, "original_module", None)
    if isinstance(copies, nn.ModuleDict) and isinstance(original, nn.Module):
        layers = [original, *copies.values()]
    else:
        layers = [head]
    return layers if all(is_plain_linear(layer) for layer in layers) else None  # type: ignore[return-value]


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether ``layer`` computes W h + b with a weight that is a plain tensor."""
    # A subclass with a forward of its own (LoRA, quantised), a forward put on the instance (offloading hooks)
    # or a weight that is no plain tensor (quantised) computes something other than W h + b.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    own_forward = vars(layer).get("forward")
    weight: Any = layer.weight
    return (
        (own_forward is None or hasattr(own_forward, "fastpo_original"))
        and type(weight).__name__ in ("Parameter", "Tensor", "DTensor")
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    )
