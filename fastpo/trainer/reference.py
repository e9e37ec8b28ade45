"""Where the reference's sequence log-probs come from: a frozen model, or a cache that was computed once.

Cached files lie in ``$FASTPO_CACHE``, else ``$XDG_CACHE_HOME/fastpo``, else ``~/.cache/fastpo``. Their name is
a hash of all that the numbers depend on: the rows' token ids, the reference's weights and configuration, and
the precision they are computed in.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from fastpo.atomic_write import write_atomically
from fastpo.ops.sequence_logprobs import sequence_sums

from .loaders import deal_to_all
from .sharded import free_gathered, whole_tensors

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_LAYOUT = 1  # raise when the numbers or their layout change

logger = logging.get_logger(__name__)


def reference_logps(model: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
    """Sequence log-probs (2B,) float64, nats, under a model with a fused head; without gradient.

    ``inputs`` are keywords of the model's forward, the labels among them.
    """
    with torch.no_grad():
        return sequence_sums(model(**inputs).log_probs, inputs["labels"])[0]


@contextmanager
def base_model(model: nn.Module) -> Iterator[None]:
    """A PEFT model without its adapter and without dropout while inside."""
    # PEFT freezes the adapter's parameters for this and unfreezes them at the end. Under FSDP2 those would be
    # two sets of parameters, spread ones and gathered ones, if a unit were still gathered at the end.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with model.disable_adapter():  # type: ignore[operator]
            try:
                yield
            finally:
                free_gathered(model)
    finally:
        for module in training:
            module.training = True


def cache_directory() -> Path:
    """Where precomputed log-probs are kept."""
    if "FASTPO_CACHE" in os.environ:
        return Path(os.environ["FASTPO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastpo"


def model_hash(model: PreTrainedModel) -> str:
    """SHA-256 of a model's configuration and weights; of a PEFT model, that of its base by itself.

    Of a model whose weights are sharded over processes all of them must call; they get what one process gets
    that holds all weights.
    """
    digest = hashlib.sha256()
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "use_cache", "architectures"):
        config.pop(name, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    adapters = hasattr(model, "disable_adapter")
    trainable = (
        {name for name, p in model.named_parameters() if p.requires_grad} if adapters else ()
    )
    state = model.state_dict(keep_vars=True)
    kept = {name: tensor for name, tensor in state.items() if name not in trainable}
    if adapters:
        kept = {_name_in_base(n): tensor for n, tensor in kept.items()}
    for name, tensor in whole_tensors(kept):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name_in_base(name: str) -> str:
    """The name that a weight under PEFT's wrappers has in the model by itself."""
    for wrapper in ("base_layer", "original_module"):
        name = name.replace(f".{wrapper}.", ".")
    return name.removeprefix("base_model.model.")


def rows_hash(dataset: datasets.Dataset) -> str:
    """SHA-256 of the token ids of every row, in order."""
    digest = hashlib.sha256()
    table = dataset.with_format("arrow")[:]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        for part in (pc.list_value_length(table[name]), pc.list_flatten(table[name])):
            numbers = np.ascontiguousarray(part.to_numpy(), dtype="<i8")
            digest.update(f"{name} {len(numbers)}".encode())
            digest.update(numbers.tobytes())
    return digest.hexdigest()


def with_reference_logps(
    dataset: datasets.Dataset,
    logps: Callable[[Mapping[str, Tensor]], Tensor],
    *,
    reference_hash: str,
    precision: str,
    collator: Callable[..., Any],
    batch_size: int,
    accelerator: Accelerator,
    progress: bool,
) -> datasets.Dataset:
    """The data set with the columns :data:`COLUMNS`, from the cache or computed by all processes together.

    Args:
        dataset: tokenised rows.
        logps: a collated batch of B pairs → (2B,) float64, chosen first.
        reference_hash: :func:`model_hash` of what ``logps`` runs.
        precision: of the computation: ``no``, ``bf16`` or ``fp16``.
        collator: rows → batch.
        batch_size: pairs per process at once.
        accelerator: whose processes share the work.
        progress: show a bar.

    Raises:
        ValueError: a log-prob that is not finite (its rows are named).
    """
    key = hashlib.sha256(
        f"{_LAYOUT} {reference_hash} {precision} {rows_hash(dataset)}".encode()
    ).hexdigest()
    path = cache_directory() / f"ref-logps-{key}.safetensors"
    # The main process decides for all: the others may see another file system.
    found = [_read(path, len(dataset)) if accelerator.is_main_process else None]
    values = broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]
    if values is None:
        values = compute_logps(dataset, logps, collator, batch_size, accelerator, progress)
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(values.tobytes()).hexdigest()
            write_atomically(path, save({"logps": values}, metadata={"sha256": digest}))
            logger.info(f"reference log-probs of {len(dataset)} pairs written to {path}")
    else:
        logger.info(f"reference log-probs of {len(dataset)} pairs read from {path}")
    for name, column in zip(COLUMNS, values, strict=True):
        dataset = dataset.add_column(name, column)
    return dataset


def _read(path: Path, rows: int) -> np.ndarray | None:
    """(2, rows) float64 of a cached file; None if there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            values: np.ndarray = file.get_tensor("logps")
            intact = (file.metadata() or {}).get("sha256") == hashlib.sha256(
                values.tobytes()
            ).hexdigest()
    except (SafetensorError, OSError, ValueError):
        intact = False
    if not intact or values.shape != (2, rows):
        logger.warning(f"{path} is damaged; its reference log-probs are computed again")
        return None
    return values


def compute_logps(
    dataset: datasets.Dataset,
    logps: Callable[[Mapping[str, Tensor]], Tensor],
    collator: Callable[..., Any],
    batch_size: int,
    accelerator: Accelerator,
    progress: bool,
) -> np.ndarray:
    """(2, rows) float64, nats: chosen, rejected; every process gets all, having computed its share.

    Arguments and errors are those of :func:`with_reference_logps`.
    """
    loader = accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=collator))
    loader = deal_to_all(loader, accelerator)
    parts = []
    for batch in tqdm(loader, desc="Reference log-probs", disable=not progress):
        pairs = logps(batch).view(2, -1).T.contiguous()  # (B, 2): gathered and trimmed by pairs
        parts.append(accelerator.gather_for_metrics(pairs).cpu())
    values = torch.cat(parts).T.contiguous().numpy()
    bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
    if len(bad):
        rows = [dataset[int(k)]["row"] for k in bad[:5]]
        raise ValueError(
            f"the reference's log-probs of {len(bad)} of {len(dataset)} pairs are not finite, "
            f"the first in data rows {rows}"
        )
    return values
