"""Log-probs and gradients in float64 of the same inputs: what all rivals are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 32}


class Truth(NamedTuple):
    """Of N tokens, in float64; tokens without a label have log-prob 0."""

    logps: Tensor  # (N,)
    hidden_grad: Tensor  # (N, H)
    weight_grad: Tensor  # (V, H)


@torch.no_grad()
def truth(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    coefficients: Callable[[Tensor], Tensor],
) -> Truth:
    """Float64 log-probs, and gradients for the upstream ``coefficients(logps)``: (N,) → (N,)."""
    hidden_grad = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    weight_grad = torch.zeros(weight.shape, dtype=torch.float64, device=hidden.device)
    head = weight.detach().double()
    found = token_logps(hidden, weight, labels)
    upstream = coefficients(found).double()
    for at, z, total, _ in _chunks(hidden, head, labels):
        c = upstream[at].unsqueeze(1)
        dz = z.sub_(total.unsqueeze(1)).exp_().mul_(-c)
        dz.scatter_add_(1, labels[at].unsqueeze(1), c)
        hidden_grad[at] = dz @ head
        weight_grad.addmm_(dz.t(), hidden.detach()[at].double())
    return Truth(found, hidden_grad, weight_grad)


@torch.no_grad()
def token_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Float64 log-probs (N,)."""
    found = torch.zeros(len(labels), dtype=torch.float64, device=hidden.device)
    for at, _, total, picked in _chunks(hidden, weight.detach().double(), labels):
        found[at] = picked - total
    return found


def _chunks(
    hidden: Tensor, head: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of successive labelled rows: their places, their logits, these' log-sum-exp, and the label's logit."""
    rows = max(1, CHUNK_BYTES[hidden.device.type] // (8 * len(head)))
    for at in (labels != -100).nonzero().squeeze(1).split(rows):
        z = hidden.detach()[at].double() @ head.t()
        yield at, z, z.logsumexp(1), z.gather(1, labels[at].unsqueeze(1)).squeeze(1)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖₂ / ‖expected‖₂."""
    return float((value.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def margins(logps: Tensor, length: int) -> Tensor:
    """Log-prob of each pair's chosen answer minus that of its rejected one, (B,), nats.

    ``logps`` (N,) are those of 2B answers of ``length`` tokens, the chosen ones first.
    """
    chosen, rejected = logps.double().view(-1, length).sum(1).chunk(2)
    return chosen - rejected
