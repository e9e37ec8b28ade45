"""A run's logged curves as one PNG: loss, rewards, margins, accuracies, γ and the noise of DNPO."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.utils import logging

from .checkpoint import TRAINER_STATE_FILE, checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "training.png"
_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9772b", "#6b7280"

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Panel:
    """One set of axes: the metrics it shows (name → label, colour) and its unit."""

    title: str
    unit: str
    metrics: Mapping[str, tuple[str, str]]
    band: tuple[str, str] | None = None  # lower and upper bound around the first metric
    share: bool = False  # a number in [0, 1]


PANELS = (
    Panel("Loss", "", {"loss": ("", _BLUE)}),
    Panel(
        "Rewards",
        "nats",
        {"rewards/chosen": ("chosen", _BLUE), "rewards/rejected": ("rejected", _ORANGE)},
    ),
    Panel("Reward margin", "nats", {"rewards/margins": ("", _BLUE)}),
    Panel("Pairs ranked right", "share", {"rewards/accuracies": ("", _BLUE)}, share=True),
    Panel(
        "Target margin γ", "nats", {"gamma/mean": ("mean", _BLUE)}, band=("gamma/min", "gamma/max")
    ),
    Panel(
        "Loss of either player",
        "",
        {"loss/model": ("policy", _BLUE), "loss/noise": ("noise", _ORANGE)},
    ),
    Panel(
        "Noise σ",
        "logits",
        {"noise/sigma_mean": ("root mean square", _BLUE), "noise/sigma_max": ("max", _ORANGE)},
    ),
    Panel("Margin moved by the noise", "nats", {"noise/margin_shift": ("", _BLUE)}),
)


class PlotCallback(TrainerCallback):
    """Writes ``training.png`` into ``output_dir`` when training ends; where it cannot, a warning says why."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            plot_history(state.log_history, Path(args.output_dir) / PLOT_FILE)
        except Exception as error:  # the trained model is saved after this: no plot is worth it
            logger.warning(f"plot_loss: no plot was written: {error}")


def plot_run(run_dir: str | Path) -> Path:
    """Plot the curves of a run directory into ``training.png`` there.

    They are read from its ``trainer_state.json``, or from that of its newest checkpoint.

    Returns:
        The PNG's path.

    Raises:
        FileNotFoundError: no such directory, or none of these files in it.
        ValueError: nothing was logged.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"run_dir: {run_dir} is not a directory")
    candidates = [run_dir, *reversed(checkpoints(run_dir))]
    for directory in candidates:
        state = directory / TRAINER_STATE_FILE
        if state.is_file():
            history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            return plot_history(history, run_dir / PLOT_FILE)
    raise FileNotFoundError(
        f"run_dir: {run_dir} holds no {TRAINER_STATE_FILE}, nor does a checkpoint in it"
    )


def plot_history(log_history: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Plot what a trainer logged. Metrics that were not logged have no panel.

    Args:
        log_history: ``TrainerState.log_history``: one mapping per log line, with ``step``.
        path: the PNG to write.

    Raises:
        ValueError: none of the metrics was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = [entry for entry in log_history if "step" in entry]
    panels = [p for p in PANELS if any(_series(history, m) for m in _names(p))]
    if not panels:
        raise ValueError("log_history: nothing to plot, no loss or reward was logged")
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)  # no display is looked for
    for k, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        _draw(axes, panel, history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _names(panel: Panel) -> list[str]:
    return [name for metric in panel.metrics for name in (metric, f"eval_{metric}")]


def _series(history: list[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of every log line with that metric; of a step logged twice the last."""
    return sorted({e["step"]: e[name] for e in history if name in e}.items())


def _draw(axes: Axes, panel: Panel, history: list[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps: set[float] = set()
    for metric, (label, color) in panel.metrics.items():
        for prefix, style in (("", _TRAIN), ("eval_", _EVAL)):
            points = _series(history, prefix + metric)
            if not points:
                continue
            x, y = zip(*points, strict=True)
            steps.update(x)
            name = (
                f"{label} (eval)" if label and prefix else label or ("eval" if prefix else "train")
            )
            if len(points) == 1:
                style = {**style, "marker": "o"}
            axes.plot(x, y, color=color, label=name, **style)
    if panel.band:
        low, high = (dict(_series(history, name)) for name in panel.band)
        shared = sorted(low.keys() & high.keys())
        if shared:
            axes.fill_between(
                shared,
                [low[s] for s in shared],
                [high[s] for s in shared],
                color=_BLUE,
                alpha=0.15,
                linewidth=0,
                label="min … max",
            )
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("optimiser step", fontsize=8, color=_GREY)
    if panel.unit:
        axes.set_ylabel(panel.unit, fontsize=8, color=_GREY)
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
        axes.axhline(0.5, color=_GREY, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_GREY)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8, frameon=False)


_TRAIN: dict[str, Any] = {"linewidth": 1.4}
_EVAL: dict[str, Any] = {"linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 4}
