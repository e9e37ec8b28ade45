"""Runs of two ranks that fail, for tests/trainer/test_failures.py: ``failing_ranks.py FOLDER MODEL``.

FOLDER has ``train.jsonl``, its copy and ``other.jsonl``. Each scenario is ``fastpo train`` with something
planted on rank 1: it dies in one place, or has something else than rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forked import run_scenarios

from fastpo import rank_watch
from fastpo.cli import main
from fastpo.trainer import PreferenceTrainer, launch, reference, resumable

FOLDER = Path(sys.argv[1])
MODEL = sys.argv[2]
PATIENCE = 60.0
GRACE = 5.0  # shorter than by default, and long enough to see whether gloo or the watch was first

Plant = Callable[[], list[str]]  # done on rank 1; further arguments of fastpo


def run(plant: Plant, *options: str) -> Callable[[int], None]:
    def scenario(rank: int) -> None:
        torch.set_num_threads(1)
        rank_watch.GRACE = GRACE
        os.environ["MASTER_PORT"] = "0"  # not used: the process group meets at a file
        meet_at_a_file()
        words = [
            "train",
            *(
                "--model_name_or_path",
                MODEL,
                "--dataset",
                str(FOLDER / "train.jsonl"),
            ),
            *("--output_dir", f"{os.environ['SCENARIO_STORE'].removeprefix('file://')}.run"),
            *("--use_cpu", "true", "--ddp_backend", "gloo", "--disable_tqdm", "true"),
            *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2"),
            *("--max_steps", "2", "--save_strategy", "no", "--learning_rate", "1e-3"),
            *options,
            *(plant() if rank == 1 else []),
        ]
        sys.exit(main(words))

    return scenario


def meet_at_a_file() -> None:
    """In the place of a port, which another process may take meanwhile."""
    original = torch.distributed.init_process_group

    def init(backend: str | None = None, **options: Any) -> None:
        original(
            backend,
            init_method=os.environ["SCENARIO_STORE"],
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=options.get("timeout"),
        )

    torch.distributed.init_process_group = init


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exited() -> None:
    os._exit(3)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def bad_row() -> None:
    raise KeyError("a data row without an answer")


def fail_in(owner: Any, name: str, fail: Callable[[], None], call: int = 1) -> Plant:
    """The given call of a function fails."""

    def plant() -> list[str]:
        original, calls = getattr(owner, name), [0]

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                fail()
            return original(*args, **kwargs)

        setattr(owner, name, failing)
        return []

    return plant


def other_checkpoint() -> list[str]:
    resumable.find_resume_point = lambda *_: FOLDER / "checkpoint-2"
    PreferenceTrainer._restore = lambda *_: None  # type: ignore[method-assign]
    return []


def other_state() -> list[str]:
    original = PreferenceTrainer._check_agreement

    def changed(trainer: PreferenceTrainer, *args: Any) -> None:
        trainer.loss_module.margin.queue[3] = 0.5
        original(trainer, *args)

    PreferenceTrainer._check_agreement = changed  # type: ignore[method-assign]
    return []


GAMMA = ("--loss_type", "simpo", "--margin", "gamma", "--gamma_queue_size", "16")
EVALUATION = (
    "--eval_dataset",
    str(FOLDER / "other.jsonl"),
    "--eval_strategy",
    "steps",
    "--eval_steps",
    "1",
)
SCENARIOS = {
    "step": run(fail_in(PreferenceTrainer, "compute_loss", out_of_memory, 2)),
    "reference": run(
        fail_in(reference, "reference_logps", killed, 2), "--precompute_ref_log_probs", "true"
    ),
    "evaluation": run(fail_in(PreferenceTrainer, "prediction_step", exited, 2), *EVALUATION),
    "save": run(
        fail_in(PreferenceTrainer, "_save_rng_state", killed), "--save_strategy", "steps", "--save_steps", "1"
    ),
    "data": run(fail_in(launch, "load_preferences", bad_row)),
    "settings": run(
        lambda: ["--beta", "0.3", "--gradient_accumulation_steps", "2"], "--beta", "0.2"
    ),
    "rows": run(
        lambda: ["--dataset", str(FOLDER / "other.jsonl")], "--precompute_ref_log_probs", "true"
    ),
    "checkpoint": run(other_checkpoint),
    "state": run(other_state, *GAMMA),
    "paths": run(
        lambda: ["--dataset", str(FOLDER / "copy.jsonl"), "--dataset_num_proc", "1"], "--max_steps", "1"
    ),
}  # fmt: skip


if __name__ == "__main__":
    run_scenarios(
        SCENARIOS,
        FOLDER,
        dict.fromkeys(SCENARIOS, 2),
        patience=lambda name: PATIENCE,
        may_stay={},
        at_once=2,
    )
