"""The plot of a run: which panels it has, and that their curves are the logged numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastpo.trainer.plots import PLOT_FILE, plot_history, plot_run


def history(
    steps: int = 12, *, gamma: bool = True, rewards: bool = True, evals: bool = True
) -> list[Any]:
    entries: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        entry: dict[str, Any] = {"step": step, "loss": 0.7 - 0.03 * step, "learning_rate": 1e-6}
        if rewards:
            entry |= {
                "rewards/chosen": 0.1 * step, "rewards/rejected": -0.2 * step,
                "rewards/margins": 0.3 * step, "rewards/accuracies": min(1.0, 0.4 + 0.05 * step),
            }  # fmt: skip
        if gamma:
            entry |= {
                "gamma/mean": 0.5,
                "gamma/min": 0.5 - 0.02 * step,
                "gamma/max": 0.5 + 0.03 * step,
            }
        entries.append(entry)
        if evals and step % 4 == 0:
            entries.append({"step": step, "eval_loss": 0.75 - 0.03 * step, "eval_runtime": 1.0})
    return [*entries, {"step": steps, "train_runtime": 3.0}]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    kept: list[Axes] = []
    original = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        kept.extend(figure.axes)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def titles(axes: list[Axes]) -> list[str]:
    return [a.get_title(loc="left") for a in axes]


def test_noise_has_panels_of_its_own(axes: list[Axes], tmp_path: Path) -> None:
    entries = history()
    for entry in entries:
        entry |= {
            "loss/model": 0.6,
            "loss/noise": -0.5,
            "noise/sigma_mean": 0.1,
            "noise/sigma_max": 1.0,
        }
    plot_history(entries, tmp_path / "plot.png")
    (sigma,) = (a for a in axes if a.get_title(loc="left") == "Noise σ")
    assert [line.get_label() for line in sigma.get_lines()] == ["root mean square", "max"]
    assert "Loss of either player" in titles(axes)
    assert "Margin moved by the noise" not in titles(axes)  # was not logged


def test_curves_are_the_logged_numbers(axes: list[Axes], tmp_path: Path) -> None:
    path = plot_history(history(), tmp_path / "new" / "plot.png")
    assert titles(axes) == [
        "Loss", "Rewards", "Reward margin", "Pairs ranked right", "Target margin γ",
    ]  # fmt: skip
    train, evaluation = axes[0].lines
    np.testing.assert_allclose(train.get_ydata(), [0.7 - 0.03 * s for s in range(1, 13)])
    np.testing.assert_allclose(evaluation.get_xydata(), [[s, 0.75 - 0.03 * s] for s in (4, 8, 12)])
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [-0.2 * s for s in range(1, 13)])
    band = axes[4].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((0.5 - 0.24, 0.5 + 0.36))
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 700
    assert pixels.shape[1] > 1500
    assert 0.005 < (pixels[..., :3].min(axis=2) < 0.9).mean() < 0.3  # neither blank nor a smear


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gamma": False}, ["Loss", "Rewards", "Reward margin", "Pairs ranked right"]),
        ({"gamma": False, "rewards": False}, ["Loss"]),
        (
            {"steps": 1},
            ["Loss", "Rewards", "Reward margin", "Pairs ranked right", "Target margin γ"],
        ),
    ],
)
def test_panels_that_were_not_logged_are_absent(
    options: dict[str, Any], expected: list[str], axes: list[Axes], tmp_path: Path
) -> None:
    plot_history(history(**options), tmp_path / "plot.png")
    assert titles(axes) == expected


def test_run_directory_and_its_newest_checkpoint(tmp_path: Path, axes: list[Axes]) -> None:
    for step in (8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"log_history": history(step)}))
    assert plot_run(str(tmp_path)) == tmp_path / PLOT_FILE
    assert axes[0].lines[0].get_xdata()[-1] == 12
    axes.clear()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history(5)}))
    plot_run(tmp_path)
    assert axes[0].lines[0].get_xdata()[-1] == 5


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory"):
        plot_run(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"holds no trainer_state\.json"):
        plot_run(tmp_path)
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_history([{"step": 1, "train_runtime": 2.0}], tmp_path / "plot.png")
