"""One problem that every rival solves: a workload as answers of preference pairs, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpo import PreferenceLoss

from . import reference
from .workloads import Workload

# Usual settings of each loss; a reference model's log-probs are part of the step of a loss that needs them.
LOSSES: dict[str, dict[str, Any]] = {
    "simpo": {"beta": 2.5, "simpo_gamma": 0.5},
    "dpo": {"beta": 0.1},
    "cpo": {"beta": 0.1},
    "orpo": {"beta": 0.1},
}
REFERENCE_NOISE = 0.05  # of the hidden states' deviation: the reference is near the policy


class Outcome(NamedTuple):
    """What one run of a rival gave; a figure that it does not offer is None."""

    logps: Tensor | None  # (N,)
    margins: Tensor | None  # (B,) log-prob of each chosen answer minus that of its rejected one
    # of hidden and, unless the head is frozen, weight; empty without a backward
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """N = 2B·length tokens: B chosen answers of ``length`` rows, then B rejected ones.

    With ``loss`` None the log-probs of the tokens and their gradients for the upstream ``coefficients`` are
    asked for, which have one value per pair as those of every preference loss, positive on chosen answers and
    negative on rejected ones; else the gradients of that loss.
    """

    workload: Workload
    length: int
    loss: str | None
    hidden: Tensor  # (N, H), a leaf that requires a gradient
    weight: Tensor  # (V, H), the same unless the head is frozen
    coefficients: Tensor  # (N,) float32
    ref_hidden: Tensor | None  # (N, H) of the reference model, which has the same head

    @classmethod
    def build(
        cls, workload: Workload, length: int, *, loss: str | None = None, frozen_head: bool = False
    ) -> Problem:
        """Raises ValueError if the tokens are not answers of ``length`` in pairs."""
        n = len(workload.labels)
        if n % (2 * length):
            raise ValueError(f"length: got {length} for {n} tokens, expected pairs of such answers")
        generator = torch.Generator().manual_seed(workload.seed)
        pairs = n // (2 * length)
        strength = 0.05 + 0.45 * torch.rand(pairs, generator=generator)
        coefficients = torch.cat([strength, -strength]).repeat_interleave(length)
        hidden = workload.hidden.detach()
        ref_hidden = None
        if loss == "dpo":
            noise = torch.Generator(hidden.device).manual_seed(workload.seed)
            ref_hidden = torch.randn(
                hidden.shape, generator=noise, device=hidden.device, dtype=hidden.dtype
            )
            ref_hidden = ref_hidden.mul_(REFERENCE_NOISE * hidden.float().std().item()).add_(hidden)
        return cls(
            workload=workload,
            length=length,
            loss=loss,
            hidden=hidden.requires_grad_(),
            weight=workload.weight.detach().requires_grad_(not frozen_head),
            coefficients=coefficients.to(hidden.device),
            ref_hidden=ref_hidden,
        )

    @property
    def labels(self) -> Tensor:
        """(N,) int64."""
        return self.workload.labels

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are asked for."""
        return tuple(t for t in (self.hidden, self.weight) if t.requires_grad)

    def answers(self, tokens: Tensor) -> Tensor:
        """(N, …) → (2B, length, …)."""
        return tokens.view(-1, self.length, *tokens.shape[1:])

    def preference_loss(self, backward: str = "exact") -> PreferenceLoss:
        """fastpo's module for the loss of this problem."""
        if self.loss is None:
            raise ValueError("loss: got None, expected a problem with a loss")
        return PreferenceLoss(self.loss, backward=backward, return_stats=False, **LOSSES[self.loss])

    def truth(self, ones: bool = False) -> reference.Truth:
        """Float64 log-probs and gradients; with ``ones`` for the upstream 1 on every labelled token."""
        return reference.truth(
            self.hidden,
            self.weight,
            self.labels,
            torch.ones_like if ones else self._upstream,
        )

    def _upstream(self, logps: Tensor) -> Tensor:
        if self.loss is None:
            return self.coefficients
        ref_logps = None
        if self.ref_hidden is not None:
            tokens = reference.token_logps(self.ref_hidden, self.weight, self.labels)
            ref_logps = self.answers(tokens).sum(1)
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = (
                self.preference_loss()
                .from_token_logps(
                    self.answers(leaf), self.answers(self.labels), ref_logps=ref_logps
                )
                .loss
            )
        return torch.autograd.grad(loss, leaf)[0]
