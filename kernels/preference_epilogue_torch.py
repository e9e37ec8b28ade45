"""Preference epilogue in PyTorch: token log-probs → sums → gaps → γ → losses and their derivatives.

For B pairs, answers y = (chosen w, rejected l), logp their summed log-probs minus, where the loss has one,
the reference's:

    gap       g = c_w logp_w − c_l logp_l              c = β, or β/|y| for averaged losses
    argument  t = g − (γ − centre) − β α (|w| − |l|)   centre 0 for simpo, else γ0; γ = γ0 without margins
    loss      right·φ(t) + wrong·φ(−t)                 logistic φ(t) = log(1 + e^−t)
              max(0, 1 − t)                            hinge
              ((t − 1/2)/β)²                           squared (ipo)

and d loss/d token log-prob is ±c·d loss/dt on every labelled token of the answer: one coefficient per
sequence. A loss is one ``PairLoss``, so neither implementation branches on names. Shapes: tokens (2B, T), or
(N,) with cu_seqlens (2B + 1,); chosen answers first. Everything is float64 until the results are rounded to
float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .margins_torch import exact_margins


class PairLoss(NamedTuple):
    """A loss that sees a pair through one number t; see the top of this file."""

    link: Literal["logistic", "hinge", "squared"] = "logistic"
    reference: bool = True  # log-probs count relative to the reference's
    averaged: bool = False  # and per token
    centred: bool = True  # the target is γ − γ0, not γ
    right: float = 1.0
    wrong: float = 0.0
    length_penalty: float = 0.0  # α, nats per token


# The losses that this epilogue computes, without smoothing.
PAIR_LOSSES = {
    "dpo": PairLoss(),
    "sigmoid": PairLoss(),
    "robust": PairLoss(),
    "rdpo": PairLoss(),
    "spin": PairLoss(),
    "cpo": PairLoss(reference=False),
    "simpo": PairLoss(reference=False, averaged=True, centred=False),
    "hinge": PairLoss("hinge"),
    "ipo": PairLoss("squared", averaged=True),
    "sigmoid_norm": PairLoss(averaged=True),
}


def pair_loss(name: str, *, label_smoothing: float = 0.0, rdpo_alpha: float = 0.05) -> PairLoss:
    """The loss of that name with label smoothing ε in [0, 1/2) (``hinge`` and ``ipo`` have none) and rdpo's α.

    Raises:
        ValueError: a loss that is not in ``PAIR_LOSSES``.
    """
    if name not in PAIR_LOSSES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(PAIR_LOSSES)}")
    loss = PAIR_LOSSES[name]
    right, wrong = 1 - label_smoothing, label_smoothing
    if name == "robust":  # unbiased under flips: what smoothing adds is taken away
        right, wrong = right / (1 - 2 * label_smoothing), -wrong / (1 - 2 * label_smoothing)
    return loss._replace(
        right=right,
        wrong=wrong,
        length_penalty=rdpo_alpha if name == "rdpo" else loss.length_penalty,
    )


class EpilogueResult(NamedTuple):
    """Results for B pairs; nothing carries a gradient. float32 but for the lengths."""

    losses: Tensor  # (B,)
    logps: Tensor  # (2B,) summed over the labelled tokens, nats, without the reference
    lengths: Tensor  # (2B,) int64, labelled tokens
    gaps: Tensor  # (B,) what γ is solved on
    gamma: Tensor | None  # (B,); None for a fixed margin
    coefficients: (
        Tensor  # (2B,) d loss of the pair / d log-prob of each labelled token of the sequence
    )


def preference_epilogue(
    token_logps: Tensor,  # (2B, T) or (N,)
    labels: Tensor,  # same shape, int64
    loss: PairLoss,
    *,
    beta: float,
    gamma0: float = 0.0,
    tau: float | None = None,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    ref_logps: Tensor | None = None,  # (2B,)
    extra_gaps: Tensor | None = None,  # (E,)
    ignore_index: int = -100,
) -> EpilogueResult:
    """Losses of B pairs and their derivatives by the token log-probs.

    Args:
        token_logps: nats; rows or segments 0…B−1 chosen, B…2B−1 rejected.
        labels: tokens labelled ``ignore_index`` count for nothing.
        loss: what is computed, see :func:`pair_loss`.
        beta: β > 0.
        gamma0: mean target margin γ0 ≥ 0.
        tau: τ > 0 of dynamic margins, solved exactly; None: every margin is γ0.
        cu_seqlens: int32 or int64 bounds of the segments of a packed batch.
        ref_logps: the reference's summed log-probs, used by losses with ``reference``.
        extra_gaps: gaps that γ is solved together with (:meth:`fastpo.DynamicMargin.context`).
        ignore_index: see ``labels``.

    A pair with an answer that has no labelled token has gap, loss and coefficients 0.

    Raises:
        ValueError: the loss needs a reference and ``ref_logps`` is None, or shapes that do not fit.
    """
    check(token_logps, labels, loss, cu_seqlens, ref_logps)
    logps, lengths = _sequence_sums(token_logps, labels, cu_seqlens, ignore_index)
    pairs = logps.numel() // 2
    labelled = (lengths[:pairs] > 0) & (lengths[pairs:] > 0)
    counts = lengths.double()
    factors = beta / counts.clamp(min=1) if loss.averaged else torch.full_like(logps, beta)
    scores = factors * (logps if not loss.reference or ref_logps is None else logps - ref_logps)
    gaps = torch.where(labelled, scores[:pairs] - scores[pairs:], 0.0)
    gamma = None
    if tau is not None:
        known = gaps if extra_gaps is None else torch.cat([gaps, extra_gaps.to(gaps.dtype)])
        gamma = exact_margins(known, gamma0, tau)[:pairs]
    target = (gamma0 if gamma is None else gamma) - (gamma0 if loss.centred else 0.0)
    t = gaps - target - beta * loss.length_penalty * (counts[:pairs] - counts[pairs:])
    if loss.link == "logistic":
        losses = loss.right * softplus(-t) + loss.wrong * softplus(t)
        slopes = loss.wrong * torch.sigmoid(t) - loss.right * torch.sigmoid(-t)
    elif loss.link == "hinge":
        losses = torch.relu(1 - t)
        slopes = -(t < 1).double()
    else:
        losses = ((t - 0.5) / beta).square()
        slopes = 2 * (t - 0.5) / beta**2
    slopes = torch.where(labelled, slopes, 0.0)
    return EpilogueResult(
        losses=torch.where(labelled, losses, 0.0).float(),
        logps=logps.float(),
        lengths=lengths,
        gaps=gaps.float(),
        gamma=None if gamma is None else gamma.float(),
        coefficients=(factors * torch.cat([slopes, -slopes])).float(),
    )


def expand_to_tokens(
    per_sequence: Tensor,  # (2B,)
    labels: Tensor,  # (2B, T) or (N,)
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:  # like labels
    """Each sequence's number on its labelled tokens, 0 elsewhere: coefficients become a token gradient."""
    if cu_seqlens is None:
        spread = per_sequence.unsqueeze(1).expand(labels.shape)
    else:
        spread = torch.cat([per_sequence, per_sequence.new_zeros(1)])[_segments(labels, cu_seqlens)]
    return torch.where(labels != ignore_index, spread, 0.0)


def check(
    token_logps: Tensor,
    labels: Tensor,
    loss: PairLoss,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of ``preference_epilogue`` fit together."""
    dims, layout = (
        (2, "(2B, T) without cu_seqlens") if cu_seqlens is None else (1, "(N,) with cu_seqlens")
    )
    if token_logps.dim() != dims or labels.shape != token_logps.shape:
        raise ValueError(
            f"token_logps, labels: got shapes {tuple(token_logps.shape)} and {tuple(labels.shape)}, "
            f"expected {layout} for both"
        )
    name = "token_logps" if cu_seqlens is None else "cu_seqlens"
    sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if sequences < 2 or sequences % 2:
        raise ValueError(f"{name}: got {sequences} sequences, expected an even number ≥ 2")
    if loss.reference and ref_logps is None:
        raise ValueError(
            f"ref_logps: got None, expected ({sequences},) for a loss with a reference"
        )
    if ref_logps is not None and ref_logps.shape != (sequences,):
        raise ValueError(f"ref_logps: got shape {tuple(ref_logps.shape)}, expected ({sequences},)")
    for name, tensor in (("labels", labels), ("cu_seqlens", cu_seqlens), ("ref_logps", ref_logps)):
        if tensor is not None and tensor.device != token_logps.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected that of token_logps, {token_logps.device}"
            )


def _sequence_sums(
    token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    kept = labels != ignore_index
    values = torch.where(kept, token_logps.double(), 0.0)
    if cu_seqlens is None:
        return values.sum(dim=1), kept.sum(dim=1)
    segment = _segments(labels, cu_seqlens)
    count = cu_seqlens.numel()  # of segments and, last, of what lies past them
    sums = values.new_zeros(count).index_add(0, segment, values)
    lengths = segment.new_zeros(count).index_add(0, segment, kept.long())
    return sums[:-1], lengths[:-1]


def _segments(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The segment of every token, (N,)."""
    position = torch.arange(labels.numel(), device=labels.device)
    return torch.bucketize(position, cu_seqlens[1:].long(), right=True)
