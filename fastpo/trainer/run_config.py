"""``RunConfig``: the settings that every training run of fastpo has, beside TrainingArguments'.

Model, tokenizer, data and the precision of the log-probs; ``PreferenceConfig`` and ``SFTConfig`` add what they
train for. ``save_config`` writes them as YAML.
"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import TrainingArguments

from fastpo.ops.certified import BACKWARDS, DEFAULT_TOL
from fastpo.plain_values import CREDENTIAL, plain, without_logins

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class RunConfig(TrainingArguments):
    """Settings of a run, beside every field of ``transformers.TrainingArguments``.

    ``resume_from_checkpoint`` is a checkpoint directory, or ``auto``: the newest complete one in
    ``output_dir``, a fresh start if there is none. ``use_liger_kernel`` is for the model's other layers;
    Liger's own loss stays off. The first five fields below have another default than in ``TrainingArguments``.

    Raises:
        TypeError: a value that should be a mapping.
        ValueError: a setting out of range, or two that exclude each other; the message names it.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "peft",
    ]

    learning_rate: float = field(default=1e-6, metadata={"help": "initial learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training rows"})
    logging_steps: float = field(
        default=10, metadata={"help": "optimiser steps between two log lines"}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "stays false: a loss that is not finite stops the run and is never averaged away"
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "compute in bfloat16 from the weights as they are; unset: where CUDA has it and fp16 is off"
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "checkpoint directory or Hub name of the model to train"}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "unset: the model's own tokenizer"}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Jinja text, or a file that holds it; unset: the tokenizer's own"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run Python code that comes with a model"}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "of the loaded weights: float32, bfloat16, float16, or auto (as stored); "
            "plain AdamW on bfloat16 weights loses small updates"
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2, …; unset: the model's own choice"},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "further keywords of from_pretrained"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "file, directory or Hub name of the training rows"}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "the same for evaluation"})
    dataset_split: str | None = field(
        default=None, metadata={"help": "split of dataset; unset: train, or the only one"}
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "split of eval_dataset; unset: as above"}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "processes that tokenise; unset: this one"}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "tokens of prompt and answer together; null: no limit"}
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "tokens of a prompt, a longer one keeps its end; unset: no limit"},
    )
    backward: str = field(
        default="auto",
        metadata={
            "help": "of the log-probs: exact, certified, or auto (certified for bf16 and fp16)"
        },
    )
    tol: float = field(
        default=DEFAULT_TOL,
        metadata={
            "help": "probability that a certified backward may leave out per token, in [0, 1)"
        },
    )
    low_memory: bool = field(
        default=False,
        metadata={
            "help": "a certified backward without a float32 sum beside dH or dW, at more time"
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={
            "help": "with gradient_checkpointing: hidden states wait for the backward in the host's memory"
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "no dropout anywhere in the model; a reference never has any"},
    )
    peft: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "fields of peft.LoraConfig, {} for its defaults; unset: all weights are trained"
        },
    )
    plot_loss: bool = field(
        default=False,
        metadata={"help": "write a PNG of the logged curves into output_dir at the end"},
    )

    def __post_init__(self) -> None:
        # What is chosen for this machine; a saved configuration leaves the choice to the next one.
        self._before_choice = {
            name: getattr(self, name) for name in ("bf16", "dataloader_pin_memory")
        }
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16
                and not self.use_cpu
                and torch.cuda.is_available()
                and torch.cuda.is_bf16_supported()
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        # transformers ≥ 5.19 renames these two; recipes keep the name that every version understands.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, False) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        self._check()

    @property
    def checkpoints_activations(self) -> bool:
        """Whether layers are computed again in the backward."""
        return bool(getattr(self, "activation_checkpointing", None) or self.gradient_checkpointing)

    @property
    def checkpointing_options(self) -> dict[str, Any]:
        """How that is done: the keywords under whichever of its names the running transformers has."""
        newer: Any = getattr(self, "activation_checkpointing_kwargs", None)
        older: Any = self.gradient_checkpointing_kwargs
        return dict(newer or older or {})

    # Fields that hold a mapping.
    _mappings: ClassVar[tuple[str, ...]] = ("model_init_kwargs", "peft")

    def _check(self) -> None:
        for name, choices in (
            ("dtype", DTYPES),
            ("backward", BACKWARDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        for name in ("max_length", "max_prompt_length", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer ≥ 1, or None")
        if not (isinstance(self.tol, int | float) and 0 <= self.tol < 1):
            raise ValueError(f"tol: got {self.tol!r}, expected a number in [0, 1)")
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length: got {self.max_prompt_length}, expected less than max_length "
                f"({self.max_length}): no room is left for an answer"
            )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: got {value!r}, expected an integer ≥ 1")
        for name in self._mappings:
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a mapping")
        if any(CREDENTIAL.search(key) for key in self.model_init_kwargs or ()):
            raise ValueError(
                "model_init_kwargs: holds a credential; log in with `hf auth login` or set HF_TOKEN instead"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {self.label_smoothing_factor}, expected 0: it smooths token "
                "labels; label_smoothing is the share of flipped pairs"
            )
        if self.activation_offloading:
            if not self.checkpoints_activations:
                raise ValueError(
                    "activation_offloading: got True, expected gradient_checkpointing: true with it; what goes "
                    "to the host is what gradient checkpoints keep"
                )
            if self.checkpointing_options.get("offload"):
                raise ValueError(
                    "gradient_checkpointing_kwargs: got offload beside activation_offloading, which does the "
                    "same; expected one of them"
                )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy: got 'batch_rebalance', whose micro-steps differ in rows between "
                "ranks; expected random, sequential or group_by_length"
            )
        if self.use_liger_kernel:
            # The log-probs come from fastpo's own operation; Liger's loss would replace the model's forward.
            wanted: dict[str, bool] = vars(self)["liger_kernel_config"] or {}
            self.liger_kernel_config = {
                **wanted,
                "fused_linear_cross_entropy": False,
                "cross_entropy": False,
            }
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter: got True, expected False: a loss that is not finite stops training"
            )


def own_fields(config_class: type[RunConfig]) -> dict[str, Any]:
    """fastpo's own fields of a class of settings, by name, in order."""
    classes = [c for c in reversed(config_class.__mro__) if issubclass(c, RunConfig)]
    names = [name for c in classes for name in inspect.get_annotations(c)]
    by_name = {f.name: f for f in fields(config_class)}
    return {name: by_name[name] for name in names if name in by_name}


def fields_table(config_class: type[RunConfig]) -> str:
    """The same as a Markdown table, indented like a class's docstring."""
    rows = [
        f"| ``{f.name}`` | {f.default} | {f.metadata['help']} |"
        for f in own_fields(config_class).values()
    ]
    return "".join(
        f"    {row}\n" for row in ["| Field | Default | Meaning |", "|---|---|---|", *rows]
    )


def save_config(config: RunConfig, path: Path) -> None:
    """Write the settings of a run as YAML that ``fastpo train --config`` takes, without credentials.

    Every field of fastpo's own is there, of ``TrainingArguments``' those that differ from their default. What
    was unset and chosen for this machine (``bf16``, pinned memory) stays unset.
    """
    import transformers

    from fastpo.version import __version__

    own = own_fields(type(config))
    values = {}
    for f in fields(config):
        value = plain(config._before_choice.get(f.name, getattr(config, f.name)))
        hidden = not f.init or f.name in _NOT_SAVED or CREDENTIAL.search(f.name)
        if not hidden and (f.name in own or value != _default(f)):
            values[f.name] = value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    versions = (
        f"fastpo {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    path.write_text(f"# {versions}\n{without_logins(text)}", encoding="utf-8")


# The launcher's business, and names that older transformers lack (their gradient_* twins hold the same).
_NOT_SAVED = ("local_rank", "activation_checkpointing", "activation_checkpointing_kwargs")


def _default(f: Any) -> Any:
    return plain(f.default_factory() if f.default_factory is not MISSING else f.default)
