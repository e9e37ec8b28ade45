"""Target margins γ of γ-PO in PyTorch: the authors' mirror descent and an exact solver, both in float64.

For n reward gaps g, mean target γ0 and temperature τ (Sun et al. 2025, arXiv 2506.03690), with q_i = γ_i/γ0:

    minimise over q ≥ 0, Σ q = n:    (1/n) Σ softplus(γ0 q_i − g_i)  +  (τ/n) Σ q_i log q_i

The exact solver works on u = log q, a = γ0/τ and s = λ/τ − 1, λ the multiplier of Σ q = n. Stationarity is
then

    r(u_i) = u_i − s + a σ(γ0 exp(u_i) − g_i) = 0,        S(s) = log((1/n) Σ exp(u_i(s))) = 0

r rises in u with slope 1 + K, K = a σ' γ0 q, so u_i lies in [s − a, s]; S rises in s. Both are solved by
Newton iterations inside brackets. Each u_i(s) starts afresh from a point that knows where the sigmoid's step
is, which makes a wrong turn of the outer solve harmless and lets the Triton twin (``margins_triton``) keep
nothing per gap. O(n) memory. On a CPU the iterations stop when they have settled; elsewhere their number is
fixed, as looking would wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Enough for γ0 from 1e-3 to 1e6, τ from 1e-3 to 1e6 and gaps of ±1e4, where 12 and 8 were seen to be needed.
OUTER_STEPS = 16
INNER_STEPS = 10
SETTLED = (
    64 * torch.finfo(torch.float64).eps
)  # relative size of a last step; its error is that squared
# Logits of s/a beyond which s and s − a no longer move anything in float64: where a bisection of s may end.
LEAST_LOGIT, LARGEST_LOGIT = -60.0, 40.0


def mirror_margins(
    gaps: Tensor,  # (n,) float64
    gamma0: float,
    tau: float,
    steps: int = 20,
) -> Tensor:  # (n,) float64
    """``steps`` of exponentiated gradient from p uniform, γ = γ0 n p, as in the authors' code.

    Gradient τ(1 + log(n(p + 1e-10))) + γ0 σ(γ − g), step size min(0.5/τ, 1). Not converged for small τ.
    """
    n = gaps.numel()
    rate = min(0.5 / tau, 1.0)
    # p is kept as a logarithm up to a constant: exp(−rate·gradient) underflows for large γ0.
    log_p = torch.zeros_like(gaps)
    p = torch.full_like(gaps, 1 / max(n, 1))
    for _ in range(steps):
        gradient = tau * (1 + torch.log(n * (p + 1e-10))) + gamma0 * torch.sigmoid(
            gamma0 * n * p - gaps
        )
        log_p = log_p - rate * gradient
        p = torch.softmax(log_p, dim=0)
    return gamma0 * n * p


def exact_margins(
    gaps: Tensor,  # (n,) float64
    gamma0: float,
    tau: float,
) -> Tensor:  # (n,) float64
    """The minimiser, with mean(γ) = γ0; NaN everywhere if a gap is NaN."""
    if gamma0 == 0 or gaps.numel() == 0:
        return torch.zeros_like(gaps)
    n, a, may_look = gaps.numel(), gamma0 / tau, gaps.device.type == "cpu"
    least, largest = torch.aminmax(gaps)
    # q rises with g, so q ≥ 1 at the largest gap, q ≤ 1 at the least, and no q exceeds n.
    low = a * torch.sigmoid(gamma0 - largest)
    high = torch.minimum(
        a * torch.sigmoid(gamma0 - least),
        math.log(n) + a * torch.sigmoid(gamma0 * n - largest),
    )
    s = torch.clamp(a * torch.sigmoid(gamma0 - gaps).mean(), low, high)  # exact where all q = 1
    for step in range(OUTER_STEPS + 1):
        q, slope = _shares(gaps, s, gamma0, a)
        mean = q.mean()
        yielding = (q * slope).mean()  # d mean/ds
        excess = torch.log(mean)
        low = torch.where(excess <= 0, s, low)
        high = torch.where(excess >= 0, s, high)
        pull = yielding / mean  # dS/ds
        # Where most pairs sit on the sigmoid's step, q follows the logit of s/a and not s.
        logit_step = a * torch.sigmoid(_logit(s, a) - excess * a / (pull * s * (a - s)))
        newton = torch.where(pull < 0.5, logit_step, s - excess / pull)
        middle = torch.clamp(a * torch.sigmoid((_logit(low, a) + _logit(high, a)) / 2), low, high)
        after = torch.where((newton >= low) & (newton <= high), newton, middle)
        if step == OUTER_STEPS or (may_look and bool((after - s).abs() <= SETTLED * s)):
            break
        s = after
    # One more Newton step, in q: what is left of Σ q = n goes where q yields, not to pairs that are held.
    q = q + q * slope * ((1 - mean) / yielding)
    return q * (gamma0 / q.mean())


def _shares(gaps: Tensor, s: Tensor, gamma0: float, a: float) -> tuple[Tensor, Tensor]:
    """q(s) and d log q/ds = 1/(1 + K), per gap."""
    may_look = gaps.device.type == "cpu"
    low, high = (s - a).expand_as(gaps), s.expand_as(gaps)
    u = torch.clamp(torch.log(gaps.clamp(min=1.0) / gamma0), low, high)  # the step is at γ0 q = g
    for _ in range(INNER_STEPS):
        raised = gamma0 * torch.exp(u)  # γ0 q
        x = raised - gaps
        sigmoid = torch.sigmoid(x)
        residual = u - s + a * sigmoid
        low = torch.where(residual <= 0, u, low)
        high = torch.where(residual >= 0, u, high)
        # r = 0 also reads R = x − logit(y/a) = 0, y = s − u. Where the sigmoid steps, R is a line and r is
        # not, and elsewhere the other way round; R' = γ0 q + a/(y (a − y)) against r' = 1 + K tells which
        # place this is.
        y = s - u
        area = y * (a - y)
        on_step = area * raised > a
        height = torch.where(on_step, area * (x - torch.log(y / (a - y))), residual)
        slope = torch.where(on_step, area * raised + a, 1 + a * sigmoid * (1 - sigmoid) * raised)
        newton = u - height / slope
        # The two residuals have one sign; where they differ, or the step is lost, both are rounding: stay.
        noise = (newton - u) * residual >= 0
        middle = torch.where(noise, u, (low + high) / 2)
        before = u
        u = torch.where((newton >= low) & (newton <= high), newton, middle)
        if may_look and bool(((u - before).abs() <= SETTLED * (1 + s + before.abs())).all()):
            break
    q = torch.exp(u)
    sigmoid = torch.sigmoid(gamma0 * q - gaps)
    return q, 1 / (1 + a * sigmoid * (1 - sigmoid) * gamma0 * q)


def _logit(s: Tensor, a: float) -> Tensor:
    return (torch.log(s) - torch.log(a - s)).clamp(LEAST_LOGIT, LARGEST_LOGIT)
