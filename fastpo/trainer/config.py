"""``PreferenceConfig``: every setting of a preference run, one flat set of fields beside TrainingArguments'."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fastpo.losses import PreferenceLoss, find_loss
from fastpo.margins import DynamicMargin
from fastpo.noise import NoiseGenerator

from .noise_settings import check_noise_settings
from .run_config import RunConfig, fields_table

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MARGINS = ("fixed", "gamma")
_GAMMA_FIELDS = (
    "gamma_tau",
    "gamma_scope",
    "gamma_solver",
    "gamma_queue_size",
    "gamma_sample_size",
)  # of margin gamma alone


@dataclass
class PreferenceConfig(RunConfig):
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
        *RunConfig._VALID_DICT_FIELDS,
        "loss_kwargs",
    ]

    ref_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "reference model; unset: the policy before training, under peft its base"
        },
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
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "compute the reference's log-probs once, before training, and cache them on disk"
        },
    )
    ref_logps: str | None = field(
        default=None,
        metadata={
            "help": "Parquet file of the reference's log-probs that `fastpo ref-logps` wrote: no reference is "
            "run"
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "sequences stand one after another in a row instead of each in its own"},
    )
    prefix_sharing: bool = field(
        default=False,
        metadata={
            "help": "a pair's prompt is computed once for both answers; padding_free with that"
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "of a micro-step on one device, at most: as many pairs as that allows instead of "
            "per_device_train_batch_size"
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={
            "help": "processes over which the tokens of each sequence are spread; they train on the same pairs"
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "weight of a mixture-of-experts model's load-balancing loss; unset: its own"
        },
    )

    _mappings: ClassVar[tuple[str, ...]] = (*RunConfig._mappings, "loss_kwargs")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference model."""
        return find_loss(self.loss_type).needs_reference

    def _check(self) -> None:
        super()._check()
        if self.margin not in MARGINS:
            raise ValueError(f"margin: got {self.margin!r}, expected one of {', '.join(MARGINS)}")
        if self.router_aux_loss_coef is not None and not self.router_aux_loss_coef >= 0:
            raise ValueError(
                f"router_aux_loss_coef: got {self.router_aux_loss_coef}, expected a number ≥ 0"
            )
        budget = self.tokens_per_batch
        if budget is not None and not (isinstance(budget, int) and budget >= 1):
            raise ValueError(f"tokens_per_batch: got {budget!r}, expected an integer ≥ 1, or None")
        if budget and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy: got {self.train_sampling_strategy!r}, expected random with "
                "tokens_per_batch, which puts rows of like length together by itself"
            )
        size = self.sequence_parallel_size
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"sequence_parallel_size: got {size!r}, expected an integer ≥ 1")
        if size > 1 and self.method == "dnpo":
            raise ValueError(
                f"sequence_parallel_size: got {size}, expected 1 with method 'dnpo', whose penalty is taken "
                "over whole sequences"
            )
        if size > 1 and self.torch_compile:
            raise ValueError(
                f"torch_compile: got True with sequence_parallel_size {size}, expected False: compiled code "
                "would keep attention as it was when it was compiled"
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
        if self.ref_logps and self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs: got True, expected False beside ref_logps, which holds them"
            )
        if self.ref_logps and self.method == "dnpo":
            raise ValueError(
                f"ref_logps: got {self.ref_logps!r}, expected None with method 'dnpo', which scores the "
                "rejected answers anew at every step"
            )
        if not self.needs_reference and (
            self.precompute_ref_log_probs or self.ref_model_name_or_path or self.ref_logps
        ):
            warnings.warn(
                f"loss {self.loss_type!r} uses no reference: ref_model_name_or_path, "
                "precompute_ref_log_probs and ref_logps have no effect",
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


PreferenceConfig.__doc__ = f"{PreferenceConfig.__doc__}\n{fields_table(PreferenceConfig)}"


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
