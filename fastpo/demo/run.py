"""The demo from start to end: fine-tune, make pairs, train four ways from the same start, score each.

Training takes the path of any user's run: a checkpoint directory and a JSONL file in, a checkpoint out.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.demo.model import build_model, build_tokenizer
from fastpo.demo.pairs import FLIPPED_SHARE, build_pairs, write_pairs
from fastpo.demo.plot import plot_accuracies
from fastpo.demo.sft import answer, exact_match, fine_tune
from fastpo.demo.task import Problem, annotate, draw_problems

SFT_EXAMPLES, PAIRS, TEST_PROBLEMS = 9600, 1024, 1000
PROBLEMS_PER_PAIR = 2  # the model answers some problems rightly, and those make no pair

TRAINING: dict[str, Any] = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 32,
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "plot_loss": True,
}
# Chosen on seeds 101 to 104, see docs/demo.md.
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"loss_type": "dpo", "beta": 0.3},
    "γ-DPO": {
        "loss_type": "dpo",
        "beta": 0.3,
        "margin": "gamma",
        "simpo_gamma": 2.0,
        "gamma_tau": 3.0,
    },
    "SimPO": {"loss_type": "simpo", "beta": 10.0, "gamma_beta_ratio": 0.3},
    "γ-SimPO": {
        "loss_type": "simpo",
        "beta": 10.0,
        "gamma_beta_ratio": 0.3,
        "margin": "gamma",
        "gamma_tau": 1.0,
    },
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and lose much where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class SeedResult:
    """Exact match of one seed's start and of every method trained from it, shares in [0, 1]."""

    seed: int
    pairs: int
    before: float
    after: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(output_dir: Path, *, seeds: list[int], scale: float = 1.0) -> list[SeedResult]:
    """Run every seed, print the accuracies, write `results.json` and `accuracy.png` into `output_dir`.

    Args:
        output_dir: a directory that does not exist or is empty.
        seeds: each draws its own model, data and flips.
        scale: multiplies the numbers of examples, pairs and test problems.

    Raises:
        ValueError: `output_dir` holds files, there is no seed or one twice, or `scale` is not positive.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: got {seeds}, expected at least one, each once")
    claim(output_dir)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"fastpo demo on {device}: sort five digits; everything is kept in {output_dir}", flush=True
    )
    start = time.monotonic()
    results = [run_seed(output_dir / f"seed-{seed}", seed, scale) for seed in seeds]
    path = output_dir / "results.json"
    path.write_text(
        json.dumps([asdict(r) for r in results], indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    print(f"\n{table(results)}\n")
    print(f"Plot: {plot_accuracies(results, output_dir / 'accuracy.png')}")
    print(f"Numbers: {path}\n{time.monotonic() - start:.0f} s in all")
    return results


def run_seed(directory: Path, seed: int, scale: float = 1.0) -> SeedResult:
    """Prepare one start in `directory` and train every method of `METHODS` from it."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "prepare"):
        problems, pairs = prepare(directory, seed, scale)
    before = score(directory / "model", problems)
    print(
        f"\nseed {seed}: fine-tuned to {before:.1%} exact match ({seconds['prepare']:.0f} s); "
        f"{pairs} pairs, {FLIPPED_SHARE:.0%} of them flipped",
        flush=True,
    )
    after: dict[str, float] = {}
    for method in METHODS:
        run_dir = directory / method.replace("γ", "gamma")
        with _timed(seconds, method):
            train_method(directory, run_dir, METHODS[method], seed)
        after[method] = score(run_dir, problems)
        line = f"  {method:<8} {before:.1%} → {after[method]:.1%}   ({seconds[method]:.0f} s)"
        print(line, flush=True)
    return SeedResult(seed, pairs, before, after, seconds)


@one_thread()
def prepare(directory: Path, seed: int, scale: float = 1.0) -> tuple[list[Problem], int]:
    """Write a fine-tuned checkpoint `model/` and preference pairs `train.jsonl` into `directory`.

    Returns:
        The held-out problems, and the number of pairs.

    Raises:
        ValueError: `directory` holds files, or `scale` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a number > 0")
    claim(directory)
    sizes = [SFT_EXAMPLES, PROBLEMS_PER_PAIR * PAIRS, TEST_PROBLEMS]
    sft, sources, test = draw_problems(*(max(8, round(scale * n)) for n in sizes), seed=seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed).to(_device())
    fine_tune(model, tokenizer, annotate(sft, seed=seed))
    answers = answer(model, tokenizer, sources, sample_seed=seed)
    rows = build_pairs(sources, answers, count=len(sources) // PROBLEMS_PER_PAIR, seed=seed)
    with log_to(directory / "prepare.log"):
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
    write_pairs(directory / "train.jsonl", rows)
    return test, len(rows)


@one_thread()
def train_method(start: Path, run_dir: Path, settings: dict[str, Any], seed: int) -> None:
    """Train the checkpoint in `start` on its pairs, with `settings` over `TRAINING`; prints to `train.log`."""
    from fastpo.trainer import PreferenceConfig, train

    run_dir.mkdir()
    with log_to(run_dir / "train.log"):
        config = PreferenceConfig(
            output_dir=str(run_dir),
            model_name_or_path=str(start / "model"),
            dataset=str(start / "train.jsonl"),
            seed=seed,
            **(TRAINING | settings),
        )
        train(config)


@one_thread()
def score(checkpoint: Path, problems: list[Problem]) -> float:
    """Exact match of a checkpoint directory on `problems`."""
    with log_to(Path(os.devnull)):
        model = AutoModelForCausalLM.from_pretrained(checkpoint).to(_device()).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return exact_match(model, tokenizer, problems)


def table(results: list[SeedResult]) -> str:
    """Exact match in percent, a line per seed and one of means."""
    head = ["exact match, %", "before", *METHODS]
    rows = {f"seed {r.seed}": [r.before, *r.after.values()] for r in results}
    rows["mean"] = [sum(column) / len(column) for column in zip(*rows.values(), strict=True)]
    lines = ["".join(f"{h:>10}" if i else f"{h:<16}" for i, h in enumerate(head))]
    for name, shares in rows.items():
        lines.append(f"{name:<16}" + "".join(f"{100 * share:>10.1f}" for share in shares))
    return "\n".join(lines)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def claim(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output directory: {directory} is not empty; name a new one")
    directory.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Progress bars and log lines go to a file, so that the demo's own lines can be read."""
    with (
        path.open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield
