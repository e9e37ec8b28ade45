"""What a preference loss returns, and its metrics under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpo.ops.linear_logprobs import TokenStats


@dataclass
class PreferenceOutput:
    """Result of :class:`fastpo.PreferenceLoss` for B pairs; rewards, γ, token means and ``noise`` are detached.

    ``loss`` is the mean of ``losses`` plus the weighted SFT term; with noise it is that of the players whose
    turn it is, see :class:`fastpo.PreferenceLoss`. Rewards never have noise in them.
    """

    loss: Tensor  # ()
    losses: Tensor  # (B,)
    chosen_logps: Tensor  # (B,) sums over the labelled tokens, nats
    rejected_logps: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    gamma: Tensor | None  # (B,) target margins; None without a dynamic margin
    nll_loss: (
        Tensor | None
    )  # () SFT term before its weight, nats per chosen token; None if the weight is 0
    num_tokens: Tensor | None  # () labelled tokens; None if the lengths are not known
    token_means: dict[str, Tensor] = field(
        default_factory=dict
    )  # metric name → (), from TokenStats
    noise: dict[str, Tensor] = field(default_factory=dict)  # metric name → (); empty without noise

    def metrics(self) -> dict[str, float]:
        """This batch's metrics as Python floats, in one transfer to the host.

        Means over pairs: ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``,
        ``rewards/accuracies`` (share of pairs with chosen > rejected), ``logps/chosen``, ``logps/rejected``
        (sums per answer, nats). With a dynamic margin ``gamma/mean``, ``gamma/std``, ``gamma/min``,
        ``gamma/max``; with an SFT term ``nll_loss``.
        With noise ``loss/model`` (ℓ and the SFT term), ``loss/noise`` (−ℓ + α·mean σ²), ``noise/penalty`` (mean
        σ²), ``noise/sigma_mean`` (its root, the root mean square of σ, in units of logits),
        ``noise/sigma_peak`` (the largest root mean square of a vocabulary entry) and ``noise/margin_shift``
        (how much larger the noise made the reward margin, mean over pairs).
        Where token statistics were computed, means over labelled tokens: ``entropy`` (nats),
        ``logits/chosen``, ``logits/rejected`` (mean logit), and ``mean_token_accuracy`` (of the chosen
        answers). ``num_tokens`` counts the labelled tokens of this batch; TRL's is a running total of all
        input tokens.
        """
        values = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/margins": (self.chosen_rewards - self.rejected_rewards).mean(),
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).double().mean(),
            "logps/chosen": self.chosen_logps.detach().mean(),
            "logps/rejected": self.rejected_logps.detach().mean(),
            **self.token_means,
            **self.noise,
        }
        if self.num_tokens is not None:
            values["num_tokens"] = self.num_tokens
        if self.nll_loss is not None:
            values["nll_loss"] = self.nll_loss.detach()
        if self.gamma is not None:
            values["gamma/mean"] = self.gamma.mean()
            values["gamma/std"] = self.gamma.std(correction=0)
            values["gamma/min"] = self.gamma.min()
            values["gamma/max"] = self.gamma.max()
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))


def token_means(
    stats: TokenStats,
    chosen: Tensor,  # bool, shaped like the stats: labelled tokens of chosen answers
    rejected: Tensor,
) -> dict[str, Tensor]:
    """Token-weighted means of ``stats`` under TRL's metric names; 0 where there is no token."""

    def mean(values: Tensor, mask: Tensor) -> Tensor:
        total = torch.where(mask, values, 0).sum(dtype=torch.float64)
        return total / mask.sum().clamp(min=1)

    return {
        "logits/chosen": mean(stats.logit_mean, chosen),
        "logits/rejected": mean(stats.logit_mean, rejected),
        "entropy": mean(stats.entropy, chosen | rejected),
        "mean_token_accuracy": mean(stats.top1, chosen),
    }
