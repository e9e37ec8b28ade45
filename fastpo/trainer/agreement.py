"""What all processes of a run must have alike: settings, data, the checkpoint they resume, the loss's state.

Where they differ the run would hang, as one process has more batches than another, or train on as a mixture
that no configuration describes. The processes tell each other what they have, and all raise where it is not the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.plain_values import plain

from .run_config import own_fields

if TYPE_CHECKING:
    import datasets

    from .run_config import RunConfig

ROWS_AT_ONCE = 8192  # of a data set, when it is hashed
VALUE_LIMIT = 80  # characters of a value that a message shows

# Settings of fastpo's own that may differ: paths, which each machine may have elsewhere, and its own business.
_MAY_DIFFER = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "tokenizer_name_or_path",
    "chat_template",  # a file or its text; what it makes of the rows is compared
    "dataset",
    "eval_dataset",
    "dataset_num_proc",
    "ref_logps",
    "output",
    "plot_loss",
)
# Of transformers' settings those that decide which steps are taken and when the processes meet.
_SHARED = (
    "seed", "data_seed", "full_determinism", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm", "bf16", "fp16",
    "train_sampling_strategy", "dataloader_drop_last", "gradient_checkpointing", "neftune_noise_alpha",
    "use_liger_kernel", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy",
    "save_steps", "save_only_model", "logging_strategy", "logging_steps", "load_best_model_at_end",
    "metric_for_best_model", "greater_is_better",
)  # fmt: skip


def check_agreement(facts: Mapping[str, object]) -> None:
    """Compare named facts over all processes; every one must call.

    Raises:
        ValueError: on all of them, if a fact is not the same everywhere; names the facts, and who has what.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {name: repr(value) for name, value in facts.items()})
    found = []
    for name in dict.fromkeys(name for each in gathered for name in each):
        difference = _difference([each.get(name, "nothing") for each in gathered])
        if difference:
            found.append(f"{name}: {difference}")
    if found:
        raise ValueError(f"the processes of this run differ, expected the same: {'; '.join(found)}")


def _difference(values: list[str]) -> str:
    """Who has which of the values; empty if all are the same."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    if len(ranks) == 1:
        return ""
    return ", ".join(
        f"{value[:VALUE_LIMIT]} on rank{'s' if len(own) > 1 else ''} {' '.join(own)}"
        for value, own in ranks.items()
    )


def shared_settings(config: RunConfig) -> dict[str, object]:
    """The settings of a run that all its processes must share, by field."""
    own = [name for name in own_fields(type(config)) if name not in _MAY_DIFFER]
    names = [*own, *(name for name in _SHARED if hasattr(config, name))]
    return {name: plain(getattr(config, name)) for name in names}


def rows_digest(rows: datasets.Dataset) -> str:
    """Number of rows, and a hash of all their numbers and lists of numbers, in order."""
    digest = hashlib.sha256()
    view = rows.with_format("arrow")
    for start in range(0, len(rows), ROWS_AT_ONCE):  # a copy of a large set would not fit
        table = view[start : start + ROWS_AT_ONCE]
        for name in sorted(table.column_names):
            column = table[name]
            parts = [column]
            if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                parts = [pc.list_value_length(column), pc.list_flatten(column)]
            for part in parts:
                if pa.types.is_integer(part.type) or pa.types.is_floating(part.type):
                    numbers = np.ascontiguousarray(part.to_numpy())
                    digest.update(f"{name} {numbers.dtype} {len(numbers)}".encode())
                    digest.update(numbers.data)
    return f"{len(rows)} rows ({digest.hexdigest()[:12]})"


def state_digest(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each tensor; waits for the device."""
    return {
        f"state {name}": hashlib.sha256(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()[:12]
        for name, tensor in tensors.items()
    }
