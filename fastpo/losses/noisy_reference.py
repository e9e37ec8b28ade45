"""The reference's side of a DNPO step: log-probs of its answers with noise in the logits, and the penalty."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastpo.noise import NoiseGenerator
from fastpo.ops.arguments import kept_rows
from fastpo.ops.noisy_linear_logprobs import noisy_linear_logprobs
from fastpo.ops.sequence_logprobs import sequence_sums

PLAYERS = ("both", "model", "noise")
_SHARED_OPTIONS = set(inspect.signature(noisy_linear_logprobs).parameters) - {"ignore_index"}


@dataclass(frozen=True)
class NoisyReference:
    """Log-probs of S answers under a reference with noise in its logits, and without, from one pass.

    For :class:`fastpo.PreferenceLoss` these are the rejected answers of B pairs, S = B.
    """

    # Sums under noise and the penalty are differentiable in the generator's parameters.
    logps: Tensor  # (S,) float64, nats
    clean_logps: Tensor  # (S,) float64, without noise, detached
    penalty: Tensor  # () mean σ² over the scored tokens
    sigma_peak: Tensor  # () largest root mean square of σ of a vocabulary entry, detached
    hidden: Tensor  # (N, H) last hidden states of the scored tokens, detached
    weight: Tensor | float = 1.0  # of the penalty in the loss, see score_with_noise

    def second_half(self) -> NoisyReference:
        """The same for the second half of the answers alone."""
        return replace(self, logps=self.logps.chunk(2)[1], clean_logps=self.clean_logps.chunk(2)[1])

    def detach(self) -> NoisyReference:
        """Without the way back to the generator."""
        return replace(self, logps=self.logps.detach(), penalty=self.penalty.detach())


def score_with_noise(
    generator: NoiseGenerator,
    hidden: Tensor,  # (S, T, H) or packed (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (S, T) or (N,)
    bias: Tensor | None = None,  # (V,)
    *,
    seed: int,
    token_index: Tensor | None = None,  # shaped like labels
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    ignore_index: int = -100,
    mean_tokens: Tensor | float | None = None,
    **options: Any,
) -> NoisyReference:
    """Score S answers under noise; rows without a label cost nothing and count for nothing.

    Args:
        generator: the noise.
        hidden: the reference's last hidden states, of any floating dtype.
        weight, bias: its LM head.
        labels: int64, already shifted, ``ignore_index`` where no noise belongs.
        seed: of the noise, in [0, 2⁶⁴).
        token_index: int64, which token each position is, as the noise is to see it; None: its position in
            ``labels``.
        cu_seqlens: bounds of the S segments of a packed batch.
        mean_tokens: scored tokens of a call on average over the calls whose losses are averaged (micro-steps,
            ranks): the penalty enters this call's loss with weight N / ``mean_tokens``, so that the average is
            one mean over all their tokens. None: weight 1.
        options: of :func:`fastpo.linear_logprobs`; those that the noise has too are passed on.

    Raises:
        TypeError, ValueError: as that operation and the generator raise them.
    """
    generator.check_sizes(hidden, weight)
    flat = labels.reshape(-1)
    order, count = kept_rows(flat, ignore_index, weight.shape[0])
    rows = order[:count]
    kept = hidden.detach().reshape(-1, hidden.shape[-1])[rows]
    index = rows if token_index is None else token_index.reshape(-1)[rows]
    noisy, clean = (
        sequence_sums(
            logps.new_zeros(flat.shape).index_copy(0, rows, logps).view(labels.shape),
            labels,
            cu_seqlens=cu_seqlens,
            ignore_index=ignore_index,
        )[0]
        for logps in generator(
            kept, weight.detach(), flat[rows], seed=seed, token_index=index, return_clean=True,
            bias=None if bias is None else bias.detach(),
            **{name: value for name, value in options.items() if name in _SHARED_OPTIONS},
        )
    )  # fmt: skip
    share: Tensor | float = 1.0
    if mean_tokens is not None:  # where there are no tokens at all, the mean is 0 too
        share = count / mean_tokens if count else 0.0
    return NoisyReference(noisy, clean, *generator.penalty_and_peak(kept), kept, share)


def reversed_gradient(values: Tensor) -> Tensor:
    """``values``, whose gradient changes sign: what the generator raises where the policy lowers."""
    return 2 * values.detach() - values


def check_player(player: str) -> None:
    if player not in PLAYERS:
        raise ValueError(f"player: got {player!r}, expected one of {', '.join(PLAYERS)}")
