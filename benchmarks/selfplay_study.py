"""Four self-improvement loops on one task from one start: accuracy of held-out prompts after every iteration.

    python -m fastpo.benchmarks.selfplay_study           # → results/selfplay_study.json
    python -m fastpo.benchmarks.selfplay_study --report  # → docs: the plot, the tables on the page

Each is ``fastpo iterate`` with its CPU recipe, on what ``fastpo demo --prepare-loop`` writes: a tiny model that
can order words and often does not, seeds of which 30 % have a wrong answer, and a program that scores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

import fastpo
from fastpo.cli.configuration import load_config
from fastpo.demo.words import prepare_loop, score
from fastpo.selfplay.loop import iterate
from fastpo.selfplay.loop_config import LoopConfig

from .study_page import fill, save

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes/loops"
RESULTS = ROOT / "benchmarks/results/selfplay_study.json"
PAGE, PLOT = ROOT / "docs/selfplay-study.md", ROOT / "docs/selfplay_study.png"
METHODS = {
    "spin": "SPIN",
    "dnpo": "DNPO",
    "synpo": "SynPO",
    "synpo-plain": "SynPO, SimPO alone",
    "dpo": "best/worst of 5, DPO",
}
_START = "loop-start/"  # where the recipes look for what the demo prepares


def recipe(method: str) -> LoopConfig:
    """The CPU recipe of a method; ``synpo-plain`` is SynPO's without the SFT term."""
    name, _, plain = method.partition("-")
    overrides = ["--train.sft_weight", "0"] if plain else []
    return load_config(LoopConfig, RECIPES / f"cpu-{name}.yaml", overrides, "iterate")


def placed(config: LoopConfig, start: Path, output: Path, seed: int) -> LoopConfig:
    """The same loop on another start and seed."""
    paths: dict[str, Any] = {
        f.name: value.replace(_START, f"{start}/")
        for f in dataclasses.fields(config)
        if isinstance(value := getattr(config, f.name), str) and value.startswith(_START)
    }
    return dataclasses.replace(config, **paths, output_dir=str(output), seed=seed)


def run_loop(config: LoopConfig) -> dict[str, Any]:
    """Run a loop quietly; what its report says, in short, and the seconds it took."""
    began = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        iterate(config)
    seconds = time.monotonic() - began
    report = json.loads((Path(config.output_dir) / "report.json").read_text("utf-8"))
    return {
        "seconds": round(seconds, 1),
        "accuracy": [entry["score"]["mean"] for entry in report["evaluation"]],
        "words": [entry["length"]["words"]["mean"] for entry in report["evaluation"]],
        "win_rate_first": [e["win_rate_first"]["rate"] for e in report["evaluation"][1:]],
        "iterations": [
            {
                "counts": entry["counts"]["pairs"],
                "generated_winners": entry.get("generated_winners"),
                "prompt_similarity": entry["prompt_similarity"]["mean"],
                "pairs_trained_on": entry["counts"]["dataset"]["out"],
                "right_over_wrong": right_over_wrong(Path(config.output_dir), entry["iteration"]),
            }
            for entry in report["iterations"]
        ],
    }


def right_over_wrong(root: Path, iteration: int) -> float:
    """Share of an iteration's pairs whose chosen answer is right and whose rejected one is not."""
    good = []
    for line in (root / f"iteration-{iteration}/pairs.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        texts = [
            row[name] if isinstance(row[name], str) else row[name][-1]["content"]
            for name in ("chosen", "rejected")
        ]
        right = [score(row["prompt"], text) for text in texts]
        good.append(right == [1.0, 0.0])
    return statistics.mean(good)


def study(
    seeds: Sequence[int],
    out: Path,
    scale: float = 1.0,
    methods: Sequence[str] = tuple(METHODS),
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every method from every seed's start; ``out`` is written after each loop."""
    document: dict[str, Any] = {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "CPU, 1 thread",
        "scale": scale,
        "settings": {
            method: dataclasses.asdict(dataclasses.replace(recipe(method), **(changes or {})))
            for method in methods
        },
        "runs": [],
    }
    for seed in seeds:
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            with contextlib.redirect_stdout(io.StringIO()):
                start = prepare_loop(work / "start", seed, scale)
            for method in methods:
                config = dataclasses.replace(recipe(method), **(changes or {}))
                made = run_loop(placed(config, start, work / method, seed))
                document["runs"].append({"seed": seed, "method": method, **made})
                save(document, out)
                print(line(document["runs"][-1]), flush=True)
    return document


def line(run: dict[str, Any]) -> str:
    """A run in one line."""
    shares = " → ".join(f"{value:.1%}" for value in run["accuracy"])
    return f"seed {run['seed']} {run['method']:<5} accuracy {shares} in {run['seconds']:.0f} s"


def runs_of(document: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Seeds in order."""
    found = [run for run in document["runs"] if run["method"] == method]
    return sorted(found, key=lambda run: run["seed"])


def accuracy_table(document: dict[str, Any]) -> str:
    """Mean over seeds and every seed, after each iteration."""
    steps = len(document["runs"][0]["accuracy"])
    head = ["method", "start", *(f"iteration {k}" for k in range(1, steps)), "seconds of a loop"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in document["settings"]:
        runs = runs_of(document, method)
        cells = [_spread([100 * run["accuracy"][k] for run in runs]) for k in range(steps)]
        seconds = [run["seconds"] for run in runs]
        rows.append(
            f"| {METHODS[method]} | {' | '.join(cells)} | {min(seconds):.0f} … {max(seconds):.0f} |"
        )
    return "\n".join(rows)


def differences_table(document: dict[str, Any]) -> str:
    """Of methods to each other, at the end, paired by seed."""
    rows = ["| at the end | points: mean (seeds) |", "|---|---|"]
    for a, b in (
        ("dnpo", "spin"),
        ("dpo", "dnpo"),
        ("synpo", "dpo"),
        ("synpo", "synpo-plain"),
    ):
        if not (runs_of(document, a) and runs_of(document, b)):
            continue
        pairs = zip(runs_of(document, a), runs_of(document, b), strict=True)
        points = [100 * (x["accuracy"][-1] - y["accuracy"][-1]) for x, y in pairs]
        row = f"| {METHODS[a]} − {METHODS[b]} | {_spread(points, '+')} |"
        rows.append(row.replace("-", "−"))
    return "\n".join(rows)


def data_table(document: dict[str, Any]) -> str:
    """What every iteration made and trained on, means over the seeds."""
    rows = [
        "| method | iteration | pairs made | trained on | right over wrong, % | chosen that a model made, % |",
        "|---" * 6 + "|",
    ]
    for method in document["settings"]:
        of_seeds = [run["iterations"] for run in runs_of(document, method)]
        for k, made in enumerate(zip(*of_seeds, strict=True), 1):
            winners = [m["generated_winners"] for m in made]
            cells = [
                f"{statistics.mean(m['counts']['out'] for m in made):.0f}",
                f"{statistics.mean(m['pairs_trained_on'] for m in made):.0f}",
                f"{100 * statistics.mean(m['right_over_wrong'] for m in made):.1f}",
                "" if None in winners else f"{100 * statistics.mean(winners):.1f}",
            ]
            rows.append(f"| {METHODS[method]} | {k} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.mean(values):{sign}.1f} ({', '.join(f'{v:{sign}.1f}' for v in values)})"


def tables(document: dict[str, Any]) -> dict[str, str]:
    """The page's tables by the name of their block."""
    return {
        "accuracy": accuracy_table(document),
        "differences": differences_table(document),
        "data": data_table(document),
    }


def plot(document: dict[str, Any], path: Path) -> None:
    """Accuracy after each iteration: every seed thin, the mean thick."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = ("#2a6fbb", "#d9772b", "#3a8f5c", "#9bc9ad", "#6b7280")
    for (method, name), color in zip(METHODS.items(), colors, strict=True):
        curves = [[100 * v for v in run["accuracy"]] for run in runs_of(document, method)]
        if not curves:
            continue
        steps = range(len(curves[0]))
        for curve in curves:
            axes.plot(steps, curve, color=color, linewidth=0.7, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        axes.plot(steps, mean, "o-", color=color, markersize=4, linewidth=1.8, label=name)
        axes.set_xticks(steps)
    axes.set_title(
        "Right answers to held-out prompts, drawn at temperature 1, %", loc="left", fontsize=9
    )
    axes.set_xlabel("iteration", fontsize=9)
    axes.set_ylim(0, 100)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
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
    study(arguments.seeds, arguments.out, arguments.scale, arguments.methods)


if __name__ == "__main__":
    main()
