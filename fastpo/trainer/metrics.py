"""Means of metrics over a window of micro-steps, gradient accumulation and ranks, and when they are logged."""

from __future__ import annotations

from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback


class MetricWindow:
    """Means of named numbers, each weighted by the pairs it stands for.

    A name that ends in ``/min``, ``/max`` or ``_max`` keeps the smallest or largest number instead.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """An empty window, or one that goes on from a saved :attr:`state`."""
        self._sums: dict[str, list[float]] = {}  # name → [Σ pairs · value, Σ pairs]
        self._extremes: dict[str, float] = {}
        if state:
            self._merge(state)

    @property
    def state(self) -> dict[str, Any]:
        """This rank's sums, for JSON."""
        return {"sums": self._sums, "extremes": self._extremes}

    def add(self, values: dict[str, float], pairs: int) -> None:
        """Numbers of one micro-step of ``pairs`` ≥ 1 pairs."""
        for name, value in values.items():
            if name.endswith(("/min", "/max", "_max")):
                self._keep_extreme(name, value)
            else:
                total = self._sums.setdefault(name, [0.0, 0.0])
                total[0] += pairs * value
                total[1] += pairs

    def over_ranks(self) -> MetricWindow:
        """The windows of all ranks as one; every rank must call."""
        window = MetricWindow()
        for state in gather_object([self.state]):
            window._merge(state)
        return window

    def means(self) -> dict[str, float]:
        """The window's numbers by name."""
        return {name: total / pairs for name, (total, pairs) in self._sums.items()} | self._extremes

    def _merge(self, state: dict[str, Any]) -> None:
        for name, (total, pairs) in state["sums"].items():
            own = self._sums.setdefault(name, [0.0, 0.0])
            own[0] += total
            own[1] += pairs
        for name, value in state["extremes"].items():
            self._keep_extreme(name, value)

    def _keep_extreme(self, name: str, value: float) -> None:
        pick = min if name.endswith("/min") else max
        self._extremes[name] = pick(value, self._extremes.get(name, value))


class LogLastStep(TrainerCallback):
    """Logs at the last step too, however few steps came after the last log line."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and args.logging_strategy == "steps":
            control.should_log = True
