"""``PreferenceConfig``: every setting of a training run, one flat set of fields beside TrainingArguments'."""

from __future__ import annotations

import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import yaml
from transformers import TrainingArguments

from fastpo.losses import PreferenceLoss, find_loss
from fastpo.margins import DynamicMargin
from fastpo.noise import NoiseGenerator
from fastpo.ops.certified import BACKWARDS, DEFAULT_TOL

from .noise_settings import check_noise_settings

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPES = ("auto", "float32", "bfloat16", "float16")
MARGINS = ("fixed", "gamma")
_GAMMA_FIELDS = (
    "gamma_tau",
    "gamma_scope",
    "gamma_solver",
    "gamma_queue_size",
    "gamma_sample_size",
)  # of margin gamma alone


@dataclass
class PreferenceConfig(TrainingArguments):
    """Settings of a preference-optimisation run, beside every field of ``transformers.TrainingArguments``.

    Batch sizes count pairs: ``per_device_train_batch_size: 4`` runs 8 sequences through the model at once.
    ``resume_from_checkpoint`` is a checkpoint directory, or ``auto``: the newest complete one in
    ``output_dir``, a fresh start if there is none. ``use_liger_kernel`` is for the model's other layers;
    Liger's own loss stays off. The first five fields below have another default than in ``TrainingArguments``.

    Gradient accumulation equals one large batch for every loss that is a mean over pairs. Terms that couple the
    pairs of a batch are taken per micro-step over all ranks, as their authors do: γ, the losses with
    ``fastpo.losses.LOSSES[name].batch_coupled``, an SFT term's token mean, a router's load-balancing loss.

    Raises:
        TypeError: an option in ``loss_kwargs`` that the loss does not have.
        ValueError: a setting out of range, or two that exclude each other; the message names it.
    """

    _VALID_DICT_FIELDS: ClassVar = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "loss_kwargs",
        "peft",
    ]

    learning_rate: float = field(default=1e-6, metadata={"help": "initial learning rate"})
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "passes over the training pairs"}
    )
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
        default=None, metadata={"help": "checkpoint directory or Hub name of the policy's start"}
    )
    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "reference model; unset: the policy before training, under peft its base"
        },
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
        metadata={"help": "further keywords of from_pretrained, for policy and reference"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "file, directory or Hub name of the training pairs"}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "the same for evaluation pairs"}
    )
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
    method: str = field(
        default="preference",
        metadata={
            "help": "preference, or dnpo: trainable noise in the reference's logits of the rejected answers"
        },
    )
    loss_type: str = field(default="dpo", metadata={"help": "a name of fastpo.losses.LOSSES"})
    beta: float = field(
        default=0.1,
        metadata={"help": "β > 0; usual: 0.01 to 0.5 with a reference, 2 to 10 for simpo"},
    )
    gamma_beta_ratio: float | None = field(
        default=None,
        metadata={"help": "mean target margin γ0 in units of β, of simpo and of margin gamma"},
    )
    simpo_gamma: float | None = field(
        default=None, metadata={"help": "γ0 itself, instead of gamma_beta_ratio; both unset: 0.5"}
    )
    margin: str = field(
        default="fixed", metadata={"help": "fixed, or gamma: each pair's own target margin (γ-PO)"}
    )
    gamma_tau: float = field(
        default=10.0, metadata={"help": "τ > 0 of γ-PO: the larger, the closer every γ stays to γ0"}
    )
    gamma_scope: str = field(
        default="queue",
        metadata={
            "help": "pairs that γ is solved over: queue (recent gaps and this micro-step's) or batch "
            "(this micro-step's), of all ranks"
        },
    )
    gamma_solver: str = field(
        default="exact", metadata={"help": "exact, or mirror: the authors' 20 steps"}
    )
    gamma_queue_size: int = field(default=2048, metadata={"help": "gaps that the queue holds"})
    gamma_sample_size: int = field(
        default=256,
        metadata={"help": "pairs in one solve: this micro-step's and draws from the queue"},
    )
    noise_schedule: str = field(
        default="joint",
        metadata={
            "help": "of dnpo: joint (policy and noise in every optimiser step), or alternating (noise_steps "
            "optimiser steps of the noise, then one of the policy)"
        },
    )
    noise_alpha: float = field(
        default=1.0, metadata={"help": "weight α ≥ 0 of the penalty on the noise's mean σ²"}
    )
    noise_rank: int | None = field(
        default=None,
        metadata={
            "help": "rank of the noise generator; unset: full, vocabulary × hidden parameters"
        },
    )
    noise_steps: int = field(
        default=1, metadata={"help": "optimiser steps of the noise before each of the policy"}
    )
    noise_learning_rate: float = field(
        default=1e-5,
        metadata={"help": "of the noise generator, scheduled like learning_rate; no weight decay"},
    )
    noise_sigma_limit: float = field(
        default=10.0,
        metadata={
            "help": "root mean square of a vocabulary entry's σ, in units of logits, at which training stops; "
            "it warns from an eighth of it on"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "ε in [0, 1/2), share of labels taken to be flipped"}
    )
    sft_weight: float | None = field(
        default=None,
        metadata={
            "help": "weight of the SFT term; unset: the loss's own (1 for cpo and orpo, else 0)"
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "options of one loss alone, e.g. rdpo_alpha or discopop_tau"},
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
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "compute the reference's log-probs once, before training, and cache them on disk"
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "no dropout anywhere in the policy; the reference never has any"},
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "weight of a mixture-of-experts model's load-balancing loss; unset: its own"
        },
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
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return find_loss(self.loss_type).needs_reference

    def _check(self) -> None:
        for name, choices in (
            ("dtype", DTYPES),
            ("margin", MARGINS),
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
        for name in ("model_init_kwargs", "loss_kwargs", "peft"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected a mapping")
        if any(_CREDENTIAL.search(key) for key in self.model_init_kwargs or ()):
            raise ValueError(
                "model_init_kwargs: holds a credential; log in with `hf auth login` or set HF_TOKEN instead"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {self.label_smoothing_factor}, expected 0: it smooths token "
                "labels; label_smoothing is the share of flipped pairs"
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy: got 'batch_rebalance', whose micro-steps differ in pairs between "
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
        if self.router_aux_loss_coef is not None and not self.router_aux_loss_coef >= 0:
            raise ValueError(
                f"router_aux_loss_coef: got {self.router_aux_loss_coef}, expected a number ≥ 0"
            )
        build_loss(self)  # checks what belongs to the loss
        check_noise_settings(self)
        idle = [
            f.name
            for f in fields(self)
            if f.name in _GAMMA_FIELDS and getattr(self, f.name) != f.default
        ]
        if idle and self.margin == "fixed":
            warnings.warn(
                f"{', '.join(idle)}: no effect with margin 'fixed', expected margin 'gamma' for γ-PO",
                UserWarning,
                stacklevel=4,
            )
        if not self.needs_reference and (
            self.precompute_ref_log_probs or self.ref_model_name_or_path
        ):
            warnings.warn(
                f"loss {self.loss_type!r} uses no reference: ref_model_name_or_path and "
                "precompute_ref_log_probs have no effect",
                UserWarning,
                stacklevel=4,
            )


def build_loss(
    config: PreferenceConfig,
    group: ProcessGroup | None = None,
    noise: NoiseGenerator | None = None,
) -> PreferenceLoss:
    """The loss module that a configuration describes.

    Args:
        config: the run's settings.
        group: ranks over which γ and batch-coupled terms are taken; None: this process alone.
        noise: the generator of method ``dnpo``, which only a model's sizes can make.

    Raises:
        TypeError, ValueError: as :class:`fastpo.PreferenceLoss` and :class:`fastpo.DynamicMargin` raise them.
    """
    options: Any = config.loss_kwargs or {}
    margin = None
    if config.margin == "gamma":
        try:
            margin = DynamicMargin(
                config.gamma_tau,
                scope=config.gamma_scope,
                queue_size=config.gamma_queue_size,
                sample_size=config.gamma_sample_size,
                solver=config.gamma_solver,
                seed=config.seed,
                group=group,
            )
        except (TypeError, ValueError) as error:  # names its own argument, not the field
            prefix = "" if str(error).startswith("seed:") else "gamma_"
            raise type(error)(f"{prefix}{error}") from error
    try:
        return PreferenceLoss(
            config.loss_type,
            beta=config.beta,
            gamma_beta_ratio=config.gamma_beta_ratio,
            simpo_gamma=config.simpo_gamma,
            label_smoothing=config.label_smoothing,
            sft_weight=config.sft_weight,
            margin=margin,
            noise=noise,
            noise_alpha=None if noise is None else config.noise_alpha,
            backward=config.backward,
            tol=config.tol,
            low_memory=config.low_memory,
            group=group,
            **options,
        )
    except (TypeError, ValueError) as error:
        if options and (isinstance(error, TypeError) or str(error).split(":")[0] in options):
            raise type(error)(f"loss_kwargs: {error}") from error
        raise


def _fields_table() -> str:
    """The class's own fields as a Markdown table, indented like its docstring."""
    own = (f for f in fields(PreferenceConfig) if f.name in PreferenceConfig.__annotations__)
    rows = [f"| ``{f.name}`` | {f.default} | {f.metadata['help']} |" for f in own]
    return "".join(
        f"    {row}\n" for row in ["| Field | Default | Meaning |", "|---|---|---|", *rows]
    )


PreferenceConfig.__doc__ = f"{PreferenceConfig.__doc__}\n{_fields_table()}"


LOSS_FIELDS = (
    "method",
    "loss_type",
    "beta",
    "gamma_beta_ratio",
    "simpo_gamma",
    "margin",
    *_GAMMA_FIELDS,
    "noise_schedule",
    "noise_alpha",
    "noise_rank",
    "noise_steps",
    "label_smoothing",
    "sft_weight",
    "loss_kwargs",
)  # what a checkpoint records: a run resumed with another loss would be two runs mixed
DEFAULT_LOSS_SETTINGS = {
    f.name: f.default for f in fields(PreferenceConfig) if f.name in LOSS_FIELDS
}


def save_config(config: PreferenceConfig, path: Path) -> None:
    """Write the settings of a run as YAML that ``fastpo train --config`` takes, without credentials.

    Every field of fastpo's own is there, of ``TrainingArguments``' those that differ from their default. What
    was unset and chosen for this machine (``bf16``, pinned memory) stays unset.
    """
    import transformers

    from fastpo.version import __version__

    own = PreferenceConfig.__annotations__
    values = {}
    for f in fields(config):
        value = _plain(config._before_choice.get(f.name, getattr(config, f.name)))
        hidden = not f.init or f.name in _NOT_SAVED or _CREDENTIAL.search(f.name)
        if not hidden and (f.name in own or value != _default(f)):
            values[f.name] = value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    versions = (
        f"fastpo {__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    path.write_text(f"# {versions}\n{_URL_LOGIN.sub('://', text)}", encoding="utf-8")


# The launcher's business, and names that older transformers lack (their gradient_* twins hold the same).
_NOT_SAVED = ("local_rank", "activation_checkpointing", "activation_checkpointing_kwargs")
_CREDENTIAL = re.compile(r"(^|_)(token|password|secret|api_key)$")
_URL_LOGIN = re.compile(r"://[^/\s@]+@")


def _default(f: Any) -> Any:
    return _plain(f.default_factory() if f.default_factory is not MISSING else f.default)


def _plain(value: Any) -> Any:
    """YAML types alone, mappings without their credentials."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {
            str(k): _plain(v)
            for k, v in value.items()
            if not (isinstance(k, str) and _CREDENTIAL.search(k))
        }
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return value if isinstance(value, bool | int | float | str | None) else str(value)
