"""Exact match before and after training as one PNG: bars are means over seeds, points the single seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastpo.demo.run import SeedResult

_GREY, _BLUE, _ORANGE = "#9ca3af", "#2a6fbb", "#d9772b"


def plot_accuracies(results: list[SeedResult], path: Path) -> Path:
    """Write the plot of all `results` to `path` and return it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {"before": [100 * r.before for r in results]}
    for method in results[0].after:
        series[method] = [100 * r.after[method] for r in results]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for x, (name, values) in enumerate(series.items()):
        mean = sum(values) / len(values)
        color = _GREY if name == "before" else _ORANGE if name.startswith("γ") else _BLUE
        axes.bar(x, mean, width=0.62, color=color, alpha=0.85)
        spread = [0.24 * (2 * i / max(1, len(values) - 1) - 1) for i in range(len(values))]
        offsets = spread if len(values) > 1 else [0.0]
        axes.plot([x + o for o in offsets], values, "o", color="#111827", markersize=3.5, alpha=0.7)
        top = max(values)
        axes.annotate(
            f"{mean:.1f}", (x, top), (0, 5), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(series)), list(series))
    axes.set_ylim(0, 100)
    axes.set_ylabel("exact match on held-out prompts, %", fontsize=9)
    seeds = f"{len(results)} seeds" if len(results) > 1 else "1 seed"
    axes.set_title(
        f"Sorting five digits, 30 % of the preferences flipped; {seeds}", loc="left", fontsize=10
    )
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
