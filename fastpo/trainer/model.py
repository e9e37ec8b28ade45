"""Loading models and tokenizers, and making a model ready for preference training."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import model_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .run_config import RunConfig

_ADAPTER_CONFIG = "adapter_config.json"


def load_model(config: RunConfig, field: str = "model_name_or_path") -> PreTrainedModel:
    """The causal LM that a field of the configuration names.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no name, a directory that is not a checkpoint, or a model that cannot be loaded so.
    """
    further: Any = config.model_init_kwargs or {}
    arguments: dict[str, Any] = {
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        **further,
    }
    if config.attn_implementation is not None:
        arguments["attn_implementation"] = config.attn_implementation
    return load_causal_lm(checked_name(config, field), field, arguments)


def load_causal_lm(name: str, field: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The causal LM of a checkpoint directory or Hub name.

    Args:
        name: what :func:`checked_model_name` returned.
        field: the setting that named it, for messages.
        arguments: of ``from_pretrained``.

    Raises:
        TypeError: a ``quantization_config`` that is no mapping.
        ValueError: it cannot be loaded so, or bitsandbytes has no such field of its ``quantization_config``.
    """
    _check_quantization(arguments.get("quantization_config"))
    try:
        return AutoModelForCausalLM.from_pretrained(name, **arguments)
    except (OSError, ValueError, TypeError, ImportError) as error:
        options = "".join(
            f" with {option} {arguments[option]!r}"
            for option in ("attn_implementation", "quantization_config")
            if arguments.get(option)
        )
        raise ValueError(f"{field}: {name} could not be loaded{options}: {error}") from error


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the configuration's chat template; without a pad token, EOS pads.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    field = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
    name = config.tokenizer_name_or_path or checked_name(config, field)
    return load_tokenizer_of(name, field, config.chat_template, config.trust_remote_code)


def load_tokenizer_of(
    name: str, field: str, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The same of a checkpoint directory or Hub name; ``chat_template`` is Jinja text or a file that holds it.

    Raises:
        ValueError: the tokenizer cannot be loaded, or there is no such template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{field}: no tokenizer could be loaded from {name}: {error}") from error
    if chat_template is not None:
        tokenizer.chat_template = _text_or_file(chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def checked_name(config: RunConfig, field: str) -> str:
    """The model name in a field of the configuration; see :func:`checked_model_name`."""
    return checked_model_name(getattr(config, field), field)


def checked_model_name(name: str | None, field: str) -> str:
    """A model name, after a look at the directory if it is one.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: no name, or a directory that is not a checkpoint.
    """
    if not name:
        raise ValueError(f"{field}: got {name!r}, expected a checkpoint directory or a Hub name")
    path = Path(name).expanduser()
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists():
            raise FileNotFoundError(f"{field}: {name} is not a directory")
        return name
    present = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    if (path / _ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{field}: {name} is a PEFT adapter, expected a whole model; merge it into its base first "
            "(merge_and_unload of peft)"
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{field}: {name} is not a checkpoint: it has no config.json (it holds {present})"
        )
    if not model_files(path):
        raise ValueError(
            f"{field}: {name} is not a checkpoint: it has no weights, model.safetensors or the like "
            f"(it holds {present})"
        )
    return str(path)


def add_adapter(model: PreTrainedModel, settings: Mapping[str, Any]) -> PreTrainedModel:
    """``model`` inside a PEFT model with a fresh LoRA adapter.

    Args:
        model: the base, which is frozen. If it is quantised (QLoRA), what is left in 16 bits, such as norms,
            embedding and head, becomes float32 (``peft.prepare_model_for_kbit_training``).
        settings: fields of ``peft.LoraConfig``.

    Raises:
        ImportError: peft is not installed.
        ValueError: a field that ``LoraConfig`` does not have (one of a like name is told), or a value that peft
            refuses.
    """
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ImportError("peft: needs the package peft (pip install fastpo[peft])") from error
    known = [f.name for f in dataclasses.fields(LoraConfig) if f.init]
    _check_fields(settings, known, "peft: LoraConfig")
    if is_quantized(model):
        # Gradient checkpointing is the trainer's to switch on.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        _keep_differentiable(model)
    try:
        return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **settings}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft: {error}") from error


def _check_fields(given: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise ValueError for a name that is not known; one of a like name is told."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
            hint = "".join(f", did you mean {n!r}?" for n in near)
            raise ValueError(f"{owner} has no field {name!r}{hint}")


def _check_quantization(given: Any) -> None:
    if given is None or isinstance(given, QuantizationConfigMixin):
        return
    name = "model_init_kwargs: quantization_config"
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{name}: got {type(given).__name__}, expected a mapping such as {{load_in_4bit: true}}"
        )
    # transformers knows those of bitsandbytes without a method named, and passes over fields it does not know.
    by_bitsandbytes = {"load_in_4bit", "load_in_8bit"} & set(given)
    if given.get("quant_method", "bitsandbytes" if by_bitsandbytes else None) == "bitsandbytes":
        known = inspect.signature(BitsAndBytesConfig).parameters
        _check_fields(given, {"quant_method", *known} - {"kwargs"}, f"{name}: BitsAndBytesConfig")


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing a layer's weight anew when it is first evaluated on a CPU with AVX-512.

    It stays so, and no gradient passes a layer packed like that: training after an evaluation, or beside a
    reference, would leave the adapters below without one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no field of nn.Module)


def is_quantized(model: nn.Module) -> bool:
    """Whether weights of a transformers model, also inside a PEFT model, are quantised."""
    return any(getattr(m, "is_quantized", False) for m in model.modules())


def is_peft_model(model: nn.Module) -> bool:
    """Whether ``model`` carries an adapter that can be switched off."""
    return hasattr(model, "disable_adapter") and hasattr(model, "get_base_model")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability in ``model`` to 0: of modules, and numbers that layers keep themselves."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def router_coefficient(model: PreTrainedModel, wanted: float | None) -> float:
    """Weight of the load-balancing loss: ``wanted``, else the model's own; 0 for a dense model.

    Raises:
        ValueError: a weight for a model that is no mixture of experts.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if wanted:
            raise ValueError(
                f"router_aux_loss_coef: got {wanted}, but {type(model).__name__} is no mixture of experts "
                "with router logits; expected None or 0"
            )
        return 0.0
    return float(getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted)


def _text_or_file(template: str) -> str:
    is_text = "{" in template or "\n" in template
    if not is_text and not Path(template).expanduser().is_file():
        raise ValueError(f"chat_template: {template} is neither a Jinja template nor a file")
    return template if is_text else Path(template).expanduser().read_text(encoding="utf-8")
