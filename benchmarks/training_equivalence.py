"""Whether training with the certified backward ends where training with the exact one does.

    python -m fastpo.benchmarks.training_equivalence           # → results/training_equivalence.json
    python -m fastpo.benchmarks.training_equivalence --report  # → docs: the plot, the tables on the page

Each seed makes a language, a model that is trained on it, and preference pairs of the model's own texts. From
that start γ-DPO trains on these pairs with the exact and with the certified backward, in the same order; with a
coarse tolerance; and with the exact backward in another order, which says how far two runs of one method lie
apart anyway.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import fastpo
from fastpo.demo.model import build_model, build_tokenizer
from fastpo.demo.run import METHODS, TRAINING
from fastpo.trainer import PreferenceConfig, PreferenceTrainer

from .study_page import fill, save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/training_equivalence.json"
PAGE, PLOT = ROOT / "docs/training-equivalence.md", ROOT / "docs/training_equivalence.png"

RUNS: dict[str, dict[str, Any]] = {
    "exact": {"backward": "exact"},
    "certified": {"backward": "certified", "tol": 2**-10},
    "coarse": {"backward": "certified", "tol": 2**-4},
    "another order": {"backward": "exact"},
}
LAST_STEPS = 30  # whose mean is the end of a curve
SAMPLED_AT_ONCE = 256  # texts
SMOOTHED = 15  # steps, in the plot


@dataclass(frozen=True)
class Sizes:
    """How large everything is, and the settings that go with it; the defaults are the study's."""

    vocab: int = 16384  # words, each one token
    hidden: int = 64
    layers: int = 2
    pretraining_steps: int = 300
    pretraining_texts: int = 48  # per step
    pretraining_rate: float = 1e-2
    prompt: int = 8  # words
    answer: int = 24
    pairs: int = 2400
    held_out: int = 480
    flipped: float = 0.2  # share of the training pairs whose preference is wrong
    batch: int = 16  # pairs
    learning_rate: float = 3e-4


class Language:
    """A Markov chain over words: Zipf's law among the words, and for each word a few likely successors.

    How steeply the probability of the successors falls differs between words, so that peaked and flat
    predictions stand side by side, as in a real model's text.
    """

    SUCCESSORS = 64

    def __init__(self, vocab: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.popularity = (torch.arange(vocab) + 10.0) ** -1.6
        rank = torch.arange(self.SUCCESSORS) + 1.0
        self.probabilities = rank ** -(1.6 + 3 * torch.rand(vocab, 1, generator=generator))
        draws = vocab * self.SUCCESSORS
        self.successors = torch.multinomial(
            self.popularity, draws, replacement=True, generator=generator
        ).view(vocab, self.SUCCESSORS)

    def texts(self, count: int, length: int) -> Tensor:
        """(count, length) int64 words."""
        word = torch.multinomial(self.popularity, count, replacement=True, generator=self.generator)
        columns = [word]
        for _ in range(length - 1):
            choice = torch.multinomial(self.probabilities[word], 1, generator=self.generator)
            word = self.successors[word].gather(1, choice).squeeze(1)
            columns.append(word)
        return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class Start:
    """What all runs of a seed share."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    train: datasets.Dataset
    held_out: datasets.Dataset


def prepare(seed: int, sizes: Sizes) -> Start:
    """A language, a model of it, and pairs of the model's answers."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    language = Language(sizes.vocab, generator)
    # The demo's tokenizer has one token per character; here it only says what pads and what ends.
    tokenizer = build_tokenizer("".join(chr(0x4E00 + i) for i in range(sizes.vocab)))
    model = build_model(tokenizer, hidden_size=sizes.hidden, layers=sizes.layers, seed=seed)
    first = len(tokenizer) - sizes.vocab  # id of the first word
    _pretrain(model, language, first, sizes)
    liked = torch.rand(len(tokenizer), generator=generator) < 0.5
    train, held_out = (
        _pairs(model, language, first, liked, sizes, count)
        for count in (sizes.pairs, sizes.held_out)
    )
    for k in torch.randperm(len(train), generator=generator)[: round(sizes.flipped * len(train))]:
        row = train[k]
        row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]
    return Start(
        model, tokenizer, datasets.Dataset.from_list(train), datasets.Dataset.from_list(held_out)
    )


def _pretrain(model: LlamaForCausalLM, language: Language, first: int, sizes: Sizes) -> None:
    """AdamW on fresh texts; the rate rises over 20 steps and falls to 0 over the last 40 %."""
    steps = sizes.pretraining_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.pretraining_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1, (steps - step) / (0.4 * steps))
    )
    for _ in range(steps):
        ids = first + language.texts(sizes.pretraining_texts, sizes.prompt + sizes.answer)
        labels = fastpo.shift_labels(ids, torch.ones_like(ids))
        with fastpo.fused_head(model):
            logps = model(ids, labels=labels, use_cache=False).log_probs
        loss = -logps.sum() / (labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _pairs(
    model: LlamaForCausalLM,
    language: Language,
    first: int,
    liked: Tensor,  # (V,) bool
    sizes: Sizes,
    count: int,
) -> list[dict[str, Any]]:
    """Two sampled answers to each prompt, chosen the one with more liked words; ties make no pair."""
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompts = first + language.texts(SAMPLED_AT_ONCE, sizes.prompt)
        answers = [
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                min_new_tokens=sizes.answer,
                max_new_tokens=sizes.answer,
            )[:, sizes.prompt :]
            for _ in range(2)
        ]
        scores = [liked[a].sum(dim=1) for a in answers]
        for k in (scores[0] != scores[1]).nonzero().flatten().tolist():
            better = int(scores[1][k] > scores[0][k])
            rows.append(
                {
                    "prompt_ids": prompts[k].tolist(),
                    "chosen_ids": answers[better][k].tolist(),
                    "rejected_ids": answers[1 - better][k].tolist(),
                    "row": len(rows),
                }
            )
    return rows[:count]


def settings(sizes: Sizes, steps: int) -> dict[str, Any]:
    """Of the trainer, for all runs: the demo's γ-DPO but for the sizes and the rate."""
    return {
        **TRAINING,
        **METHODS["γ-DPO"],
        "max_steps": steps,
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": 4 * sizes.batch,
        "learning_rate": sizes.learning_rate,
        "plot_loss": False,
        "disable_tqdm": True,
    }


def train(start: Start, sizes: Sizes, name: str, steps: int, seed: int) -> dict[str, Any]:
    """The run ``name`` of ``RUNS`` from ``start``: its curves, and how it ends."""
    model = copy.deepcopy(start.model)
    with tempfile.TemporaryDirectory() as directory:
        config = PreferenceConfig(
            output_dir=directory,
            seed=seed + 1000 if name == "another order" else seed,
            **settings(sizes, steps),
            **RUNS[name],
        )
        trainer = PreferenceTrainer(
            model,
            config,
            train_dataset=start.train,
            eval_dataset=start.held_out,
            processing_class=start.tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        decided: dict[str, list[float]] = {
            key: [] for key in ("active_fraction", "dense_share", "dropped_mass_max")
        }

        def record(model: Any, _: Any, inputs: dict[str, Any], output: Any) -> None:
            if model.training:
                stats = output.token_stats
                decided["active_fraction"].append(float(stats.active_fraction))
                labelled = int((inputs["labels"] != -100).sum())
                decided["dense_share"].append(int(stats.dense_rows) / labelled)
                decided["dropped_mass_max"].append(float(stats.dropped_mass_max))

        model.register_forward_hook(record, with_kwargs=True)
        trainer.train()
        evaluation = trainer.evaluate()
    log = [line for line in trainer.state.log_history if "rewards/accuracies" in line]
    curves = {
        "loss": [line["loss"] for line in log],
        "accuracy": [line["rewards/accuracies"] for line in log],
        "entropy": [line["entropy"] for line in log],
        **decided,
    }
    return {
        "seed": seed,
        "run": name,
        "end": {
            "training loss": statistics.mean(curves["loss"][-LAST_STEPS:]),
            "training accuracy": statistics.mean(curves["accuracy"][-LAST_STEPS:]),
            "held-out loss": evaluation["eval_loss"],
            "held-out accuracy": evaluation["eval_rewards/accuracies"],
            "held-out margin": evaluation["eval_rewards/margins"],
        },
        "curves": {k: [float(f"{v:.6g}") for v in values] for k, values in curves.items()},
    }


def study(steps: int, seeds: Sequence[int], out: Path, sizes: Sizes) -> dict[str, Any]:
    """All runs of all seeds; ``out`` is written after each of them."""
    document: dict[str, Any] = {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "CPU, 1 thread",
        "steps": steps,
        "sizes": asdict(sizes),
        "settings": settings(sizes, steps),
        "variants": RUNS,
        "runs": [],
    }
    for seed in seeds:
        start = prepare(seed, sizes)
        for name in RUNS:
            run = train(start, sizes, name, steps, seed)
            document["runs"].append(run)
            save(document, out)
            ends = ", ".join(f"{k} {v:.4f}" for k, v in run["end"].items())
            active = statistics.mean(run["curves"]["active_fraction"])
            print(f"seed {seed} {name:<14} {ends}; active fraction {active:.3f}", flush=True)
    return document


def by_run(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each name, seeds in order."""
    ordered = sorted(document["runs"], key=lambda run: run["seed"])
    return {name: [run for run in ordered if run["run"] == name] for name in RUNS}


def ends_table(document: dict[str, Any]) -> str:
    """How every run ends, a line each."""
    names = list(document["runs"][0]["end"])
    rows = ["| seed | run | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for seed in sorted({run["seed"] for run in document["runs"]}):
        for name, runs in by_run(document).items():
            (end,) = (run["end"] for run in runs if run["seed"] == seed)
            numbers = " | ".join(f"{end[n]:.5f}" for n in names)
            rows.append(f"| {seed} | {name} | {numbers} |")
    return "\n".join(rows)


def differences_table(document: dict[str, Any]) -> str:
    """Differences from the exact run of the same seed, beside the spread of the exact runs over seeds."""
    runs = by_run(document)
    others = [name for name in RUNS if name != "exact"]
    rows = [
        "| | " + " | ".join(f"{name} − exact" for name in others) + " | deviation over seeds |",
        "|---" * (len(others) + 2) + "|",
    ]
    for end in document["runs"][0]["end"]:
        exact = [run["end"][end] for run in runs["exact"]]
        cells = []
        for name in others:
            gaps = [run["end"][end] - e for run, e in zip(runs[name], exact, strict=True)]
            cells.append(", ".join(f"{gap:+.2g}".replace("-", "−") for gap in gaps))
        spread = f"{statistics.stdev(exact):.4f}" if len(exact) > 1 else "–"
        rows.append(f"| {end} | {' | '.join(cells)} | {spread} |")
    return "\n".join(rows)


def sparsity_table(document: dict[str, Any]) -> str:
    """What the backward left out in the training steps of all seeds."""
    runs = by_run(document)
    rows = [
        "| run | tol | active fraction: mean (least – most of a step) | tokens in dense blocks "
        "| most mass dropped of a token | largest loss difference of a step |",
        "|---" * 6 + "|",
    ]
    for name in ("certified", "coarse"):
        curves = {
            key: [value for run in runs[name] for value in run["curves"][key]]
            for key in runs[name][0]["curves"]
        }
        active = curves["active_fraction"]
        exact = (value for run in runs["exact"] for value in run["curves"]["loss"])
        apart = max(abs(a - b) for a, b in zip(curves["loss"], exact, strict=True))
        rows.append(
            f"| {name} | {document['variants'][name]['tol']:.4g} "
            f"| {statistics.mean(active):.3f} ({min(active):.3f} – {max(active):.3f}) "
            f"| {statistics.mean(curves['dense_share']):.1%} "
            f"| {max(curves['dropped_mass_max']):.4g} | {apart:.6f} |"
        )
    return "\n".join(rows)


def report(results: Path = RESULTS, page: Path = PAGE, plot: Path = PLOT) -> None:
    """Write the plot, and the tables into the page, from the results alone."""
    document = json.loads(results.read_text("utf-8"))
    fill(page, tables(document))
    plot_runs(document, plot)


def tables(document: dict[str, Any]) -> dict[str, str]:
    """The page's tables by the name of their block."""
    return {
        "differences": differences_table(document),
        "sparsity": sparsity_table(document),
        "ends": ends_table(document),
    }


def plot_runs(document: dict[str, Any], path: Path) -> None:
    """Losses, their differences from the exact run, and active fractions along the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = by_run(document)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, gaps, active = figure.subplots(1, 3)
    looks: dict[str, dict[str, Any]] = {
        "another order": {"color": "#9ca3af", "linewidth": 1.0},
        "exact": {"color": "#2a6fbb", "linewidth": 2.6, "alpha": 0.5},
        "coarse": {"color": "#a3399b", "linewidth": 1.0},
        "certified": {"color": "#d9772b", "linewidth": 1.0, "linestyle": "--"},
    }
    for name, look in looks.items():
        for k, run in enumerate(runs[name]):
            label = None if k else name
            loss = run["curves"]["loss"]
            if name != "coarse":
                losses.plot(_smooth(loss), label=label, **look)
            if name in ("certified", "coarse"):
                exact = runs["exact"][k]["curves"]["loss"]
                apart = [abs(a - b) for a, b in zip(loss, exact, strict=True)]
                gaps.plot(_smooth(apart), label=label, **look)
                active.plot(_smooth(run["curves"]["active_fraction"]), label=label, **look)
    noise = [
        abs(a["end"]["held-out loss"] - b["end"]["held-out loss"])
        for a, b in zip(runs["another order"], runs["exact"], strict=True)
    ]
    for k, value in enumerate(noise):
        label = None if k else "another order, at the end, held out"
        gaps.axhline(value, color="#9ca3af", linewidth=1.0, label=label)
    gaps.set_yscale("log")
    active.set_ylim(0, 1)
    titles = ("training loss", "|loss − loss of exact|, nats", "active fraction")
    for axes, title in zip((losses, gaps, active), titles, strict=True):
        axes.set_title(f"{title}, mean of {SMOOTHED} steps", loc="left", fontsize=9)
        axes.set_xlabel("optimiser step", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.mean(values[max(0, k + 1 - SMOOTHED) : k + 1]) for k in range(len(values))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--report", action="store_true", help="make page and plot from it")
    arguments = parser.parse_args(argv)
    if arguments.report:
        report(arguments.out)
        return
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    study(arguments.steps, arguments.seeds, arguments.out, Sizes())


if __name__ == "__main__":
    main()
