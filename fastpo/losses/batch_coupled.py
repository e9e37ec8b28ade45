"""Losses in which the pairs of a batch see each other.

The batch is that of one micro-step over all ranks of ``group`` (None: this process alone). Gradient
accumulation therefore changes these losses, as it does in their authors' code. β > 0; ρ = log π(y) − log
π_ref(y) is an answer's log-ratio in nats, Δ = ρ_w − ρ_l. Every function returns B numbers, (B,) float64,
whose mean is this rank's loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .across_ranks import gather_pairs, own_part
from .pairs import Pairs
from .pairwise import smoothed_logistic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _sorted_gap(upper: Tensor, lower: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's part of sort(upper) − sort(lower), sorted over the pairs of all ranks."""
    upper, lower = gather_pairs(upper, group), gather_pairs(lower, group)
    return own_part(upper.sort().values - lower.sort().values, group)


def aot(
    pairs: Pairs, *, beta: float, label_smoothing: float, group: ProcessGroup | None = None
) -> Tensor:
    """AOT, paired: −log σ(β(a₍ᵢ₎ − b₍ᵢ₎)), smoothed by ε; a, b the sorted policy and reference log-prob gaps.

    Melnyk et al. 2024, arXiv 2406.05882, Sec. 3: stochastic dominance of the policy's gaps over the
    reference's. The i-th number belongs to the i-th smallest gaps, not to the i-th pair. TRL: ``aot``.
    """
    assert pairs.ref_chosen_logps is not None
    assert pairs.ref_rejected_logps is not None
    reference_gap = pairs.ref_chosen_logps - pairs.ref_rejected_logps
    return smoothed_logistic(
        beta * _sorted_gap(pairs.logps.gap, reference_gap, group), label_smoothing
    )


def aot_unpaired(
    pairs: Pairs, *, beta: float, label_smoothing: float, group: ProcessGroup | None = None
) -> Tensor:
    """AOT, unpaired: −log σ(β(a₍ᵢ₎ − b₍ᵢ₎)), smoothed by ε; a, b the sorted chosen and rejected log-ratios.

    Melnyk et al. 2024, arXiv 2406.05882, Sec. 3. TRL: ``aot_unpaired``.
    """
    return smoothed_logistic(beta * _sorted_gap(*pairs.logratios, group), label_smoothing)


def kto_pair(pairs: Pairs, *, beta: float, group: ProcessGroup | None = None) -> Tensor:
    """KTO for pairs: ½[1 − σ(β(ρ_w − KL_l))] + ½[1 − σ(β(KL_w − ρ_l))], KL_• = max(0, batch mean of ρ_•).

    Ethayarajh et al. 2024, arXiv 2402.01306, in the pair form of the γ-PO authors' code: the KL of one
    half is estimated from the other, and gradients flow through it. Their mean over 2B terms is ours over B.
    """
    chosen, rejected = pairs.logratios
    chosen_kl, rejected_kl = (
        gather_pairs(ratios, group).mean().clamp(min=0) for ratios in (chosen, rejected)
    )
    return 0.5 * (
        (-beta * (chosen - rejected_kl)).sigmoid() + (-beta * (chosen_kl - rejected)).sigmoid()
    )


class BetaDPO(nn.Module):
    """β-DPO: −log σ(β'Δ), smoothed by ε, with one β' per batch that follows its gaps g = βΔ.

        β' = max(1e-3, β(1 + a(mean of the sampled g − m)))

    m and s are exponential averages of the gaps' mean and standard deviation (momentum 0.9, from 0 and 1,
    updated after the loss); of the batch's gaps, 80 % are sampled without replacement with weights exp(−(g −
    m)²/2s²). Wu et al. 2024, arXiv 2407.08639, Sec. 4, in the form of the γ-PO authors' code: every pair
    keeps its loss, the sample decides β' alone. No gradient flows through β'.

    Args:
        a: strength of the adaptation, the paper's α.
        momentum: of m and s.
        sample_fraction: share of the gaps that decides β', in (0, 1].
        seed: of the sampling, the same on all ranks.

    m, s and the state of the random generator are in ``state_dict()``, tensors all. In evaluation mode
    nothing of this state changes.
    """

    gap_mean: Tensor
    gap_std: Tensor

    def __init__(
        self,
        *,
        a: float = 0.6,
        momentum: float = 0.9,
        sample_fraction: float = 0.8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: got {momentum}, expected a number in [0, 1)")
        if not 0 < sample_fraction <= 1:
            raise ValueError(f"sample_fraction: got {sample_fraction}, expected a number in (0, 1]")
        self.a = a
        self.momentum = momentum
        self.sample_fraction = sample_fraction
        self.register_buffer("gap_mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("gap_std", torch.ones((), dtype=torch.float64))
        self._generator = torch.Generator().manual_seed(seed)

    def forward(
        self,
        pairs: Pairs,
        *,
        beta: float,
        label_smoothing: float,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Losses of this rank's pairs, (B,) float64."""
        gap = pairs.logratios.gap
        gaps = gather_pairs(beta * gap.detach(), group)
        self.to(gaps.device, gaps.dtype)  # float64, whatever the module was cast to
        deviation = gaps[self._sample(gaps)].mean() - self.gap_mean
        beta_used = (beta * (1 + self.a * deviation)).clamp(min=1e-3)
        if self.training:
            self._update(gaps)
        return smoothed_logistic(beta_used * gap, label_smoothing)

    def _sample(self, gaps: Tensor) -> Tensor:
        """Indices of the sampled gaps: the largest log weight + Gumbel noise, where no weight underflows."""
        generator = self._generator if self.training else self._generator.clone_state()
        uniform = torch.rand(gaps.shape, generator=generator, dtype=gaps.dtype)
        uniform = uniform.to(gaps.device, non_blocking=True)
        log_weight = -0.5 * ((gaps - self.gap_mean) / (self.gap_std + 1e-10)).square()
        count = max(1, int(gaps.numel() * self.sample_fraction))
        return (log_weight - torch.log(-torch.log(uniform))).topk(count).indices

    def _update(self, gaps: Tensor) -> None:
        self.gap_mean = torch.lerp(gaps.mean(), self.gap_mean, self.momentum)
        if gaps.numel() > 1:  # one gap has no deviation
            self.gap_std = torch.lerp(gaps.std(), self.gap_std, self.momentum)

    def get_extra_state(self) -> Tensor:
        return self._generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._generator.set_state(state.cpu())
