"""Supervised fine-tuning on the same log-prob operation: settings, trainer, and the whole job as one function.

    loss = −Σ log p(completion token) / number of completion tokens of the optimiser step, over all ranks

Only the completion is trained on. The logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from fastpo.data import DataReport, ExampleCollator, load_examples, tokenize_examples
from fastpo.head import FusedHead
from fastpo.head.causal_lm import find_causal_lm
from fastpo.rank_watch import watch_ranks

from .launch import check_sources, model_to_train, run_to_its_end
from .model import checked_name, disable_dropout, load_tokenizer
from .plots import PlotCallback
from .resumable import Problem, ResumableTrainer, listed_rows
from .run_config import RunConfig, fields_table
from .sharded import whole_by_module

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

COLUMNS = ("prompt_ids", "completion_ids", "row")


@dataclass
class SFTConfig(RunConfig):
    """Settings of supervised fine-tuning, beside every field of ``transformers.TrainingArguments``."""

    learning_rate: float = field(default=1e-5, metadata={"help": "initial learning rate"})


SFTConfig.__doc__ = f"{SFTConfig.__doc__}\n\n{fields_table(SFTConfig)}"


class SFTTrainer(ResumableTrainer):
    """Trains a causal language model on the completions of examples.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        args: the run's settings.
        train_dataset: rows of :func:`fastpo.data.load_examples`, or already tokenised ones.
        eval_dataset: the same.
        processing_class: the tokenizer.
        callbacks, optimizers: as for ``transformers.Trainer``.

    Attributes:
        data_reports: what became of the rows of each data set that was tokenised here, by name.

    Metrics have TRL's names: ``entropy`` and ``mean_token_accuracy`` are means over the completion tokens since
    the last log line, on all ranks, ``num_tokens`` the running total of input tokens.

    Raises:
        TypeError: ``args`` is no ``SFTConfig``, or ``model`` no model of transformers.
        ValueError: an encoder-decoder or multimodal model, or a data set without usable rows.
    """

    # compute_loss divides by the tokens of the whole optimiser step.
    loss_is_scaled_for_ga = True

    args: SFTConfig

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        *,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, SFTConfig):
            raise TypeError(f"args: got {type(args).__name__}, expected an SFTConfig")
        core, _ = find_causal_lm(model)
        if args.disable_dropout:
            disable_dropout(model)
        self.data_reports: dict[str, DataReport] = {}
        pad = processing_class.pad_token_id
        use_cache = getattr(core.config, "use_cache", None)
        self._rows: list[Tensor] = []  # of the micro-steps of the current optimiser step
        self._losses: list[Tensor] = []
        self._step_tokens = 0
        super().__init__(
            model,
            args,
            data_collator=ExampleCollator(processing_class.eos_token_id if pad is None else pad),
            train_dataset=self._tokenized(train_dataset, "train", args, processing_class),
            eval_dataset=self._tokenized(eval_dataset, "eval", args, processing_class),
            processing_class=processing_class,
            callbacks=[*([PlotCallback()] if args.plot_loss else []), *(callbacks or [])],
            optimizers=optimizers,
        )
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                f"parallelism_config: got cp_size {parallelism.cp_size} and sp_size {parallelism.sp_size}, "
                "expected 1 of both: SFTTrainer does not spread sequences over processes"
            )
        if use_cache is not None:  # transformers switches it off for good; a saved model generates
            core.config.use_cache = use_cache
        # What loss_is_scaled_for_ga says, before transformers 5.19: with the count of get_batch_samples.
        self.model_accepts_loss_kwargs = True
        with whole_by_module(self.model):
            FusedHead(
                self.model,
                return_stats=True,
                backward=args.backward,
                tol=args.tol,
                low_memory=args.low_memory,
            ).install()

    def _tokenized(
        self,
        rows: datasets.Dataset | None,
        name: str,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> datasets.Dataset | None:
        if rows is None or set(COLUMNS) <= set(rows.column_names):
            return rows
        rows, self.data_reports[name] = tokenize_examples(
            rows,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            num_proc=args.dataset_num_proc,
            source=name,
        )
        return rows

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS]

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Any]:
        """The micro-steps of one optimiser step; how many completion tokens they hold, on all ranks."""
        self._rows, self._losses = [], []
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [(batch["completion_labels"] != -100).sum() for batch in batches]
            total = torch.stack(counts).sum().to(device)
            self._step_tokens = items = int(self.accelerator.gather(total).sum())
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """−Σ log p of the batch's completion tokens; in training over those of the whole optimiser step."""
        total, outputs, kept = self._score(model, inputs)
        count = int(kept.sum())
        if not model.training:
            loss = total / count
            return (loss, outputs) if return_outputs else loss
        self._rows.append(inputs["rows"])
        self._losses.append(total.detach())
        self._tokens_trained += int(inputs["attention_mask"].sum())
        self._stop_before_backward(lambda: self._problem(None))
        self._window.add(_token_means(outputs, kept, count), count)
        # Gradients are averaged over the ranks, whose tokens are all counted.
        loss = total * (self.accelerator.num_processes / self._step_tokens)
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Any, Tensor]:
        """−Σ log p of the completion tokens, the model's output, and which tokens those are."""
        labels = inputs["completion_labels"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            use_cache=False,
        )
        return -outputs.log_probs.sum(), outputs, labels != -100

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Transformers' last call before the optimiser step: stop if a number is bad."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._stop_together(self._problem(grad_norm), taken=self.is_deepspeed_enabled)
        return grad_norm

    def _problem(self, grad_norm: Any) -> Problem | None:
        for k, (loss, rows) in enumerate(zip(self._losses, self._rows, strict=True), start=1):
            if not math.isfinite(loss.item()):
                return Problem(
                    f"the loss is {loss.item()} in micro-step {k} of {len(self._rows)}, "
                    f"data rows {listed_rows([rows])}",
                    distance=0,
                )
        return self._bad_norm({"the gradient": grad_norm}, self._rows)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of one evaluation batch; sums over all tokens are kept for :meth:`evaluation_loop`."""
        inputs = self._prepare_inputs(inputs)
        rows = self._own_rows(len(inputs["rows"]))
        with torch.no_grad(), self.compute_loss_context_manager():
            total, outputs, kept = self._score(model, inputs)
        own = kept.clone()
        own[rows:] = False
        count = int(own.sum())
        if count:
            loss = -outputs.log_probs[:rows].sum(dtype=torch.float64).item() / count
            self._eval_window.add({"loss": loss, **_token_means(outputs, own, count)}, count)
        return total / kept.sum(), None, None


def _token_means(outputs: Any, kept: Tensor, count: int) -> dict[str, float]:
    stats = outputs.token_stats
    return {
        "entropy": stats.entropy[kept].sum(dtype=torch.float64).item() / count,
        "mean_token_accuracy": stats.top1[kept].sum().item() / count,
    }


@watch_ranks()
def fine_tune(config: SFTConfig) -> SFTTrainer:
    """Run the job that ``config`` describes; ``output_dir`` afterwards holds what :func:`fastpo.trainer.train`
    leaves there.

    Returns:
        The trainer, after training.

    Raises:
        FileNotFoundError, ImportError, FloatingPointError, ValueError: as :func:`fastpo.trainer.train`.
    """
    check_sources(config)
    checked_name(config, "model_name_or_path")
    train_dataset = load_examples(config.dataset or "", split=config.dataset_split)
    eval_dataset = None
    if config.eval_dataset:
        eval_dataset = load_examples(config.eval_dataset, split=config.eval_dataset_split)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    trainer = SFTTrainer(
        model_to_train(config),
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )
    run_to_its_end(trainer)
    return trainer
