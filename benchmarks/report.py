"""``fastpo bench --report``: Markdown tables and plots, from the JSON of runs alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import tables
from .bench import FORMAT, title
from .measure import median
from .memory import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "report.md"
GREY, LIGHT = "#6b7280", "#e5e7eb"
COLORS = {
    "fastpo-certified": "#1d4ed8",
    "fastpo-exact": "#60a5fa",
    "fastpo-low-memory": "#67e8f9",
    "eager": "#374151",
    "torch-chunked": "#dc2626",
    "trl": "#d97706",
    "cce-compiled": "#059669",
    "cce-exact": "#10b981",
    "cce-filtered": "#84cc16",
    "liger-ce": "#7c3aed",
    "liger-ce-sm90": "#c026d3",
    "quack": "#0891b2",
    "liger-loss": "#be185d",
    "liger-loss-compiled": "#f472b6",
}
MARKERS = "osD^vP*X"


def report(files: Sequence[Path], out: Path | None = None) -> Path:
    """Write ``report.md`` and its plots.

    Args:
        files: JSON that ``fastpo bench`` or the GPU pass wrote.
        out: directory; None: the first file's path without its suffix.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no result of ``fastpo bench``, or two of the same name.
    """
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"--report: got {', '.join(map(str, files))}, expected different names")
    documents = {file.stem: read(file) for file in files}
    out = out or files[0].with_suffix("")
    out.mkdir(parents=True, exist_ok=True)
    sections = ["# Benchmarks", ""]
    for stem, document in documents.items():
        sections += _section(stem, document, out)
    page = out / PAGE
    page.write_text("\n".join(sections).rstrip() + "\n", encoding="utf-8")
    return page


def read(file: Path) -> dict[str, Any]:
    """The document in ``file``."""
    if not file.is_file():
        raise FileNotFoundError(f"--report: no file {str(file)!r}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--report: {file} is not JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"--report: {file} is no result of fastpo bench")
    return document


def _section(stem: str, document: dict[str, Any], out: Path) -> list[str]:
    """Heading, plots, tables and what is missing, of one run."""
    environment = document["environment"]
    measured = [record for record in document["cases"] if "error" not in record]
    lines = [
        f"## {environment.get('gpu') or environment['cpu']}",
        "",
        f"{title(environment)}; Python {environment['python']}; set `{document['set']}`, "
        f"{document['date']}. Times are medians of interleaved rounds, errors are relative to float64 "
        "of the same inputs (L2; margins: the largest of a pair in nats), memory is the peak beyond "
        "inputs and gradients. G is one N×V×H product over the labelled tokens in the same dtype.",
        "",
    ]
    states = document.get("states", {})
    if "sha256" in states:
        origin = "the project's own model" if states["own"] else "a file that was given"
        lines += [f"States of the lm workload: {origin}, SHA-256 {states['sha256'][:16]}….", ""]
    checks = document.get("checks", [])
    if checks:
        wrong = [check["name"] for check in checks if not check["ok"]]
        lines += [
            f"Correctness on the device: {len(checks) - len(wrong)} of {len(checks)} checks passed"
            + (f"; failed: {', '.join(wrong)}." if wrong else "."),
            "",
        ]
    for kind, draw in (("size", _plot_size), ("accuracy", _plot_accuracy)):
        name = f"{stem}-{kind}.png"
        if draw(measured, out / name):
            lines += [f"![{kind}]({name})", ""]
    groups = dict.fromkeys(record["case"]["group"] for record in measured)
    for group in groups:
        lines += [f"### {group[0].upper()}{group[1:]}", ""]
        for record in measured:
            if record["case"]["group"] == group:
                rows = tables.markdown(tables.table(record))
                lines += [f"{tables.heading(record)}.", "", rows, ""]
    return lines + _remarks(document, measured)


def _remarks(document: dict[str, Any], measured: list[dict[str, Any]]) -> list[str]:
    """Settings of the rivals, and who or what is missing."""
    settings: dict[str, None] = {}
    absent: dict[str, list[str]] = {}
    for record in measured:
        for result in record.get("results", []):
            settings.setdefault(f"`{result['rival']}`: {result['settings']}")
        for rival, why in tables.missing(record).items():
            absent.setdefault(f"`{rival}`: {why}", []).append(record["name"])
    lines = ["### Settings", "", *(f"- {line}" for line in settings), ""]
    lines += ["### Missing", ""]
    for line, names in absent.items():
        everywhere = len(names) == sum("results" in r for r in measured)
        lines.append(f"- {line}" if everywhere else f"- {line} ({', '.join(names)})")
    lines += [f"- {r['name']}: {r['error']}" for r in document["cases"] if "error" in r]
    lines += [f"- {name}: left out, the time was up" for name in document["left_out"]]
    if document["environment"]["device"] == "cpu":
        lines.append("- GPU figures: no CUDA device took part")
    return [*lines, ""]


def _plot_size(measured: list[dict[str, Any]], path: Path) -> bool:
    """Time and memory against the number of tokens, of the cases that differ in nothing else."""
    records = [r for r in measured if r["case"]["group"] == "size" and not r["case"]["frozen_head"]]
    same = ("width", "vocab", "dtype", "entropy", "ignored")
    like = records[0]["case"] if records else {}
    main = [r for r in measured if r["case"]["group"] == "main"]
    records += [r for r in main if all(r["case"][k] == like.get(k) for k in same)]
    records.sort(key=lambda record: record["case"]["n"])
    if len({record["case"]["n"] for record in records}) < 2:
        return False
    figure, (left, right) = _figure(2)
    time: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        n = record["case"]["n"]
        unit = median(record["G_seconds"])
        if unit:
            time.setdefault("G", []).append((n, 1000 * unit))
        for result in record["results"]:
            if result["status"] == "measured":
                seconds = median(result["step_seconds"])
                if seconds:
                    time.setdefault(result["rival"], []).append((n, 1000 * seconds))
                memory.setdefault(result["rival"], []).append((n, result["extra_bytes"] / MIB))
    case = records[0]["case"]
    shape = f"H {case['width']}, V {case['vocab']}, {case['dtype']}"
    for axes, series, unit_name, heading in (
        (left, time, "ms", "Forward + backward"),
        (right, memory, "MiB", "Peak extra memory"),
    ):
        for name, points in series.items():
            x, y = zip(*points, strict=True)
            style = "--" if name == "G" else "-"
            color = COLORS.get(name, GREY)  # grey: G
            width = 2.2 if name.startswith("fastpo") else 1.2
            axes.plot(
                x, y, style, color=color, linewidth=width, marker="o", markersize=3.5, label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sorted({record["case"]["n"] for record in records}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", "\u202f"))
        _dress(axes, f"{heading}; {shape}", "tokens", unit_name)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _plot_accuracy(measured: list[dict[str, Any]], path: Path) -> bool:
    """Error of dH against time in G, one panel per dtype; the marker tells the workload."""
    groups = ("main", "accuracy", "flat", "float32")
    points: dict[str, list[tuple[str, str, float, float]]] = {}
    for record in measured:
        unit = median(record.get("G_seconds", []))
        if record["case"]["group"] not in groups or not unit:
            continue
        for result in record["results"]:
            seconds = median(result.get("step_seconds", []))
            errors = result.get("errors", {})
            if seconds and "hidden_grad" in errors:
                point = (
                    result["rival"],
                    record["workload"]["name"],
                    seconds / unit,
                    errors["hidden_grad"],
                )
                points.setdefault(record["case"]["dtype"], []).append(point)
    if not points:
        return False
    names = dict.fromkeys(workload for found in points.values() for _, workload, _, _ in found)
    markers = dict(zip(names, MARKERS, strict=False))
    figure, panels = _figure(len(points))
    shown = {rival for found in points.values() for rival, *_ in found}
    for axes, (dtype, found) in zip(panels, points.items(), strict=True):
        for rival, workload, x, y in found:
            axes.plot(
                x,
                y,
                linestyle="",
                marker=markers[workload],
                color=COLORS[rival],
                markersize=6,
                alpha=0.85,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        _dress(axes, f"Accuracy and time; {dtype}", "forward + backward, G", "relative error of dH")
    from matplotlib.lines import Line2D

    rivals = [name for name in COLORS if name in shown]
    handles = [Line2D([], [], marker="s", linestyle="", color=COLORS[name]) for name in rivals]
    handles += [
        Line2D([], [], marker=m, linestyle="", color=GREY, markerfacecolor="none")
        for m in markers.values()
    ]
    figure.legend(
        handles, [*rivals, *markers], loc="outside right center", fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=150)
    return True


def _figure(panels: int) -> tuple[Any, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * panels + 1.8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no display is looked for
    return figure, [figure.add_subplot(1, panels, k + 1) for k in range(panels)]


def _dress(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xlabel(x, fontsize=8, color=GREY)
    axes.set_ylabel(y, fontsize=8, color=GREY)
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8, colors=GREY)
