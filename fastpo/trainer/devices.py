"""On how many processes, how sharded and in what batches a run trains, and which other may go on with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .sequence_parallel import sequence_size

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments

WHOLE, FSDP, DEEPSPEED = "whole", "fsdp", "deepspeed"
_HOW = {WHOLE: "without sharding", FSDP: "with FSDP", DEEPSPEED: "with DeepSpeed"}

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Devices:
    """What decides which rows an optimiser step sees, and which form a checkpoint has.

    Attributes:
        processes: that train together.
        sharding: ``"whole"`` (one process, DDP), ``"fsdp"`` or ``"deepspeed"``.
        micro_batch: rows of a micro-step over all processes, each once where processes share sequences; None
            where a budget of tokens cuts the batches.
        accumulation: micro-steps of an optimiser step.
        cut: what a budget of tokens makes of the rows; empty without one, or of a checkpoint from before it
            was recorded.
        readers: processes that train on rows of their own; 0: all.
    """

    processes: int
    sharding: str
    micro_batch: int | None
    accumulation: int
    cut: str = ""
    readers: int = 0

    @classmethod
    def of(cls, args: TrainingArguments, accelerator: Accelerator) -> Devices:
        """Those of a run."""
        processes = accelerator.num_processes
        sharding = WHOLE
        if getattr(accelerator.state, "fsdp_plugin", None) is not None:
            sharding = FSDP
        elif getattr(accelerator.state, "deepspeed_plugin", None) is not None:
            sharding = DEEPSPEED
        budget = getattr(args, "tokens_per_batch", None)
        readers = processes // sequence_size(args, accelerator)
        rows = None if budget is not None else args.train_batch_size * readers
        cut = ""
        if budget is not None:
            layouts = [name for name in ("padding_free", "prefix_sharing") if getattr(args, name)]
            cut = f"tokens_per_batch {budget}, {' and '.join(layouts) or 'padded'}, {readers} in parallel"
        return cls(processes, sharding, rows, args.gradient_accumulation_steps, cut, readers)

    def check_resumption(self, saved: dict[str, Any], source: str) -> None:
        """Raise ValueError unless a run on these devices can go on as if nothing had happened.

        Args:
            saved: the fields of the run that wrote a checkpoint; empty where it was written before they were
                recorded.
            source: the checkpoint, for messages.
        """
        if not saved:
            return
        before = Devices(**saved)
        was = f"{_counted(before.processes)} {_HOW[before.sharding]}"
        found = f"resume_from_checkpoint: {source} was saved by {was}"
        moved = self.processes != before.processes
        if self.sharding != before.sharding:
            raise ValueError(
                f"{found} and cannot be read {_HOW[self.sharding]}; resume it {_HOW[before.sharding]}, which "
                "one process that is started by accelerate launch can do too, or start from its weights with "
                "model_name_or_path"
            )
        if moved and self.sharding == DEEPSPEED:
            raise ValueError(
                f"{found}, which cuts the optimiser's state for that number; got {_counted(self.processes)}, "
                f"expected {before.processes} (or start from its weights with model_name_or_path)"
            )
        if moved and None in (self.micro_batch, before.micro_batch):
            raise ValueError(
                f"{found} with tokens_per_batch, whose batches are cut for that number; got "
                f"{_counted(self.processes)}, expected {before.processes}"
            )
        if self.cut != before.cut and self.cut and before.cut:
            raise ValueError(
                f"{found} with batches of {before.cut}; this run's are of {self.cut}, and would hold other "
                "rows; resume it with the same settings"
            )
        if (self.micro_batch, self.accumulation) != (before.micro_batch, before.accumulation):
            raise ValueError(
                f"{found} in micro-steps of {before.micro_batch} rows on all processes together, "
                f"{before.accumulation} to an optimiser step; this run has {self.micro_batch} and "
                f"{self.accumulation} on {_counted(self.processes)}, and would see other rows; "
                + self._advice(before)
            )
        if moved:
            logger.warning_once(
                f"{source} was saved by {was}, {_counted(self.processes)} go on with it: the same rows follow "
                "in the same order, but what dropout draws is not the same"
            )

    def _advice(self, before: Devices) -> str:
        readers = self.readers or self.processes
        if before.micro_batch is None or before.micro_batch % readers:
            return f"resume it on {_counted(before.processes)} with the same settings"
        return (
            f"set per_device_train_batch_size to {before.micro_batch // readers} and "
            f"gradient_accumulation_steps to {before.accumulation}"
        )


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
