"""``train(config)``: a whole job, from a checkpoint directory and a preference file to a trained checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import set_seed
from transformers.utils import is_liger_kernel_available

from fastpo.atomic_write import write_atomically
from fastpo.data import load_preferences
from fastpo.rank_watch import watch_ranks

from .checkpoint import find_resume_point
from .config import PreferenceConfig
from .model import add_adapter, checked_name, is_quantized, load_model, load_tokenizer
from .reference_file import read_reference_file
from .run_config import save_config
from .trainer import PreferenceTrainer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel

    from .run_config import RunConfig
    from .sft import SFTTrainer

CONFIG_FILE = "fastpo_config.yaml"
DATA_REPORT_FILE = "data_report.json"


@watch_ranks()
def train(config: PreferenceConfig) -> PreferenceTrainer:
    """Run the job that ``config`` describes.

    What ``output_dir`` holds afterwards: the model and the tokenizer, as ``from_pretrained`` loads them (under
    ``peft`` the adapter); ``fastpo_config.yaml``, the resolved settings without credentials;
    ``data_report.json``, what became of the data sets' rows; ``train_results.json``, ``eval_results.json`` and
    ``all_results.json``; ``trainer_state.json`` with everything that was logged; with ``plot_loss``
    ``training.png``; and the checkpoints that ``save_strategy`` asks for.

    Returns:
        The trainer, after training.

    Raises:
        FileNotFoundError: a model or data path that does not exist.
        ImportError: a package that the settings need is not installed.
        FloatingPointError: a loss that is not finite (see :meth:`PreferenceTrainer.train`).
        RankFailure: another process of the run failed (see :func:`fastpo.trainer.watch_ranks`).
        ValueError: settings, a model directory, a data set or an ``output_dir`` that cannot be used.
    """
    # What can go wrong is found before a large model is loaded.
    check_sources(config)
    needs_reference = config.needs_reference
    for field in ("model_name_or_path", "ref_model_name_or_path"):
        if field == "model_name_or_path" or (getattr(config, field) and needs_reference):
            checked_name(config, field)
    if config.ref_logps and needs_reference:
        read_reference_file(config.ref_logps)
    train_dataset = load_preferences(config.dataset or "", split=config.dataset_split)
    eval_dataset: datasets.Dataset | None = None
    if config.eval_dataset:
        eval_dataset = load_preferences(config.eval_dataset, split=config.eval_dataset_split)

    set_seed(config.seed)
    tokenizer = load_tokenizer(config)
    model = model_to_train(config)
    has_reference = config.ref_model_name_or_path and needs_reference
    trainer = PreferenceTrainer(
        model,
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        # Named nowhere here: a trainer that has its log-probs lets go of it.
        ref_model=load_model(config, "ref_model_name_or_path") if has_reference else None,
    )
    run_to_its_end(trainer)
    return trainer


def check_sources(config: RunConfig) -> None:
    """Raise where there is no data set, Liger's kernels are not to be had, or ``output_dir`` holds a run."""
    if not config.dataset:
        raise ValueError(f"dataset: got {config.dataset!r}, expected a file, directory or Hub name")
    check_liger(config)
    find_resume_point(Path(config.output_dir), config.resume_from_checkpoint)


def check_liger(config: RunConfig) -> None:
    """Raise where Liger's kernels are asked for and cannot be had."""
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel: needs the package liger-kernel")
    if config.use_liger_kernel and config.device.type == "cpu":
        raise ValueError(
            "use_liger_kernel: got True, expected False on a CPU: its kernels need a GPU"
        )


def model_to_train(config: RunConfig) -> PreTrainedModel:
    """The model that a configuration names, in an adapter where it asks for one.

    Raises:
        ValueError: what :func:`load_model` and :func:`add_adapter` raise, or a quantised model without adapter.
    """
    model = load_model(config)
    if not isinstance(config.peft, Mapping):
        if is_quantized(model):
            raise ValueError(
                f"peft: got None, expected a mapping ({{}} for its defaults): the weights of "
                f"{config.model_name_or_path} are quantised and can only be trained by an adapter"
            )
        return model
    adapted = add_adapter(model, config.peft)
    if config.checkpointing_options.get("use_reentrant"):
        # Checkpoints of this kind pass no gradient on if their input has none, as a frozen embedding's has.
        adapted.enable_input_require_grads()
    return adapted


def run_to_its_end(trainer: PreferenceTrainer | SFTTrainer) -> None:
    """Train, evaluate, and write model, metrics, settings and the account of the rows."""
    if trainer.is_world_process_zero():
        _write_account(trainer, Path(trainer.args.output_dir))
    result = trainer.train()
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    if trainer.eval_dataset is not None:
        trainer.save_metrics("eval", _last_evaluation(trainer) or trainer.evaluate())
    trainer.save_state()


def _last_evaluation(trainer: PreferenceTrainer | SFTTrainer) -> dict[str, Any]:
    """Metrics of the model as it is, if training ended with an evaluation; else empty."""
    if trainer.args.load_best_model_at_end:  # the model may be an earlier one
        return {}
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluations or evaluations[-1]["step"] != trainer.state.global_step:
        return {}
    return {name: value for name, value in evaluations[-1].items() if name != "step"}


def _write_account(trainer: PreferenceTrainer | SFTTrainer, output_dir: Path) -> None:
    """The resolved settings and what became of the rows, also printed."""
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(trainer.args, output_dir / CONFIG_FILE)
    reports = {name: report.to_dict() for name, report in trainer.data_reports.items()}
    write_atomically(
        output_dir / DATA_REPORT_FILE, json.dumps(reports, indent=1, ensure_ascii=False).encode()
    )
    for report in trainer.data_reports.values():
        print(report)
