"""The models of a run on fake tensors: every shape and dtype as in training, and no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import fastpo
from fastpo.head.causal_lm import find_causal_lm, linear_layers
from fastpo.trainer.model import add_adapter

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .config import EstimateConfig

_ATTENTION_WITHOUT_MASK = "flash"  # prefix of implementations that read lengths and hold no mask


def read_model_config(config: EstimateConfig, field: str) -> PretrainedConfig:
    """The model configuration that a field names: a directory with a ``config.json``, that file, or a Hub name.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no name, no configuration there, or one with quantised weights.
    """
    name = getattr(config, field)
    if not name:
        raise ValueError(
            f"{field}: got {name!r}, expected a directory with a config.json, or a Hub name"
        )
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{field}: {name} has no config.json")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{field}: no file or directory {name}")
    given: Any = config.model_init_kwargs or {}
    quantised = [key for key in given if "quantization" in key or key.startswith("load_in_")]
    try:
        found = AutoConfig.from_pretrained(
            str(path) if path.exists() else name, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{field}: no configuration could be read from {name}: {error}") from error
    if quantised or getattr(found, "quantization_config", None):
        raise ValueError(
            f"{field}: {name} is to be loaded with quantised weights, whose memory is not estimated; expected "
            "weights in float32, bfloat16 or float16"
        )
    for key, value in given.items():
        if hasattr(found, key):  # as from_pretrained does
            setattr(found, key, value)
    return found


def holds_masks(config: EstimateConfig) -> bool:
    """Whether the attention implementation holds a mask of all pairs of positions."""
    return not (config.attn_implementation or "").startswith(_ATTENTION_WITHOUT_MASK)


def make_model(
    config: EstimateConfig, model_config: PretrainedConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A causal LM on the meta device, in ``dtype``, else in the one that the run loads it in.

    Raises:
        ValueError: transformers cannot make it, or it is no model that fastpo trains.
    """
    if dtype is None:
        dtype = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    arguments: dict[str, Any] = {
        "dtype": dtype or torch.float32,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.attn_implementation is not None:
        # Kernels of other packages do not run on fake tensors; sdpa without a mask holds what they hold.
        arguments["attn_implementation"] = (
            config.attn_implementation if config.attn_implementation == "eager" else "sdpa"
        )
    given: Any = config.model_init_kwargs or {}
    if "experts_implementation" in given:
        arguments["experts_implementation"] = given["experts_implementation"]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, **arguments)
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise ValueError(f"model_name_or_path: no causal LM could be made: {error}") from error
    find_causal_lm(model)
    return model


def with_adapter(config: EstimateConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model that is trained: in its adapter, on the meta device too, where the run has one."""
    if not isinstance(config.peft, Mapping):
        return model
    with torch.device("meta"):
        return add_adapter(model, config.peft)


def allocate(model: nn.Module) -> None:
    """Put tensors of the surrounding FakeTensorMode in the place of a model's own on the meta device.

    A model is made on the meta device first, as PEFT moves modules about, which fake tensors do not allow.
    Tied parameters stay tied.
    """
    made: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return made[id(tensor)]

    for module in model.modules():
        # Some modules keep tensors that are neither parameters nor buffers.
        holders: tuple[Any, ...] = (module._parameters, module._buffers, vars(module))
        for held in holders:
            for name, value in list(held.items()):
                if isinstance(value, Tensor) and value.is_meta:
                    held[name] = of(value)


def enable_checkpointing(model: PreTrainedModel, config: EstimateConfig) -> None:
    """Recompute activations in the backward where the run does, as transformers' Trainer switches it on."""
    on = getattr(config, "activation_checkpointing", None) or config.gradient_checkpointing
    if not on:
        return
    given = getattr(config, "activation_checkpointing_kwargs", None)
    options: dict[str, Any] = dict(given or config.gradient_checkpointing_kwargs or {})
    spacing = options.pop("every_n_layers", 1)
    options.pop("offload", None)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options or None,
            **({} if spacing == 1 else {"every_n_layers": spacing}),
        )
    else:  # transformers before 5.19
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


class ScoringHead:
    """The head of a model, whose forward makes log-probs and no logits, as :class:`fastpo.FusedHead` does.

    That class looks at numbers to find out what a model does after its head, which fake tensors do not have.

    Attributes:
        hidden: (B, T, H) of the last call, and ``log_probs`` (B, T).
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        _, head = find_causal_lm(model)
        layers = linear_layers(head)
        # LoRA on the head: the frozen layer within.
        self.layer: Any = layers[-1] if layers else getattr(head, "base_layer", head)
        self.frozen_layer: Any = layers[0] if layers else self.layer
        self.options = options
        self.labels: Tensor | None = None
        self.hidden: Tensor | None = None
        self.log_probs: Tensor | None = None
        head.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        layer = self.layer if torch.is_grad_enabled() else self.frozen_layer
        self.hidden = hidden
        if self.labels is not None:
            result = fastpo.linear_logprobs(
                hidden, layer.weight, self.labels, layer.bias, **self.options
            )
            self.log_probs = result[0] if isinstance(result, tuple) else result
        return hidden.new_zeros((*hidden.shape[:-1], 1))

    def score(self, call: functools.partial[Any], labels: Tensor | None) -> Any:
        """Call the model for log-probs of ``labels`` (B, T), or for its hidden states alone; its output."""
        self.labels, self.log_probs, self.hidden = labels, None, None
        return call()
