"""Exact target margins γ of γ-PO in Triton: one program, one launch, no host read.

The solver is that of ``margins_torch.exact_margins``, where its formulas are: an outer Newton iteration for s
around inner ones for log q, in float64, here ended as soon as they have settled. The gaps are walked in
blocks and nothing is kept per gap, so registers do not limit n. ``solve`` is inlined into the preference
epilogue as well.

Shapes: gaps and γ (n,) float64. Passes over memory: one per outer iteration, from the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import margins_torch
from .tile_configs import unsupported

MAX_GAPS = 8192  # what one program solves in about the time of a few launches

_OUTER = tl.constexpr(margins_torch.OUTER_STEPS)
_INNER = tl.constexpr(margins_torch.INNER_STEPS)
_SETTLED = tl.constexpr(
    margins_torch.SETTLED
)  # a power of two: exact in float32, as which Triton takes literals
_LEAST_LOGIT = tl.constexpr(margins_torch.LEAST_LOGIT)
_LARGEST_LOGIT = tl.constexpr(margins_torch.LARGEST_LOGIT)


def supported(gaps: Tensor) -> str | None:
    """None if ``exact_margins`` can take the gaps, else the reason why not."""
    if gaps.numel() > MAX_GAPS:
        return f"{gaps.numel()} gaps are more than one program's {MAX_GAPS}"
    return unsupported(gaps.device)


def launch_options(n: int) -> dict[str, int]:
    """Block size and compiler options for n gaps.

    ``maxnreg`` is the hardware's own limit. Unless it is named, ptxas spills a few registers so that one more
    program fits onto a processor, of which the program that solves for γ has no use.
    """
    return {"BLOCK": 256 if n <= 256 else 1024, "num_warps": 8, "maxnreg": 255}


def exact_margins(
    gaps: Tensor,  # (n,) float64
    gamma0: float,
    tau: float,
) -> Tensor:  # (n,) float64
    """As ``margins_torch.exact_margins``."""
    if gamma0 == 0 or gaps.numel() == 0:
        return torch.zeros_like(gaps)
    gammas = torch.empty_like(gaps, memory_format=torch.contiguous_format)
    _margins_kernel[(1,)](
        gaps.contiguous(),
        gammas,
        gaps.numel(),
        float(gamma0),
        float(tau),
        **launch_options(gaps.numel()),
    )
    return gammas


@triton.jit(do_not_specialize=["n"])
def _margins_kernel(gaps, gammas, n, gamma0: tl.float64, tau: tl.float64, BLOCK: tl.constexpr):
    gamma0, tau = wide(gamma0), wide(tau)
    a = gamma0 / tau
    s, lack = solve(gaps, n, gamma0, a, BLOCK)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        gap = tl.load(gaps + index, mask=index < n, other=0.0)
        tl.store(gammas + index, margin(gap, index < n, s, lack, gamma0, a), mask=index < n)


@triton.jit
def wide(number):
    """A float64 argument as a tensor: the interpreter rounds a Python float to float32 wherever it is used."""
    return tl.full([], number, tl.float64)


@triton.jit
def solve(gaps, n, gamma0, a, BLOCK: tl.constexpr):
    """(s, lack) with which ``margin`` gives γ of each of n ≥ 1 gaps; γ0 and a = γ0/τ are float64 and > 0."""
    count = n.to(tl.float64)
    least = tl.full([BLOCK], float("inf"), tl.float64)
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        gap = tl.load(gaps + index, mask=index < n, other=0.0)
        least = tl.where((index < n) & (gap < least), gap, least)
        largest = tl.where((index < n) & (gap > largest), gap, largest)
        total += tl.where(index < n, tl.sigmoid(gamma0 - gap), 0.0)
    g_least, g_largest = tl.min(least, 0), tl.max(largest, 0)
    low = a * tl.sigmoid(gamma0 - g_largest)
    high = tl.minimum(
        a * tl.sigmoid(gamma0 - g_least), tl.log(count) + a * tl.sigmoid(gamma0 * count - g_largest)
    )
    s = _clamp(a * tl.sum(total, 0) / count, low, high)
    mean = count
    yielding = count
    step = 0
    moving = True
    while moving:
        mean, yielding = _means(gaps, n, s, gamma0, a, BLOCK)
        excess = tl.log(mean)
        low = tl.where(excess <= 0, s, low)
        high = tl.where(excess >= 0, s, high)
        pull = yielding / mean
        logit_step = a * tl.sigmoid(_logit(s, a) - excess * a / (pull * s * (a - s)))
        newton = tl.where(pull < 0.5, logit_step, s - excess / pull)
        middle = _clamp(a * tl.sigmoid((_logit(low, a) + _logit(high, a)) / 2), low, high)
        after = tl.where((newton >= low) & (newton <= high), newton, middle)
        moving = (step < _OUTER) & (tl.abs(after - s) > s * _SETTLED)
        s = tl.where(moving, after, s)
        step += 1
    return s, (1 - mean) / yielding


@triton.jit
def margin(gap, inside, s, lack, gamma0, a):
    """γ of one block of gaps."""
    q, slope = _shares(gap, inside, s, gamma0, a)
    return gamma0 * q * (1 + slope * lack)


@triton.jit
def _means(gaps, n, s, gamma0, a, BLOCK: tl.constexpr):
    """Means over the gaps of q(s) and dq/ds."""
    total = tl.zeros([BLOCK], tl.float64)
    total_slope = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < n
        gap = tl.load(gaps + index, mask=inside, other=0.0)
        q, slope = _shares(gap, inside, s, gamma0, a)
        total += tl.where(inside, q, 0.0)
        total_slope += tl.where(inside, q * slope, 0.0)
    count = n.to(tl.float64)
    return tl.sum(total, 0) / count, tl.sum(total_slope, 0) / count


@triton.jit
def _shares(gap, inside, s, gamma0, a):
    """q(s) and d log q/ds of one block of gaps."""
    low = tl.zeros_like(gap) + (s - a)
    high = tl.zeros_like(gap) + s
    u = _clamp(tl.log(tl.where(gap < 1.0, 1.0, gap) / gamma0), low, high)
    step = 0
    moving = True
    while (step < _INNER) & moving:
        raised = gamma0 * tl.exp(u)
        x = raised - gap
        sigmoid = tl.sigmoid(x)
        residual = u - s + a * sigmoid
        low = tl.where(residual <= 0, u, low)
        high = tl.where(residual >= 0, u, high)
        y = s - u
        area = y * (a - y)
        on_step = area * raised > a
        height = tl.where(on_step, area * (x - tl.log(y / (a - y))), residual)
        slope = tl.where(on_step, area * raised + a, 1 + a * sigmoid * (1 - sigmoid) * raised)
        newton = u - height / slope
        middle = tl.where((newton - u) * residual >= 0, u, (low + high) / 2)
        before = u
        u = tl.where((newton >= low) & (newton <= high), newton, middle)
        far = inside & (tl.abs(u - before) > (1 + s + tl.abs(before)) * _SETTLED)
        moving = tl.max(far.to(tl.int32), 0) > 0
        step += 1
    q = tl.exp(u)
    sigmoid = tl.sigmoid(gamma0 * q - gap)
    return q, 1 / (1 + a * sigmoid * (1 - sigmoid) * gamma0 * q)


@triton.jit
def _logit(s, a):
    return _clamp(tl.log(s) - tl.log(a - s), _LEAST_LOGIT, _LARGEST_LOGIT)


@triton.jit
def _clamp(value, low, high):
    """Between the bounds, without the dtype checks of ``tl.clamp``."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)
