"""Loaders: which rank gets which batches, and training with a sampler of whole batches and its epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from fastpo.data import TokenBudgetSampler

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerState, TrainingArguments


class EpochOfSampler(TrainerCallback):
    """Tells a batch sampler its epoch; accelerate does not reach it where a resumed epoch skips batches."""

    sampler: TokenBudgetSampler | None = None

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            # A resumed epoch begins at a fraction.
            self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


def prepared_loader(
    rows: Any,
    sampler: TokenBudgetSampler,
    collator: Callable[..., Any],
    args: TrainingArguments,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """A loader whose batches are dealt out to the ranks in turn."""
    loader: DataLoader[Any] = DataLoader(
        rows,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    # The sampler gives every rank equally many batches; accelerate evens out only batches of one size.
    config = accelerator.dataloader_config
    even, config.even_batches = config.even_batches, False
    try:
        return accelerator.prepare(loader)  # type: ignore[no-any-return]
    finally:
        config.even_batches = even


def deal(loader: Any, ranks: int, rank: int) -> Any:
    """Let a loader that accelerate prepared give this process the batches of ``rank`` among ``ranks``.

    Raises:
        ValueError: a loader whose batches accelerate does not deal out.
    """
    shards = loader.batch_sampler
    if not isinstance(shards, BatchSamplerShard):
        raise ValueError(
            f"accelerator_config: batches of a {type(loader).__name__} come from a {type(shards).__name__}, "
            "which cannot deal them out to processes that share sequences; expected dispatch_batches: false "
            "and train_sampling_strategy random or sequential"
        )
    shards.num_processes, shards.process_index = ranks, rank
    if ranks == 1:  # as in a single process, nothing is filled up
        shards.even_batches = False
    return loader


def deal_to_all(loader: Any, accelerator: Accelerator) -> Any:
    """Let every process have batches of its own, also where accelerate's ``cp_size`` has some share them."""
    parallelism = accelerator.parallelism_config
    if parallelism is None or not parallelism.cp_enabled:
        return loader
    return deal(loader, accelerator.num_processes, accelerator.process_index)
