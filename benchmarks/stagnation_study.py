"""Whether self-play stagnates without noise in the reference, and what the noise changes.

    python -m fastpo.benchmarks.stagnation_study           # → results/stagnation_study.json
    python -m fastpo.benchmarks.stagnation_study --report  # → docs: the plot, the tables on the page

The demo's task, sorting five digits, and its fine-tuned model, which does it carelessly. In every iteration the
model answers the same prompts, sampled at temperature 1, and is trained to prefer the right answers to its own
wrong ones, from itself as the reference: SPIN. NPO is the same with DNPO's trainable noise in the reference.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastpo
from fastpo.demo.model import build_model, build_tokenizer
from fastpo.demo.pairs import write_pairs
from fastpo.demo.run import SFT_EXAMPLES, TEST_PROBLEMS, TRAINING, score
from fastpo.demo.sft import answer, fine_tune
from fastpo.demo.task import Problem, annotate, draw_problems
from fastpo.trainer import PreferenceConfig, train

from .study_page import fill, save

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/stagnation_study.json"
PAGE, PLOT = ROOT / "docs/stagnation.md", ROOT / "docs/stagnation.png"

PROMPTS = 1024
ITERATIONS = 3
SETTINGS: dict[str, Any] = {
    **TRAINING,
    "loss_type": "spin",
    "beta": 0.3,
    "num_train_epochs": 4,
    "plot_loss": False,
    "disable_tqdm": True,
}
# Chosen on seed 101, see docs/stagnation.md.
METHODS: dict[str, dict[str, Any]] = {
    "SPIN": {},
    "NPO": {"method": "dnpo", "noise_learning_rate": 1e-3, "noise_alpha": 0.1},
    "NPO, strong noise": {"method": "dnpo", "noise_learning_rate": 1e-2, "noise_alpha": 1.0},
}
LOGGED = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "noise/sigma_mean",
    "noise/margin_shift",
)
LAST_STEPS = 10  # whose mean is the end of an iteration


def prepare(directory: Path, seed: int, scale: float) -> tuple[list[Problem], list[Problem]]:
    """Write the start, fine-tuned as in the demo, to ``directory``; prompts to train on, held-out ones."""
    sizes = (SFT_EXAMPLES, PROMPTS, TEST_PROBLEMS)
    sft, sources, test = draw_problems(*(max(8, round(scale * n)) for n in sizes), seed=seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    fine_tune(model, tokenizer, annotate(sft, seed=seed))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sources, test


def self_made_pairs(model: Path, problems: list[Problem], path: Path, seed: int) -> dict[str, Any]:
    """The right answer chosen, the model's own rejected; an answer that is right or empty makes no pair."""
    given = answer(
        AutoModelForCausalLM.from_pretrained(model).eval(),
        AutoTokenizer.from_pretrained(model),
        problems,
        sample_seed=seed,
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "chosen": [{"role": "assistant", "content": problem.answer}],
            "rejected": [{"role": "assistant", "content": text}],
        }
        for problem, text in zip(problems, given, strict=True)
        if text and text != problem.answer
    ]
    write_pairs(path, rows)
    right = sum(text == problem.answer for problem, text in zip(problems, given, strict=True))
    return {"pairs": len(rows), "sampled right": right / len(problems)}


def iterate(
    method: str, start: Path, work: Path, sources: list[Problem], test: list[Problem], seed: int
) -> list[dict[str, Any]]:
    """All iterations of ``method`` from the checkpoint ``start``: their curves and how each ends."""
    iterations, model = [], start
    for k in range(1, ITERATIONS + 1):
        out = work / f"{method}-{k}"
        pairs = work / f"{method}-{k}.jsonl"
        made = self_made_pairs(model, sources, pairs, seed=100 * seed + k)
        config = PreferenceConfig(
            output_dir=str(out),
            model_name_or_path=str(model),
            dataset=str(pairs),
            seed=seed,
            **(SETTINGS | METHODS[method]),
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            history = train(config).state.log_history
        log = [entry for entry in history if "rewards/margins" in entry]
        curves = {key: [line[key] for line in log] for key in LOGGED if key in log[0]}
        model = out
        ends = {
            key: statistics.mean(curves[key][-LAST_STEPS:])
            for key in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")
        }
        iterations.append(
            {
                **made,
                "exact match": score(model, test),
                "end": ends,
                "curves": {k: [float(f"{v:.5g}") for v in c] for k, c in curves.items()},
            }
        )
    return iterations


def study(seeds: Sequence[int], out: Path, scale: float = 1.0) -> dict[str, Any]:
    """Both methods from every seed's start; ``out`` is written after each of them."""
    document: dict[str, Any] = {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "CPU, 1 thread",
        "prompts": round(scale * PROMPTS),
        "settings": SETTINGS,
        "methods": METHODS,
        "runs": [],
    }
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            sources, test = prepare(work / "start", seed, scale)
            before = score(work / "start", test)
            for method in METHODS:
                run = iterate(method, work / "start", work, sources, test, seed)
                document["runs"].append(
                    {"seed": seed, "method": method, "before": before, "iterations": run}
                )
                save(document, out)
                print(line(seed, method, before, run), flush=True)
    return document


def line(seed: int, method: str, before: float, run: list[dict[str, Any]]) -> str:
    """A run in one line."""
    matches = " → ".join(f"{value:.1%}" for value in (before, *(k["exact match"] for k in run)))
    norms = ", ".join(f"{k['end']['grad_norm']:.3g}" for k in run)
    margins = ", ".join(f"{k['end']['rewards/margins']:.3g}" for k in run)
    return f"seed {seed} {method:<5} exact match {matches}; at the ends gradient norm {norms}, margin {margins}"


def runs_of(document: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Seeds in order."""
    found = [run for run in document["runs"] if run["method"] == method]
    return sorted(found, key=lambda run: run["seed"])


def iterations_table(document: dict[str, Any]) -> str:
    """Mean over seeds and every seed, for each iteration of each method."""
    names = ("gradient norm", "reward margin", "accuracy of the pairs", "exact match, %")
    rows = ["| method | iteration | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method in METHODS:
        runs = runs_of(document, method)
        for k in range(ITERATIONS):
            of_seeds = [run["iterations"][k] for run in runs]
            values = [
                [i["end"]["grad_norm"] for i in of_seeds],
                [i["end"]["rewards/margins"] for i in of_seeds],
                [i["end"]["rewards/accuracies"] for i in of_seeds],
                [100 * i["exact match"] for i in of_seeds],
            ]
            cells = " | ".join(
                f"{statistics.mean(v):.3g} ({', '.join(f'{x:.3g}' for x in v)})" for v in values
            )
            rows.append(f"| {method} | {k + 1} | {cells} |")
    return "\n".join(rows)


def differences_table(document: dict[str, Any]) -> str:
    """Each method with noise against SPIN of the same seed and iteration; the noise at the iteration's end."""
    rows = [
        "| method | iteration | exact match − SPIN's, points: mean (seeds) "
        "| gradient norm over SPIN's: median (seeds) | σ, root mean square | shift of the reward margin |",
        "|---" * 6 + "|",
    ]
    spin, *others = METHODS
    for method in others:
        for k in range(ITERATIONS):
            a, b = ([run["iterations"][k] for run in runs_of(document, m)] for m in (spin, method))
            pairs = list(zip(a, b, strict=True))
            points = [100 * (y["exact match"] - x["exact match"]) for x, y in pairs]
            ratios = [y["end"]["grad_norm"] / x["end"]["grad_norm"] for x, y in pairs]
            sigma, shift = (
                ", ".join(f"{statistics.mean(i['curves'][key][-LAST_STEPS:]):.3g}" for i in b)
                for key in ("noise/sigma_mean", "noise/margin_shift")
            )
            rows.append(
                f"| {method} | {k + 1} "
                f"| {statistics.mean(points):+.1f} ({', '.join(f'{p:+.1f}' for p in points)}) "
                f"| {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)}) "
                f"| {sigma} | {shift} |".replace("-", "−")
            )
    return "\n".join(rows)


def tables(document: dict[str, Any]) -> dict[str, str]:
    """The page's tables by the name of their block."""
    return {"iterations": iterations_table(document), "differences": differences_table(document)}


def plot(document: dict[str, Any], path: Path) -> None:
    """Gradient norm and margin along the steps of all iterations, and exact match after each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    norms, margins, matches = figure.subplots(1, 3)
    for method, color in zip(METHODS, ("#2a6fbb", "#d9772b", "#a3399b"), strict=True):
        for s, run in enumerate(runs_of(document, method)):
            label = None if s else method
            for axes, key in ((norms, "grad_norm"), (margins, "rewards/margins")):
                for k, iteration in enumerate(run["iterations"]):
                    values = iteration["curves"][key]
                    steps = [k + (i + 1) / len(values) for i in range(len(values))]
                    name = label if k == 0 else None
                    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.75, label=name)
            shares = [
                100 * v for v in (run["before"], *(i["exact match"] for i in run["iterations"]))
            ]
            matches.plot(
                range(len(shares)),
                shares,
                "o-",
                color=color,
                markersize=3.5,
                linewidth=1.0,
                label=label,
            )
    norms.set_yscale("log")
    titles = (
        "gradient norm of the policy",
        "reward margin of the pairs",
        "exact match, held out, %",
    )
    for axes, title in zip((norms, margins, matches), titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("iteration", fontsize=9)
        axes.set_xticks(range(ITERATIONS + 1))
        axes.legend(fontsize=7, frameon=False)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def report(results: Path = RESULTS, page: Path = PAGE, picture: Path = PLOT) -> None:
    """Write the plot, and the tables into the page, from the results alone."""
    document = json.loads(results.read_text("utf-8"))
    fill(page, tables(document))
    plot(document, picture)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of examples")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results file")
    parser.add_argument("--report", action="store_true", help="make page and plot from it")
    arguments = parser.parse_args(argv)
    if arguments.report:
        report(arguments.out)
        return
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module="transformers")
    study(arguments.seeds, arguments.out, arguments.scale)


if __name__ == "__main__":
    main()
