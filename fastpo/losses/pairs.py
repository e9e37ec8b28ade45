"""A batch of preference pairs as the losses see it: sequence log-probs and the scores that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """One number per answer, (B,) for the chosen and (B,) for the rejected ones."""

    chosen: Tensor
    rejected: Tensor

    @property
    def gap(self) -> Tensor:
        """chosen − rejected, (B,)."""
        return self.chosen - self.rejected


@dataclass(frozen=True)
class Pairs:
    """Sequence log-probs of B pairs, built by :meth:`build`.

    Everything is float64: a gap of two sums over thousands of tokens would lose its last digits in float32.
    """

    chosen_logps: Tensor  # (B,) float64, nats, summed over the labelled tokens
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None
    ref_rejected_logps: Tensor | None
    chosen_lengths: Tensor | None  # (B,) float64, labelled tokens
    rejected_lengths: Tensor | None

    @classmethod
    def build(
        cls,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
        chosen_lengths: Tensor | None,
        rejected_lengths: Tensor | None,
    ) -> Pairs:
        """Check types and shapes, and convert to float64.

        Raises:
            TypeError: an argument is not a tensor, or log-probs are not floating point.
            ValueError: shapes other than (B,) with B ≥ 1, devices that differ, or one half alone of the
                reference or the lengths.
        """
        given: dict[str, Tensor | None] = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }
        for name, value in given.items():
            if value is None and name not in ("chosen_logps", "rejected_logps"):
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor (B,)")
            if name.endswith("logps") and not value.is_floating_point():
                raise TypeError(f"{name}: got dtype {value.dtype}, expected floating point")
            if value.shape != chosen_logps.shape or value.ndim != 1 or value.numel() == 0:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected (B,) with B ≥ 1, that of "
                    f"chosen_logps, {tuple(chosen_logps.shape)}"
                )
            if value.device != chosen_logps.device:
                raise ValueError(
                    f"{name}: got device {value.device}, expected that of chosen_logps, "
                    f"{chosen_logps.device}"
                )
        for half, other in (
            ("ref_chosen_logps", "ref_rejected_logps"),
            ("chosen_lengths", "rejected_lengths"),
        ):
            if (given[half] is None) != (given[other] is None):
                raise ValueError(f"{half}, {other}: got one of the two, expected both or neither")
        wide = {k: None if v is None else v.double() for k, v in given.items()}
        return cls(**wide)  # type: ignore[arg-type]

    @property
    def logps(self) -> Score:
        """log π(y), summed."""
        return Score(self.chosen_logps, self.rejected_logps)

    @property
    def mean_logps(self) -> Score:
        """log π(y) / |y|."""
        return self._averaged(self.logps)

    @property
    def logratios(self) -> Score:
        """log π(y) − log π_ref(y), summed; without a reference, log π(y)."""
        if self.ref_chosen_logps is None or self.ref_rejected_logps is None:
            return self.logps
        return Score(
            self.chosen_logps - self.ref_chosen_logps, self.rejected_logps - self.ref_rejected_logps
        )

    @property
    def mean_logratios(self) -> Score:
        """(log π(y) − log π_ref(y)) / |y|."""
        return self._averaged(self.logratios)

    @property
    def lengths(self) -> Score:
        """|y|, labelled tokens.

        Raises:
            ValueError: the pairs were built without lengths.
        """
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise ValueError(
                "chosen_lengths, rejected_lengths: got None, expected (B,) each: this loss uses them"
            )
        return Score(self.chosen_lengths, self.rejected_lengths)

    def _averaged(self, score: Score) -> Score:
        # An answer without one labelled token has sum 0: its mean is 0 too, never 0/0.
        chosen_lengths, rejected_lengths = self.lengths
        return Score(
            score.chosen / chosen_lengths.clamp(min=1),
            score.rejected / rejected_lengths.clamp(min=1),
        )

    def without_unlabelled(self) -> tuple[Pairs, Tensor | None]:
        """The same pairs, those with an answer without one labelled token taken out; and the mask of the rest.

        Log-probs and lengths of such a pair become a constant 0: no gradient flows into either answer.
        The mask (B,), bool, is True where both answers have a label; None if there are no lengths to tell.
        """
        if self.chosen_lengths is None or self.rejected_lengths is None:
            return self, None
        labelled = (self.chosen_lengths > 0) & (self.rejected_lengths > 0)
        kept = {
            field.name: None if values is None else torch.where(labelled, values, 0.0)
            for field in fields(self)
            for values in (getattr(self, field.name),)
        }
        return Pairs(**kept), labelled  # type: ignore[arg-type]
