"""The demo's task over many seeds: the search for its settings, the study, and the study's table and plot.

    python benchmarks/demo_study.py search DPO SimPO      # → results/demo_search.json, on seeds 101 to 104
    python benchmarks/demo_study.py search γ-DPO γ-SimPO  #   with the β and learning rate of DPO and SimPO
    python benchmarks/demo_study.py run                   # → results/demo_study.json, on seeds 0 to 9
    python benchmarks/demo_study.py report                # → docs/demo_study.png, the tables in docs/demo.md

No seed is used for both. Every command may be given again: what a results file holds is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import fastpo
from fastpo.demo import run as demo
from fastpo.demo.plot import plot_accuracies

ROOT = Path(__file__).resolve().parents[1]
SEARCH_FILE = ROOT / "benchmarks/results/demo_search.json"
STUDY_FILE = ROOT / "benchmarks/results/demo_study.json"
PAGE, PLOT = ROOT / "docs/demo.md", ROOT / "docs/demo_study.png"
SEARCH_SEEDS, STUDY_SEEDS = range(101, 105), range(10)

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_95 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}

GRIDS: dict[str, dict[str, list[Any]]] = {
    "DPO": {"beta": [0.1, 0.3, 1.0], "learning_rate": [5e-5, 1e-4, 2e-4]},
    "SimPO": {
        "beta": [2.5, 10.0],
        "gamma_beta_ratio": [0.1, 0.3, 0.6],
        "learning_rate": [3e-5, 6e-5, 1e-4, 2e-4],
    },
    "γ-DPO": {"simpo_gamma": [0.5, 1.0, 2.0, 4.0], "gamma_tau": [0.1, 0.3, 1.0, 3.0]},
    "γ-SimPO": {"gamma_beta_ratio": [0.1, 0.3, 0.6], "gamma_tau": [0.1, 0.3, 1.0, 3.0]},
}


def search(methods: list[str], work: Path, processes: int) -> None:
    """Exact match of every point of the methods' grids, on the search seeds."""
    document = _load(SEARCH_FILE)
    done = {(r["seed"], r["method"], json.dumps(r["settings"])) for r in document["results"]}
    jobs = []
    for seed in SEARCH_SEEDS:
        points = [
            (method, dict(zip(GRIDS[method], values, strict=True)))
            for method in methods
            for values in itertools.product(*GRIDS[method].values())
        ]
        points = [p for p in points if (seed, p[0], json.dumps(p[1])) not in done]
        if points:
            jobs.append((work / f"search-{seed}", seed, points))
    for results in _map(_search_seed, jobs, processes):
        document["results"] += results
        _save(SEARCH_FILE, document)
    for method in methods:
        ranked = _ranking(document["results"], method)
        for mean, settings in ranked:
            print(f"{method:<8} {100 * mean:5.1f}  {settings}")


def _search_seed(
    job: tuple[Path, int, list[tuple[str, dict[str, Any]]]],
) -> list[dict[str, Any]]:
    directory, seed, points = job
    problems, _ = demo.prepare(directory, seed)
    results = []
    for number, (method, settings) in enumerate(points):
        run_dir = directory / f"run-{number}"
        demo.train_method(directory, run_dir, demo.METHODS[method] | settings, seed)
        share = demo.score(run_dir, problems)
        results.append({"seed": seed, "method": method, "settings": settings, "exact_match": share})
        print(f"seed {seed} {method} {settings}: {share:.1%}", flush=True)
    return results


def _ranking(results: list[dict[str, Any]], method: str) -> list[tuple[float, str]]:
    """(mean exact match, settings), best first."""
    by_settings: dict[str, list[float]] = {}
    for r in results:
        if r["method"] == method:
            by_settings.setdefault(json.dumps(r["settings"]), []).append(r["exact_match"])
    return sorted(((statistics.mean(v), k) for k, v in by_settings.items()), reverse=True)


def study(work: Path, processes: int) -> None:
    """Every method of the demo on the study seeds."""
    document = _load(STUDY_FILE) | {"training": demo.TRAINING, "methods": demo.METHODS}
    done = {r["seed"] for r in document["results"]}
    jobs = [(work / f"study-{seed}", seed) for seed in STUDY_SEEDS if seed not in done]
    for result in _map(_study_seed, jobs, processes):
        document["results"].append(result)
        _save(STUDY_FILE, document)


def _study_seed(job: tuple[Path, int]) -> dict[str, Any]:
    return asdict(demo.run_seed(*job))


def report() -> None:
    """Write the study's plot, and its tables into the page, from the results files alone."""
    results = [demo.SeedResult(**r) for r in _load(STUDY_FILE)["results"]]
    results.sort(key=lambda r: r.seed)
    plot_accuracies(results, PLOT)
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (
        ("study", study_table(results)),
        ("search", search_table(_load(SEARCH_FILE)["results"])),
    ):
        block = f"<!-- {name} -->\n{table}\n<!-- end {name} -->"
        block = block.replace("\\", r"\\")  # re.sub reads backslashes
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end {name} -->", block, text, flags=re.S)
        if count != 1:
            raise ValueError(f"{PAGE}: expected one block {name!r}, found {count}")
    PAGE.write_text(text, encoding="utf-8")


def study_table(results: list[demo.SeedResult]) -> str:
    """Means with 95 % intervals, and the paired differences that a claim would rest on."""
    rows = ["| | exact match, % | gain over the start, points |", "|---|---|---|"]
    before = [100 * r.before for r in results]
    rows.append(f"| before | {_interval(before)} | |")
    after = {m: [100 * r.after[m] for r in results] for m in demo.METHODS}
    for method, values in after.items():
        gains = [a - b for a, b in zip(values, before, strict=True)]
        rows.append(f"| {method} | {_interval(values)} | {_interval(gains, sign='+')} |")
    rows += ["", "| paired difference | points | seeds in favour |", "|---|---|---|"]
    for dynamic, fixed in (("γ-DPO", "DPO"), ("γ-SimPO", "SimPO"), ("SimPO", "DPO")):
        gaps = [a - b for a, b in zip(after[dynamic], after[fixed], strict=True)]
        favour = sum(g > 0 for g in gaps)
        rows.append(
            f"| {dynamic} − {fixed} | {_interval(gaps, sign='+')} | {favour} of {len(gaps)} |"
        )
    return "\n".join(rows)


def search_table(results: list[dict[str, Any]]) -> str:
    """The best three points of every grid."""
    rows = ["| method | grid points | best settings | mean exact match, % |", "|---|---|---|---|"]
    for method in GRIDS:
        ranked = _ranking(results, method)
        for place, (mean, settings) in enumerate(ranked[:3]):
            lead = f"| {method} | {len(ranked)}" if place == 0 else "| | "
            shown = ", ".join(f"{k} {v:g}" for k, v in json.loads(settings).items())
            rows.append(f"{lead} | {shown} | {100 * mean:.1f} |")
    return "\n".join(rows)


def _interval(values: list[float], sign: str = "") -> str:
    """Mean ± half the 95 % confidence interval, by Student's t."""
    half = T_95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    mean = round(statistics.mean(values), 1) + 0.0  # never −0.0
    return f"{mean:{sign}.1f} ± {half:.1f}".replace("-", "−")


def _map(function: Callable[[Any], Any], jobs: list[Any], processes: int) -> Iterable[Any]:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def _load(path: Path) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    return {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "results": [],
    }


def _save(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["search", "run", "report"])
    parser.add_argument("methods", nargs="*", choices=[[], *GRIDS], help="of the search")
    parser.add_argument("--processes", type=int, default=2, help="each computes on one core")
    arguments = parser.parse_args()
    if arguments.command == "report":
        report()
        return
    with tempfile.TemporaryDirectory() as work:
        if arguments.command == "search":
            search(arguments.methods or list(GRIDS), Path(work), arguments.processes)
        else:
            study(Path(work), arguments.processes)


if __name__ == "__main__":
    main()
