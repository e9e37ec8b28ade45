"""Losses of the gap between the two answers of a pair.

β > 0; Δ = [log π(y_w) − log π_ref(y_w)] − [log π(y_l) − log π_ref(y_l)], in nats; Δ̄ the same with every
bracket divided by its answer's length. m is the margin that the registry hands over: γ for SimPO (γ0 if it is
fixed), γ − γ0 for the others (0 without a dynamic margin). Every function returns one loss per pair, (B,)
float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .pairs import Pairs


def smoothed_logistic(argument: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x): the logistic loss when a share ε of the labels is flipped (cDPO)."""
    loss = -(1 - label_smoothing) * logsigmoid(argument)
    return loss - label_smoothing * logsigmoid(-argument) if label_smoothing else loss


def dpo(pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float) -> Tensor:
    """DPO: −log σ(βΔ − m), smoothed by ε (cDPO).

    Rafailov et al. 2023, arXiv 2305.18290, Eq. 7; smoothing: Mitchell 2023. TRL: ``sigmoid``, without ε.
    """
    return smoothed_logistic(beta * pairs.logratios.gap - margin, label_smoothing)


def spin(pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float) -> Tensor:
    """SPIN: ℓ(λΔ − m) with ℓ(t) = log(1 + e^−t), λ = β; chosen is the human answer, rejected the model's own.

    Chen et al. 2024, arXiv 2401.01335, Eq. 4.7. As a function of log-probs this is DPO.
    """
    return dpo(pairs, beta=beta, label_smoothing=label_smoothing, margin=margin)


def rdpo(
    pairs: Pairs,
    *,
    beta: float,
    label_smoothing: float,
    margin: Tensor | float,
    rdpo_alpha: float = 0.05,
) -> Tensor:
    """R-DPO: −log σ(β(Δ − α(|y_w| − |y_l|)) − m), smoothed by ε; α in nats per token of extra length.

    Park et al. 2024, arXiv 2403.19159, with α multiplied by β as in the γ-PO authors' code.
    """
    extra_length = pairs.lengths.gap
    return smoothed_logistic(
        beta * (pairs.logratios.gap - rdpo_alpha * extra_length) - margin, label_smoothing
    )


def sigmoid_norm(
    pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float
) -> Tensor:
    """Length-normalised DPO: −log σ(β Δ̄ − m), smoothed by ε; Δ̄ the difference of per-token log-ratios.

    Lambert et al. 2024 (Tülu 3), arXiv 2411.15124. TRL: ``sigmoid_norm``.
    """
    return smoothed_logistic(beta * pairs.mean_logratios.gap - margin, label_smoothing)


def simpo(pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float) -> Tensor:
    """SimPO: −log σ(β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ), smoothed by ε.

    Meng et al. 2024, arXiv 2405.14734, Eq. 6; γ per pair: Sun et al. 2025, arXiv 2506.03690.
    TRL: ``simpo`` of its CPO.
    """
    return smoothed_logistic(beta * pairs.mean_logps.gap - margin, label_smoothing)


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float) -> Tensor:
    """CPO: −log σ(β log π(y_w) − β log π(y_l) − m), smoothed by ε; its SFT term has weight 1.

    Xu et al. 2024, arXiv 2401.08417, Eq. 3. TRL: ``sigmoid`` of its CPO.
    """
    return smoothed_logistic(beta * pairs.logps.gap - margin, label_smoothing)


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """ORPO's odds-ratio term: −β log σ(logit p_w − logit p_l), p = exp(log π(y)/|y|).

    Hong et al. 2024, arXiv 2403.07691, Eq. 6 and 7; β is the paper's λ, and the SFT term has weight 1.
    """

    def log_odds(mean_logp: Tensor) -> Tensor:
        # p = 1 has infinite odds and a 0·∞ in its gradient: p stops one float32 step below 1.
        mean_logp = mean_logp.clamp(max=-torch.finfo(torch.float32).eps)
        return mean_logp - torch.log(-torch.expm1(mean_logp))

    chosen, rejected = pairs.mean_logps
    return -beta * logsigmoid(log_odds(chosen) - log_odds(rejected))


def robust(pairs: Pairs, *, beta: float, label_smoothing: float, margin: Tensor | float) -> Tensor:
    """Robust DPO: [−(1−ε) log σ(βΔ − m) + ε log σ(−βΔ + m)] / (1 − 2ε), ε < 1/2 the rate of flipped labels.

    Chowdhury et al. 2024, arXiv 2403.00409, Sec. 3.1. TRL: ``robust``.
    """
    argument = beta * pairs.logratios.gap - margin
    clean, flipped = -logsigmoid(argument), -logsigmoid(-argument)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO: KL(q ‖ p) with q = (σ(βΔ), σ(−βΔ)) and p = (1−ε, ε); ε > 0.

    Ji et al. 2024, arXiv 2402.00856, Eq. 16 with K = 2. TRL: ``exo_pair``.
    """
    argument = beta * pairs.logratios.gap
    chosen = argument.sigmoid() * (logsigmoid(argument) - math.log1p(-label_smoothing))
    rejected = (-argument).sigmoid() * (logsigmoid(-argument) - math.log(label_smoothing))
    return chosen + rejected


def discopop(pairs: Pairs, *, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP's log-ratio modulated loss: −(1 − w) log σ(x) + w e^−x, x = βΔ, w = σ(x/τ).

    Lu et al. 2024, arXiv 2406.08414, Eq. 5. TRL: ``discopop``, which is NaN for x ≪ 0 (there e^−x overflows
    while w underflows; their product is formed in the exponent here).

    Raises:
        ValueError: τ ≤ 0.
    """
    if not discopop_tau > 0:
        raise ValueError(f"discopop_tau: got {discopop_tau}, expected a number > 0")
    argument = beta * pairs.logratios.gap
    modulation = argument / discopop_tau
    exponential = torch.exp(logsigmoid(modulation) - argument)
    return exponential - (-modulation).sigmoid() * logsigmoid(argument)


def hinge(pairs: Pairs, *, beta: float, margin: Tensor | float) -> Tensor:
    """Hinge: max(0, 1 − (βΔ − m)).

    Zhao et al. 2023 (SLiC), arXiv 2305.10425, Sec. 2; with a reference: Liu et al. 2024 (RSO),
    arXiv 2309.06657. TRL: ``hinge``.
    """
    return torch.relu(1 - (beta * pairs.logratios.gap - margin))


def ipo(pairs: Pairs, *, beta: float, margin: Tensor | float) -> Tensor:
    """IPO: (Δ̄ − m/β − 1/(2β))², Δ̄ the difference of per-token log-ratios; β is the paper's τ.

    Azar et al. 2023, arXiv 2310.12036, Eq. 17, length-normalised as in TRL's ``ipo``.
    """
    return (pairs.mean_logratios.gap - margin / beta - 1 / (2 * beta)).square()
