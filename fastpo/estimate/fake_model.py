"""The models of a run on fake tensors: every shape and dtype as in training, and no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import fastpo
from fastpo.head.causal_lm import find_causal_lm, linear_layers
from fastpo.head.lora import is_plain_lora, lora_logprobs
from fastpo.trainer.activation_offloading import offload_activations
from fastpo.trainer.model import add_adapter

from .ledger import HOST, Ledger

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .config import EstimateConfig


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
        raise ValueError(
            f"{field}: no configuration could be read from {name} (a directory with its config.json serves, "
            f"too): {error}"
        ) from error
    if quantised or getattr(found, "quantization_config", None):
        raise ValueError(
            f"{field}: {name} is to be loaded with quantised weights, whose memory is not estimated; expected "
            "weights in float32, bfloat16 or float16"
        )
    for key, value in given.items():
        if hasattr(found, key):  # as from_pretrained does
            setattr(found, key, value)
    return found


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


def enable_checkpointing(model: PreTrainedModel, config: EstimateConfig, ledger: Ledger) -> None:
    """Recompute activations in the backward where the run does, as transformers' Trainer switches it on.

    What is offloaded counts as the host's, unless the run is on the host anyway.
    """
    if not config.checkpoints_activations:
        return
    options = config.checkpointing_options
    spacing = options.pop("every_n_layers", 1)
    offloads = options.pop("offload", False) or config.activation_offloading
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options or None,
            **({} if spacing == 1 else {"every_n_layers": spacing}),
        )
    else:  # transformers before 5.19
        spaced = {} if spacing == 1 else {"every_n_layers": spacing}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **spaced)
    if not offloads:
        return
    if config.use_cpu:
        offload_activations(model)
        return

    def to_host(tensor: Tensor) -> tuple[bool, Tensor]:
        if not tensor.requires_grad:
            return False, tensor
        with ledger.charging(HOST):
            return True, torch.empty_like(tensor, requires_grad=False)

    def to_device(kept: tuple[bool, Tensor]) -> Tensor:
        return torch.empty_like(kept[1]) if kept[0] else kept[1]

    offload_activations(model, to_host, to_device)


class ScoringHead:
    """The head of a model, whose forward makes log-probs and no logits, as :class:`fastpo.FusedHead` does.

    That class looks at numbers to find out what a model does after its head, which fake tensors do not have.

    Attributes:
        is_plain: whether the head is a linear layer or plain LoRA on one.
        hidden: (B, T, H) of the last call, those that score its labels, and ``log_probs`` (B, T).
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        _, head = find_causal_lm(model)
        layers = linear_layers(head)
        # What kind of layer it is shows as long as its weight is no fake tensor.
        self.lora = head if is_plain_lora(head) else None
        # Another head that is adapted or quantised: the layer within.
        self.layer: Any = layers[-1] if layers else getattr(head, "base_layer", head)
        self.frozen_layer: Any = layers[0] if layers else self.layer
        self.is_plain = bool(layers or self.lora)
        self.options = options
        self.labels: Tensor | None = None
        self.hidden_index: Tensor | None = None
        self.hidden: Tensor | None = None
        self.log_probs: Tensor | None = None
        head.forward = self  # type: ignore[method-assign,assignment]

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        placeholder = hidden.new_zeros((*hidden.shape[:-1], 1))
        if self.hidden_index is not None:
            index = self.hidden_index
            hidden = (
                hidden.flatten(0, -2).index_select(0, index.flatten()).unflatten(0, index.shape)
            )
        self.hidden = hidden
        if self.labels is not None:
            result = self._score(hidden, self.labels)
            self.log_probs = result[0] if isinstance(result, tuple) else result
        return placeholder

    def _score(self, hidden: Tensor, labels: Tensor) -> Any:
        if self.lora is not None:
            operation = fastpo.linear_logprobs
            return lora_logprobs(self.lora, operation, hidden, labels, **self.options)
        layer = self.layer if torch.is_grad_enabled() else self.frozen_layer
        return fastpo.linear_logprobs(hidden, layer.weight, labels, layer.bias, **self.options)

    def score(
        self, call: Callable[[], Any], labels: Tensor | None, hidden_index: Tensor | None
    ) -> Any:
        """Call the model for log-probs of ``labels`` (B, T), or for its hidden states alone; its output.

        ``hidden_index`` (B, T) says where in a packed batch they are; None: where the labels are.
        """
        self.labels, self.hidden_index = labels, hidden_index
        self.log_probs = self.hidden = None
        return call()
