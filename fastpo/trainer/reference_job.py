"""``write_reference_logps(config)``: the reference's log-probs of a run's pairs, as a file that runs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from accelerate import Accelerator
from torch import Tensor
from transformers.integrations.liger import apply_liger_kernel

from fastpo.data import load_preferences, tokenize_preferences
from fastpo.head import FusedHead
from fastpo.head.causal_lm import find_causal_lm
from fastpo.rank_watch import watch_ranks

from .config import PreferenceConfig
from .launch import check_liger
from .layout import Layout
from .model import checked_name, load_model, load_tokenizer
from .reference import compute_logps, model_hash, reference_logps
from .reference_file import Origin, answer_tokens, row_hashes, write_reference_file

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@dataclass
class RefLogpsConfig(PreferenceConfig):
    """Settings of ``fastpo ref-logps``: those of the training run, and where the file goes.

    Of the run's settings it takes the models, the tokenizer and its template, the data sets, the lengths, the
    precision, the layout and ``per_device_eval_batch_size``, pairs per device at once; the others are checked
    and have no effect.
    """

    output: str | None = field(
        default=None, metadata={"help": "the Parquet file to write; unset: the run's ref_logps"}
    )


@watch_ranks()
def write_reference_logps(config: RefLogpsConfig) -> Path:
    """Compute the reference's log-probs of all pairs of ``dataset`` and ``eval_dataset``, and write them.

    The reference is ``ref_model_name_or_path``, else ``model_name_or_path``, which under ``peft`` is the base
    of the adapter. Pairs of the same tokens are computed once; all processes of an ``accelerate launch`` share
    the work. What the file holds: :mod:`fastpo.trainer.reference_file`.

    Returns:
        The file, which the main process has written.

    Raises:
        FileNotFoundError: a model or data path that does not exist.
        ImportError: a package that the settings need is not installed.
        ValueError: settings, a model directory or a data set that cannot be used; a log-prob that is not
            finite (its rows are named).
    """
    output = config.output or config.ref_logps
    if not output:
        raise ValueError(f"output: got {output!r}, expected the Parquet file to write")
    path = Path(output).expanduser()
    if path.is_dir():
        raise ValueError(f"output: {path} is a directory, expected a file")
    if not config.dataset:
        raise ValueError(f"dataset: got {config.dataset!r}, expected a file, directory or Hub name")
    check_liger(config)
    name = "ref_model_name_or_path" if config.ref_model_name_or_path else "model_name_or_path"
    checked_name(config, name)

    tokenizer = load_tokenizer(config)
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else None  # None: the launcher's
    device = config.device  # sets up the processes
    accelerator = Accelerator(mixed_precision=precision, cpu=config.use_cpu)
    pairs = _distinct_pairs(config, tokenizer, report=accelerator.is_main_process)

    model = load_model(config, name)
    find_causal_lm(model)
    origin = Origin.of(
        config,
        tokenizer,
        model_hash=model_hash(model),
        precision=accelerator.mixed_precision,
    )
    model.to(device).eval().requires_grad_(False)
    layout = Layout(config, tokenizer.pad_token_id, model)
    FusedHead(model).install()
    if config.use_liger_kernel:
        apply_liger_kernel(model, config.liger_kernel_config)

    def logps(batch: Mapping[str, Tensor]) -> Tensor:
        with accelerator.autocast():
            return reference_logps(model, layout.inputs(model, batch))

    parts = [
        compute_logps(
            rows,
            logps,
            layout.collator,
            config.per_device_eval_batch_size,
            accelerator,
            not config.disable_tqdm and accelerator.is_main_process,
        )
        for rows, _, _ in pairs
    ]
    if accelerator.is_main_process:
        write_reference_file(
            path,
            np.concatenate([hashes for _, hashes, _ in pairs]),
            np.concatenate(parts, axis=1),
            np.concatenate([tokens for _, _, tokens in pairs], axis=1),
            origin,
        )
        count = sum(len(hashes) for _, hashes, _ in pairs)
        print(f"{path}: reference log-probs of {count} distinct pairs")
    accelerator.wait_for_everyone()
    return path


def _distinct_pairs(
    config: RefLogpsConfig, tokenizer: PreTrainedTokenizerBase, *, report: bool
) -> list[tuple[datasets.Dataset, np.ndarray, np.ndarray]]:
    """Tokenised rows, their keys and answers' tokens (2, rows), of each data set: longest first, none twice."""
    sources = [("train", config.dataset, config.dataset_split)]
    if config.eval_dataset:
        sources.append(("eval", config.eval_dataset, config.eval_dataset_split))
    found: list[tuple[datasets.Dataset, np.ndarray, np.ndarray]] = []
    for name, source, split in sources:
        rows, account = tokenize_preferences(
            load_preferences(source or "", split=split),  # let go of here: the text is held once
            tokenizer,
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            num_proc=config.dataset_num_proc,
            source=name,
        )
        if report:
            print(account)
        hashes = row_hashes(rows)
        _, first = np.unique(hashes, return_index=True)
        for _, before, _ in found:
            first = first[~np.isin(hashes[first], before)]
        if len(first):
            # Of like lengths together there is little padding; if memory is short the first batch shows it.
            prompts = pc.list_value_length(rows.with_format("arrow")[:]["prompt_ids"]).to_numpy()
            tokens = answer_tokens(rows)
            lengths = prompts + tokens.max(axis=0)
            first = first[np.argsort(-lengths[first], kind="stable")]
            found.append((rows.select(first), hashes[first], tokens[:, first]))
    return found
