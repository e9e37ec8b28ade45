"""Losses with a separate term for each answer.

β > 0; ρ = log π(y) − log π_ref(y) is an answer's log-ratio, in nats, ρ_w the chosen one's, ρ_l the rejected
one's. Every function returns one loss per pair, (B,) float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

from .across_ranks import mean_over_ranks
from .pairs import Pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def nca_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA: −log σ(βρ_w) − ½ log σ(−βρ_w) − ½ log σ(−βρ_l).

    Chen et al. 2024, arXiv 2402.05369, Sec. 4.1. TRL: ``nca_pair``.
    """
    chosen, rejected = (beta * ratios for ratios in pairs.logratios)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """BCO for pairs: −log σ(βρ_w) − log σ(−βρ_l), without the paper's reward shift, which TRL 1.16 has
    dropped.

    Jung et al. 2024, arXiv 2404.04656, Sec. 4. TRL: ``bco_pair``.
    """
    chosen, rejected = (beta * ratios for ratios in pairs.logratios)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO with hard labels: (ρ_w − 1/(2β))² + (ρ_l + 1/(2β))².

    Wu et al. 2024, arXiv 2405.00675, Eq. 4.7 with P = 1 for the winner and 0 for the loser. TRL:
    ``sppo_hard``.
    """
    chosen, rejected = pairs.logratios
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero: σ(−βρ_w) + σ(βρ_l): raises the chosen answer, lowers the rejected one.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7. TRL: ``apo_zero``.
    """
    chosen, rejected = pairs.logratios
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down: σ(βρ_w) + σ(−β(ρ_w − ρ_l)): lowers both, the rejected answer more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8. TRL: ``apo_down``.
    """
    return (beta * pairs.logratios.chosen).sigmoid() + (-beta * pairs.logratios.gap).sigmoid()


def sft(pairs: Pairs, *, group: ProcessGroup | None = None) -> Tensor:
    """Negative log-likelihood of the chosen answers, per token: −log π(y_w) / (mean of |y_w| over the batch).

    The mean over pairs is then the mean over all chosen tokens of the batch, on every rank of ``group``,
    which is how TRL's ``sft`` and the SFT terms of its CPO and ORPO are normalised (ORPO's there also covers
    the prompt).
    """
    tokens_per_answer = mean_over_ranks(pairs.lengths.chosen.mean(), group)
    # No labelled token at all: every sum is 0, and any divisor keeps it so.
    return -pairs.chosen_logps / tokens_per_answer.masked_fill(tokens_per_answer == 0, 1.0)
