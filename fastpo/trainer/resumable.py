"""``ResumableTrainer``: transformers' Trainer whose resumed runs go on as if nothing had happened.

What fastpo's trainers share: which directories may be resumed from, what a checkpoint records beside
transformers' own, means of metrics between log lines, and the stop before an optimiser step that would not be
finite.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from fastpo.rank_watch import watch_ranks

from .activation_offloading import OffloadCallback
from .agreement import check_agreement, rows_digest, shared_settings, state_digest
from .checkpoint import (
    STATE_FILE,
    RunState,
    checkpoints,
    find_resume_point,
    load_run_state,
    save_run_state,
)
from .devices import Devices
from .metrics import LogLastStep, MetricWindow
from .sharded import check_wrapping, is_sharded, whole_state

if TYPE_CHECKING:
    from transformers import TrainerCallback
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput

ROWS_NAMED = 16  # data rows that an error message lists

logger = logging.get_logger(__name__)


class Problem(NamedTuple):
    """Why a step must not be taken."""

    text: str
    # From the cause to where it shows: 0 in this rank's own log-probs, 1 in its loss, 2 in the gradient.
    distance: int


class ResumableTrainer(Trainer):
    """The base of fastpo's trainers.

    A subclass adds to ``_window`` and ``_tokens_trained`` what its micro-steps gave, says in
    ``_recorded_settings`` which settings a resumed run must share, and keeps further state in
    ``_state_tensors`` and ``_restore_tensors``.
    """

    settings_name = "settings"  # of what _recorded_settings holds, in messages

    def __init__(
        self, model: nn.Module, args: Any, *, callbacks: list[TrainerCallback], **options: Any
    ) -> None:
        if args.n_gpu > 1:
            logger.warning(
                f"one process sees {args.n_gpu} GPUs and uses only the first; `accelerate launch` uses all"
            )
            args._n_gpu = 1
        if args.activation_offloading and _launcher_checkpoints():
            raise ValueError(
                "activation_offloading: got True where the launch configuration has FSDP checkpoint "
                "activations, which this does not reach; expected fsdp_activation_checkpointing: false there "
                "and gradient_checkpointing: true here"
            )
        if args.gradient_checkpointing and _launcher_checkpoints():
            # Transformers refuses both. A run's settings need not know how it is launched.
            logger.info("gradient_checkpointing is left to FSDP, as the launch configuration says")
            args.gradient_checkpointing = False
            if hasattr(args, "activation_checkpointing"):  # its newer name
                args.activation_checkpointing = False
        self._tokens_trained = 0  # by this rank
        self._window = MetricWindow()
        self._eval_window = MetricWindow()
        # LogLastStep is the last: any of the others may end the training.
        callbacks = [*([OffloadCallback()] if args.activation_offloading else []), *callbacks]
        super().__init__(model, args, callbacks=[*callbacks, LogLastStep()], **options)
        check_wrapping(model, self.accelerator)

    # ---- What a subclass says ----

    def _recorded_settings(self) -> dict[str, Any]:
        """Settings that a checkpoint records, and that a resumed run must share."""
        return {}

    def _default_settings(self) -> dict[str, Any]:
        """What a checkpoint had that was saved before a setting existed."""
        return {}

    def _state_tensors(self) -> dict[str, Tensor]:
        """State of its own beside the model's and the optimiser's."""
        return {}

    def _restore_tensors(self, tensors: dict[str, Tensor], checkpoint: Path) -> None:
        """Take back what ``_state_tensors`` gave, or raise ValueError where it does not fit."""

    # ---- Steps ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The micro-steps of one optimiser step."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed at its end, in the middle of an epoch: transformers would train one step too many.
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # ---- A number that is not finite ----

    def _stop_before_backward(self, problem: Callable[[], Problem | None]) -> None:
        """Look at the losses where it is the last chance: DeepSpeed's engine steps inside the last backward."""
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self._stop_together(problem())

    def _stop_together(self, problem: Problem | None, *, taken: bool = False) -> None:
        """Raise FloatingPointError on all ranks if any of them has a problem with the coming step.

        A bad number spreads: over γ to the losses of all ranks, and over the gradient to their norms. Named are
        the ranks that are nearest to its cause. ``taken``: the step may already have been taken.
        """
        if self.accelerator.num_processes > 1:
            flag = torch.tensor([problem is not None], device=self.args.device)
            if not self.accelerator.gather(flag).any():
                return
            found = [(rank, p) for rank, p in enumerate(gather_object([problem])) if p]
            nearest = min(p.distance for _, p in found)
            text = "; ".join(f"rank {rank}: {p.text}" for rank, p in found if p.distance == nearest)
        elif problem:
            text = problem.text
        else:
            return
        saved = checkpoints(Path(self.args.output_dir))
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        moment = "at" if taken else "before"
        weights = "Weights may have been" if taken else "No weight was"
        raise FloatingPointError(
            f"training stopped {moment} optimiser step {self.state.global_step + 1}: {text}. "
            f"{weights} changed by it; {last}"
        )

    def _bad_norm(self, norms: Mapping[str, Any], rows: list[Tensor]) -> Problem | None:
        """Which gradient of a step on ``rows`` is not finite."""
        # Under float16 an overflow is found and skipped by the gradient scaler.
        if getattr(self.accelerator, "scaler", None) is not None:
            return None
        for name, norm in norms.items():
            if norm is not None and not math.isfinite(float(norm)):
                return Problem(
                    f"the loss is finite but {name}'s norm is {float(norm)}, "
                    f"data rows {listed_rows(rows)}",
                    distance=2,
                )
        return None

    # ---- Evaluation ----

    def _own_rows(self, rows: int) -> int:
        """How many of a batch's rows count: the last batches of several ranks are filled up with others."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(max(state.remainder - self.accelerator.process_index * rows, 0), rows)

    @watch_ranks()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Transformers' loop, with the means of ``_eval_window`` over the whole set in its metrics."""
        self._eval_window = MetricWindow()
        output = super().evaluation_loop(
            dataloader, description, True, ignore_keys, metric_key_prefix
        )
        means = self._eval_window.over_ranks().means()
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in means.items()})
        return output

    # ---- Logging and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a line of training gets the metrics since the last one."""
        if "loss" in logs:
            logs.update(self._window.over_ranks().means())
            logs["num_tokens"] = self._total_tokens()
            self._window = MetricWindow()
        super().log(logs, start_time)

    def _total_tokens(self) -> int:
        return sum(gather_object([self._tokens_trained]))

    @watch_ranks()
    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint directory; True: the newest one in ``output_dir``; ``"auto"``:
                the newest complete one, a fresh start if there is none; None: what ``args`` says; False: a
                fresh start.
            kwargs: as for ``transformers.Trainer.train``.

        Raises:
            FloatingPointError: a loss or gradient was not finite; names the step and the data rows.
            RankFailure: another process of the run failed (see :func:`fastpo.trainer.watch_ranks`).
            ValueError: ``output_dir`` already holds a run; a directory that cannot be resumed from, was trained
                with other settings, or on other devices in a way that this run cannot go on with; processes
                whose settings, rows, checkpoint or state differ.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = find_resume_point(Path(self.args.output_dir), resume_from_checkpoint)
        self._tokens_trained = 0
        self._window = MetricWindow()
        state = None if checkpoint is None else self._restore(checkpoint)
        self._check_agreement(checkpoint, state)
        resume = None if checkpoint is None else str(checkpoint)
        return super().train(resume_from_checkpoint=resume, **kwargs)

    def _check_agreement(
        self, checkpoint: Path | None = None, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Raise ValueError on all processes where they are about to run something different.

        ``state``: what ``checkpoint`` holds of ``_state_tensors``.
        """
        if self.accelerator.num_processes == 1:
            return
        evaluation = self.eval_dataset
        several = evaluation if isinstance(evaluation, Mapping) else {"eval": evaluation}
        named = {"train": self.train_dataset, **several}
        check_agreement(
            {
                **shared_settings(self.args),
                **{f"{name} data": rows_digest(rows) for name, rows in named.items() if rows},
                "resume_from_checkpoint": None if checkpoint is None else checkpoint.name,
                **state_digest(self._state_tensors() if state is None else state),
            }
        )

    def _restore(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """Take back the state of a checkpoint, of which the tensors are returned as they were saved."""
        state = load_run_state(checkpoint)
        Devices.of(self.args, self.accelerator).check_resumption(state.devices, str(checkpoint))
        before = {**self._default_settings(), **state.settings}
        changed = [
            f"{name} {before.get(name)!r} → {value!r}"
            for name, value in self._recorded_settings().items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} was trained with another {self.settings_name} "
                f"({', '.join(changed)}); start a run of its own with model_name_or_path instead"
            )
        self._restore_tensors(state.tensors, checkpoint)
        if self.is_world_process_zero():  # sums over all ranks; the others start from nothing
            self._tokens_trained = state.num_tokens
            self._window = MetricWindow(state.window)
        return state.tensors

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Overwriting what a killed run left behind: until it is complete again it must not look so.
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (directory / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """After the model and the optimiser, and before old checkpoints are deleted: the rest of the state."""
        super()._save_rng_state(output_dir)
        state = RunState(
            settings=self._recorded_settings(),
            num_tokens=self._total_tokens(),
            window=self._window.over_ranks().state,
            tensors=self._state_tensors(),
            devices=asdict(Devices.of(self.args, self.accelerator)),
        )
        if self.args.should_save:
            save_run_state(Path(output_dir), state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as ``from_pretrained`` loads it, also where its weights are sharded.

        Transformers' own writes nothing of the kind under FSDP2 with ``SHARDED_STATE_DICT``, nor under ZeRO-3
        without ``stage3_gather_16bit_weights_on_model_save``. A checkpoint keeps the form that these ask for.
        """
        if _internal_call or not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        state = whole_state(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # Transformers pickles its arguments beside the weights, the Hub token among them.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            self.args.hub_token = token


def _launcher_checkpoints() -> bool:
    """Whether `accelerate launch` was told to shard by FSDP with activation checkpointing."""
    return all(
        os.environ.get(name, "").lower() == "true"
        for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING")
    )


def listed_rows(rows: list[Tensor]) -> str:
    """The first few data rows of some micro-steps, for a message."""
    numbers = [n for part in rows for n in part.tolist()]
    more = ", …" if len(numbers) > ROWS_NAMED else ""
    return ", ".join(map(str, numbers[:ROWS_NAMED])) + more
