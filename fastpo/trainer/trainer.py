"""``PreferenceTrainer``: transformers' Trainer on preference pairs, its loss computed without logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel

from fastpo.data import DataReport, TokenBudgetSampler, tokenize_preferences
from fastpo.head import FusedHead
from fastpo.head.causal_lm import find_causal_lm
from fastpo.losses import PreferenceOutput
from fastpo.losses.noisy_reference import NoisyReference

from . import reference
from .checkpoint import load_run_state
from .config import DEFAULT_LOSS_SETTINGS, LOSS_FIELDS, PreferenceConfig, build_loss
from .layout import Layout, label_positions, sequence_width, token_shares, tokens_read
from .loaders import EpochOfSampler, deal_to_all, prepared_loader
from .model import disable_dropout, is_peft_model, router_coefficient
from .noise import NoisePlayer, make_generator, noise_seed, token_index
from .noisy_head import NoisyHead
from .plots import PlotCallback
from .referenced import ReferencedTrainer
from .resumable import Problem, listed_rows
from .sequence_parallel import SequenceParallel
from .sharded import frozen_copy, place_frozen, whole_by_module

if TYPE_CHECKING:
    import datasets
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import TrainOutput

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "row")


@dataclass
class _MicroStep:
    """What is kept of a forward and backward until its optimiser step, all detached."""

    output: PreferenceOutput  # its loss with a router's auxiliary loss
    rows: Tensor  # (B,) rows of the data set
    tokens: Tensor  # (), input tokens
    shares: dict[str, Tensor]  # what the layout of the batch saves and wastes


class PreferenceTrainer(ReferencedTrainer):
    """Trains a causal language model on preference pairs with any loss of ``fastpo.losses.LOSSES``.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        args: the run's settings.
        train_dataset: rows of :func:`fastpo.data.load_preferences`, or already tokenised ones
            (:func:`fastpo.data.tokenize_preferences`); with the columns ``ref_chosen_logps`` and
            ``ref_rejected_logps`` (nats, summed) no reference model is needed.
        eval_dataset: the same, or a mapping of names to such data sets.
        processing_class: the tokenizer.
        ref_model: the reference; under ``ref_logps`` only to check that the file is of it. None: under PEFT
            the base model without its adapter, else a frozen copy of ``model`` as it is now.
        callbacks, optimizers: as for ``transformers.Trainer``.

    Attributes:
        data_reports: what became of the rows of each data set that was tokenised here, by name.
        loss_module: the :class:`fastpo.PreferenceLoss`; under ``method: dnpo`` its ``noise`` is the generator.

    Metrics have TRL's names and are means over all pairs since the last log line, on all ranks; in evaluation
    over all pairs of the set. ``num_tokens`` is the running total of input tokens, ``gamma/min`` and
    ``gamma/max`` are the extremes of γ. Means over tokens (``entropy``, ``mean_token_accuracy``, ``logits/*``)
    are taken per micro-step and then weighted by its pairs. ``tokens/shared`` is the share of the sequences'
    tokens that shared prompts left out, ``tokens/padding`` that of the batch's places which hold no token.

    Under ``method: dnpo`` the rejected answers' reference log-probs have trainable noise in training, none in
    evaluation (see :class:`fastpo.PreferenceLoss`). ``loss`` is the objective of the players in turn, whose two
    parts are ``loss/model`` and ``loss/noise``; rewards and what follows from them never have noise in them.
    ``noise/sigma_max`` is the largest |σ| on the last micro-step before a log line, ``noise/grad_norm`` the
    norm of the generator's gradient, which is clipped by itself.

    Raises:
        TypeError: ``args`` is no ``PreferenceConfig``, or ``model`` no model of transformers.
        ValueError: an encoder-decoder or multimodal model, a data set without usable rows, settings that the
            model does not allow.
    """

    # The loss is the mean over a micro-step's pairs; transformers divides it by the number of micro-steps.
    # Before transformers 5.19 that follows from model_accepts_loss_kwargs, set below.
    loss_is_scaled_for_ga = False
    settings_name = "loss"

    def __init__(
        self,
        model: PreTrainedModel,
        args: PreferenceConfig,
        *,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | Mapping[str, datasets.Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase,
        ref_model: PreTrainedModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected a PreferenceConfig")
        core, _ = find_causal_lm(model)
        self.router_coefficient = router_coefficient(core, args.router_aux_loss_coef)
        if self.router_coefficient and (args.padding_free or args.prefix_sharing):
            raise ValueError(
                f"router_aux_loss_coef: got {self.router_coefficient:g} with packed rows, expected 0: "
                "transformers takes the load-balancing loss over padded rows"
            )
        if args.disable_dropout:
            disable_dropout(model)
        self.data_reports: dict[str, DataReport] = {}
        train_dataset = self._tokenized(train_dataset, "train", args, processing_class)
        if isinstance(eval_dataset, Mapping):
            if "train" in eval_dataset:
                raise ValueError("eval_dataset: got one named 'train', expected another name")
            eval_dataset = {
                name: self._tokenized(rows, name, args, processing_class)
                for name, rows in eval_dataset.items()
            }
        else:
            eval_dataset = self._tokenized(eval_dataset, "eval", args, processing_class)
        pad = processing_class.pad_token_id
        models = [each for each in (model, ref_model) if each is not None]
        with whole_by_module(*models):
            self.layout = Layout(
                args, processing_class.eos_token_id if pad is None else pad, *models
            )
        use_cache = getattr(core.config, "use_cache", None)
        super().__init__(
            model,
            args,
            data_collator=self.layout.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*([PlotCallback()] if args.plot_loss else []), *(callbacks or [])],
            optimizers=optimizers,
        )
        if use_cache is not None:
            # Transformers switches it off for good; here every call says so, and a saved model generates.
            core.config.use_cache = use_cache
        self.model_accepts_loss_kwargs = False
        self._epoch_of_sampler = EpochOfSampler()
        self.add_callback(self._epoch_of_sampler)
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        self._sequence = SequenceParallel.of(args, self.accelerator, *models)
        if self._sequence is not None:
            if self.router_coefficient:
                raise ValueError(
                    f"router_aux_loss_coef: got {self.router_coefficient:g} with sequences spread over "
                    f"{self._sequence.size} processes, expected 0: transformers takes the load-balancing loss "
                    "over whole rows"
                )
            group = self._sequence.data_group
            self.layout.round_up(self._sequence.size)
            self.data_collator = self.layout.collator
        generator = None
        if args.method == "dnpo":
            self._check_noise(ref_model)
            generator = make_generator(ref_model or model, args)
        self.loss_module = build_loss(args, group, generator)
        self.loss_module.to(args.device)
        self._noise = None
        if generator is not None:
            self._noise = NoisePlayer(generator, args, self.accelerator.num_processes)
            self.add_callback(self._noise)
        self._micro_steps: list[_MicroStep] = []
        self._mean_pairs: float | None = None  # pairs per micro-step of the current optimiser step
        if args.ref_logps and self.loss_module.spec.needs_reference:
            self._read_reference(args.ref_logps, model if ref_model is None else ref_model)
        self.ref_model = self._prepare_models(ref_model)
        if self._lacks_reference() and args.precompute_ref_log_probs:
            self._precompute_reference()

    # ---- Data ----

    def _tokenized(
        self,
        rows: datasets.Dataset | None,
        name: str,
        args: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> datasets.Dataset | None:
        """Token ids of rows of text; rows that are tokenised already as they are."""
        if rows is None:
            return None
        if not set(TOKEN_COLUMNS) <= set(getattr(rows, "column_names", ())):
            rows, self.data_reports[name] = tokenize_preferences(
                rows,
                tokenizer,
                max_length=args.max_length,
                max_prompt_length=args.max_prompt_length,
                num_proc=args.dataset_num_proc,
                source=name,
            )
        if args.train_sampling_strategy == "group_by_length":
            lengths = [
                len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
                for row in rows
            ]
            rows = rows.add_column(args.length_column_name, lengths)
        return rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As transformers', or with ``tokens_per_batch`` batches of as many pairs as that allows."""
        if self.args.tokens_per_batch is None or self.train_dataset is None:
            loader = super().get_train_dataloader()
            return loader if self._sequence is None else self._sequence.deal(loader)
        sampler = TokenBudgetSampler(
            self.layout.tokens(self.train_dataset),
            self.args.tokens_per_batch,
            padded=not self.layout.packed,
            ranks=self.accelerator.num_processes
            if self._sequence is None
            else self._sequence.data_ranks,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self._epoch_of_sampler.sampler = sampler
        rows = self._remove_unused_columns(self.train_dataset, description="Training")
        loader = prepared_loader(rows, sampler, self.data_collator, self.args, self.accelerator)
        return loader if self._sequence is None else self._sequence.deal(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As transformers'; every process has pairs of its own, also those that share sequences in training."""
        return deal_to_all(super().get_eval_dataloader(eval_dataset), self.accelerator)

    def get_total_train_batch_size(self, args: PreferenceConfig) -> int:
        """Pairs of an optimiser step, over all processes."""
        return super().get_total_train_batch_size(args) // args.sequence_parallel_size

    def _set_signature_columns_if_needed(self) -> None:
        """The collator reads these columns, not the model's arguments."""
        self._signature_columns = [
            *TOKEN_COLUMNS,
            *reference.COLUMNS,
            self.args.length_column_name,
        ]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # DeepSpeed would have these sums cast to the model's dtype.
        ref_logps = inputs.get("ref_logps")
        prepared = super()._prepare_inputs(inputs)
        if ref_logps is not None:
            prepared["ref_logps"] = ref_logps.to(self.args.device)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The micro-steps of one optimiser step; how many pairs they hold on average decides their weights."""
        self._micro_steps = []
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._mean_pairs = sum(len(batch["rows"]) for batch in batches) / len(batches)
            if self._noise is not None:
                self._noise.count_tokens(batches)
        return batches, items

    # ---- Models ----

    def _prepare_models(self, ref_model: PreTrainedModel | None) -> PreTrainedModel | None:
        """Put the fused heads in place; the frozen reference, if one is run live."""
        args, policy = self.args, self.model
        if not self._lacks_reference() and self._noise is None:
            ref_model = None
        elif (
            ref_model is None
            and not is_peft_model(policy)
            and (self._noise is not None or not args.precompute_ref_log_probs)
        ):
            ref_model = frozen_copy(policy)
            self.layout.add_copy(ref_model)
        op_kwargs: dict[str, Any] = {
            "backward": args.backward,
            "tol": args.tol,
            "low_memory": args.low_memory,
        }
        with whole_by_module(policy):
            FusedHead(policy, return_stats=True, **op_kwargs).install()
        if ref_model is not None:
            ref_model.eval().requires_grad_(False)
            with whole_by_module(ref_model):
                FusedHead(ref_model, **op_kwargs).install()
        if args.use_liger_kernel:
            # Here, so that policy and reference round alike; transformers' train() would do the policy alone.
            for model in filter(None, (policy, ref_model)):
                apply_liger_kernel(model, args.liger_kernel_config)
        if self._noise is not None:
            self._noisy_head = NoisyHead(
                policy if ref_model is None else ref_model, self._noise.generator, **op_kwargs
            )
        return None if ref_model is None else place_frozen(ref_model, self.accelerator)

    def _check_noise(self, ref_model: PreTrainedModel | None) -> None:
        """Raise ValueError where method dnpo cannot be trained, or its reference is not known."""
        if self.is_deepspeed_enabled:
            raise ValueError(
                "deepspeed: got a configuration, expected None with method 'dnpo': it owns all gradients, and "
                "the noise generator is not among its parameters"
            )
        given = self.train_dataset is not None and set(reference.COLUMNS) <= set(
            self.train_dataset.column_names
        )
        if given and ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                "ref_model: got None, expected the reference whose log-probs the data set holds: method 'dnpo' "
                "scores the rejected answers anew at every step"
            )

    # ---- Loss ----

    def _around(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in the place of a model."""
        return model if self._sequence is None else self._sequence.around(model)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-step, see ``transformers.Trainer``."""
        if self._sequence is None:
            return super().training_step(model, *args, **kwargs)
        exact = self.accelerator.mixed_precision == "no" and next(model.parameters()).itemsize >= 4
        with self.accelerator.autocast():
            for each in filter(None, (model, self.ref_model)):
                self._sequence.try_on(each, exact=exact)
        with self._sequence.training():
            return super().training_step(model, *args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Any) -> Any:
        # Transformers would cut the batch up for torch's ring attention, which knows no pairs.
        if self._sequence is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        return nullcontext, inputs

    def _score(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> PreferenceOutput:
        """The loss of one micro-step, a router's auxiliary loss included."""
        labels = inputs["completion_labels"]
        ref_logps = inputs.get("ref_logps")
        noisy, player = None, "both"
        if self._noise is not None and model.training:
            player = self._noise.turn(self.state.global_step)
            ref_logps, noisy = self._noisy_reference(self._noise, inputs, player)
        elif ref_logps is None and self.loss_module.spec.needs_reference:
            ref_logps = self._reference_logps(inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and player != "noise"):
            outputs = self._around(model)(
                **self.layout.inputs(model, inputs),
                **({"output_router_logits": True} if self.router_coefficient else {}),
            )
        self.loss_module.train(model.training)
        if self._sequence is not None:
            self._sequence.couple(self.loss_module)
        result = self.loss_module.from_token_logps(
            outputs.log_probs, labels, ref_logps=ref_logps, noisy_reference=noisy, player=player,
            stats=outputs.token_stats,
        )  # fmt: skip
        if self.router_coefficient:
            result.token_means["aux_loss"] = outputs.aux_loss.detach()
            if player != "noise":
                result.loss = result.loss + self.router_coefficient * outputs.aux_loss
        return result

    def _noisy_reference(
        self, noise: NoisePlayer, inputs: Mapping[str, Tensor], player: str
    ) -> tuple[Tensor, NoisyReference]:
        """The reference's log-prob sums (2B,) without noise, and those of the rejected answers under noise."""
        rows, positions = inputs["rows"], label_positions(inputs).chunk(2)[1]
        known = inputs.get("ref_logps")
        options: dict[str, Any] = {
            "known": known,
            "seed": noise_seed(self.args.seed, self.state.global_step),
            "token_index": token_index(
                rows, positions, sequence_width(inputs), self.args.max_length
            ),
            # Undone by the weight of the micro-step's loss: the penalty's own is its share of the tokens.
            "mean_tokens": noise.mean_tokens * (len(rows) / (self._mean_pairs or len(rows))),
            "differentiable": player != "model",
        }
        with self.accelerator.autocast():
            model = self.ref_model or self.model
            scored = self.layout.inputs(model, inputs, rejected_only=known is not None)
            if self.ref_model is not None:
                logps, noisy = self._noisy_head(model, scored, **options)
            else:
                with reference.base_model(model):
                    logps, noisy = self._noisy_head(model, scored, **options)
        noise.hidden = noisy.hidden
        return logps, noisy

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, PreferenceOutput]:
        """The mean loss of the batch's pairs; in training weighted by how many they are.

        With the weight, the mean over the micro-steps of an optimiser step is the mean over its pairs, also
        where the last micro-step of an epoch is smaller.
        """
        result = self._score(model, inputs)
        loss = result.loss
        if model.training:
            pairs = len(inputs["rows"])
            if self._mean_pairs is not None:
                loss = loss * (pairs / self._mean_pairs)
            self._micro_steps.append(
                _MicroStep(
                    _detached(result), inputs["rows"], tokens_read(inputs), token_shares(inputs)
                )
            )
            self._stop_before_backward(lambda: self._problem({}))
        return (loss, result) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Transformers' last call before the optimiser step: read the metrics, and stop if a number is bad."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        norms = {"the gradient": grad_norm}
        if self._noise is not None:
            norms["the noise's gradient"] = self._noise.finish_gradient()
        self._stop_together(self._problem(norms), taken=self.is_deepspeed_enabled)
        for step in self._micro_steps:
            metrics = _metrics(step.output) | {k: float(v) for k, v in step.shares.items()}
            if self._noise is not None:
                metrics["noise/grad_norm"] = norms["the noise's gradient"]
                if self.is_world_process_zero():
                    self._noise.watch(metrics["noise/sigma_peak"], self.state.global_step + 1)
            if self._sequence is None or self._sequence.rank == 0:  # the others read the same
                self._window.add(metrics, len(step.rows))
                self._tokens_trained += int(step.tokens)
        self._micro_steps = []
        return grad_norm

    def _problem(self, norms: Mapping[str, Any]) -> Problem | None:
        """What is not finite on this rank, in which micro-step and data rows, or how large σ is."""
        count = len(self._micro_steps)
        for k, step in enumerate(self._micro_steps, start=1):
            loss = step.output.loss.item()
            if not math.isfinite(loss):
                # Not the losses: one bad gap makes every γ bad, and with it all losses of the batch.
                bad = ~(step.output.chosen_rewards + step.output.rejected_rewards).isfinite()
                own = bool(bad.any())
                rows = listed_rows([step.rows[bad] if own else step.rows])
                return Problem(
                    f"the loss is {loss} in micro-step {k} of {count}, data rows {rows}",
                    distance=0 if own else 1,
                )
            if self._noise is not None:
                excess = self._noise.excess(step.output.noise["noise/sigma_peak"].item())
                if excess:
                    return Problem(excess, distance=0)
        return self._bad_norm(norms, [step.rows for step in self._micro_steps])

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch; its metrics are kept for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            result = self._score(model, inputs)
        pairs = self._own_rows(len(inputs["rows"]))
        if pairs:
            self._eval_window.add(_metrics(_first(result, pairs)), pairs)
        return result.loss.detach(), None, None

    # ---- Logging and checkpoints ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a line of training gets the metrics since the last one."""
        largest = self._noise.sigma_max() if "loss" in logs and self._noise is not None else None
        if largest is not None:
            self._window.add({"noise/sigma_max": largest.item()}, 1)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As :meth:`ResumableTrainer.train`.

        Raises:
            FloatingPointError: also where σ of the noise reached ``noise_sigma_limit``.
        """
        if self._noise is not None:
            self._noise.forget_gradient()
        return super().train(resume_from_checkpoint, **kwargs)

    def _recorded_settings(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in LOSS_FIELDS}

    def _default_settings(self) -> dict[str, Any]:
        return DEFAULT_LOSS_SETTINGS

    def _state_tensors(self) -> dict[str, Tensor]:
        if self._noise is None:
            return self.loss_module.state_dict()
        return {**self.loss_module.state_dict(), **self._noise.state()}

    def _restore_tensors(self, tensors: dict[str, Tensor], checkpoint: Path) -> None:
        if self._noise is not None:
            tensors = self._noise.restore(tensors)
        self.loss_module.load_state_dict(tensors)

    def _restore(self, checkpoint: Path) -> Mapping[str, Tensor]:
        if self._noise is not None:  # before the settings, which say less
            self._noise.check_checkpoint(load_run_state(checkpoint).tensors, str(checkpoint))
        return super()._restore(checkpoint)


def _metrics(output: PreferenceOutput) -> dict[str, float]:
    metrics = {"loss": float(output.loss), **output.metrics()}
    metrics.pop(
        "num_tokens"
    )  # of labelled tokens; the trainer logs the running total of input tokens
    return metrics


def _detached(output: PreferenceOutput) -> PreferenceOutput:
    """Without the graph, so that it can be kept."""
    tensors: dict[str, Any] = {
        k: v.detach() for k, v in vars(output).items() if isinstance(v, Tensor)
    }
    return replace(output, **tensors)


def _first(output: PreferenceOutput, pairs: int) -> PreferenceOutput:
    """The same for the first ``pairs`` pairs alone; terms that belong to no pair stay those of the batch."""
    if pairs == len(output.losses):
        return output
    others = output.loss - output.losses.mean()
    kept: dict[str, Any] = {
        name: value[:pairs]
        for name, value in vars(output).items()
        if isinstance(value, Tensor) and value.dim() == 1
    }
    return replace(output, **kept, loss=kept["losses"].mean() + others)
