"""Preference epilogue in Triton: ``preference_epilogue_torch`` in one launch, without a host read.

One program per sequence adds up its labelled tokens in float64. Each then takes a ticket; the program that
draws the last one finds all sums written and goes on alone: gaps, γ (``margins_triton.solve``), losses,
coefficients. Up to MAX_PAIRS pairs and as many extra gaps that takes one program little time.

Shapes: tokens (2B, T), or (N,) with cu_seqlens (2B + 1,). Passes over memory: token log-probs and labels
once; what is per sequence stays in the L2 cache. Sums, gaps and γ are float64 until they are rounded to
float32 on the way out.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .margins_triton import launch_options, margin, solve, wide
from .preference_epilogue_torch import EpilogueResult, PairLoss, check
from .tile_configs import unsupported

MAX_PAIRS = 4096

TOKENS = tl.constexpr(1024)  # read by a program at once

_LINKS = {"logistic": 0, "hinge": 1, "squared": 2}

# Tickets drawn so far, per device and stream: launches on one stream follow each other. The last program
# leaves 0.
_tickets: dict[tuple[torch.device, int], Tensor] = {}


def supported(token_logps: Tensor, pairs: int, extra_gaps: int = 0) -> str | None:
    """None if this backend can take the call, else the reason why not."""
    if token_logps.dtype != torch.float32:
        return f"dtype {token_logps.dtype} is not float32"
    if pairs > MAX_PAIRS or extra_gaps > MAX_PAIRS:
        return f"{pairs} pairs and {extra_gaps} extra gaps are more than {MAX_PAIRS} of either"
    return unsupported(token_logps.device)


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
    """As ``preference_epilogue_torch.preference_epilogue``."""
    check(token_logps, labels, loss, cu_seqlens, ref_logps)
    sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    pairs = sequences // 2
    solve_gamma = tau is not None and gamma0 > 0
    device = token_logps.device
    empty = partial(torch.empty, dtype=torch.float32, device=device)
    if extra_gaps is None or not solve_gamma:
        extra_gaps = empty(0)
    extra = extra_gaps.numel()
    sums_and_gaps = empty(sequences + pairs + extra, dtype=torch.float64)
    lengths = empty(sequences, dtype=torch.int64)
    logps, coefficients, losses, gaps = (
        empty(sequences),
        empty(sequences),
        empty(pairs),
        empty(pairs),
    )
    gamma = None if tau is None else empty(pairs) if solve_gamma else torch.zeros_like(gaps)
    reference = ref_logps.contiguous() if loss.reference and ref_logps is not None else None
    _epilogue_kernel[(sequences,)](
        token_logps.contiguous(), labels.contiguous(),
        None if cu_seqlens is None else cu_seqlens.contiguous(), reference,
        extra_gaps.double().contiguous(), _ticket(device),
        sums_and_gaps, lengths, logps, coefficients, losses, gaps, gamma if solve_gamma else None,
        token_logps.shape[-1], pairs, extra, ignore_index, int(loss.averaged), _LINKS[loss.link],
        float(beta), float(gamma0), float(tau or 1.0), float(gamma0 if loss.centred else 0.0),
        float(loss.right), float(loss.wrong), float(loss.length_penalty),
        **launch_options(pairs + extra),
    )  # fmt: skip
    return EpilogueResult(losses, logps, lengths, gaps, gamma, coefficients)


def _ticket(device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _tickets:
        _tickets[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[device, stream]


@triton.jit(do_not_specialize=["tokens", "pairs", "extra", "ignore_index", "averaged", "link"])
def _epilogue_kernel(
    token_logps, labels, cu_seqlens, ref_logps, extra_gaps, ticket,
    sums, lengths, logps, coefficients, losses, gaps, gamma,
    tokens, pairs, extra, ignore_index, averaged, link,
    beta: tl.float64, gamma0: tl.float64, tau: tl.float64, centre: tl.float64,
    right: tl.float64, wrong: tl.float64, length_penalty: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    beta, gamma0, tau, centre = wide(beta), wide(gamma0), wide(tau), wide(centre)
    right, wrong, length_penalty = wide(right), wide(wrong), wide(length_penalty)
    sequence = tl.program_id(0)
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * tokens
        stop = start + tokens
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        stop = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros([TOKENS], tl.float64)
    count = tl.zeros([TOKENS], tl.int32)
    for first in range(start, stop, TOKENS):
        index = first + tl.arange(0, TOKENS)
        kept = (index < stop) & (
            tl.load(labels + index, mask=index < stop, other=0) != ignore_index
        )
        total += tl.load(token_logps + index, mask=kept, other=0.0).to(tl.float64)
        count += kept.to(tl.int32)
    tl.store(sums + sequence, tl.sum(total, 0))
    tl.store(logps + sequence, tl.sum(total, 0).to(tl.float32))
    tl.store(lengths + sequence, tl.sum(count, 0).to(tl.int64))

    # The ticket releases what was stored above and acquires what the other programs stored before theirs.
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket, 1, sem="acq_rel")
    if drawn == 2 * pairs - 1:
        _finish(
            ref_logps, extra_gaps, sums, lengths, coefficients, losses, gaps, gamma, pairs, extra,
            beta, gamma0, tau, centre, right, wrong, length_penalty, averaged, link, BLOCK,
        )  # fmt: skip
        tl.store(ticket, 0)


@triton.jit
def _finish(
    ref_logps, extra_gaps, sums, lengths, coefficients, losses, gaps, gamma, pairs, extra,
    beta, gamma0, tau, centre, right, wrong, length_penalty, averaged, link,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What is left when all sums are written, in one program."""
    wide_gaps = sums + 2 * pairs
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        inside = pair < pairs
        chosen, _, chosen_length = _score(sums, ref_logps, lengths, pair, inside, beta, averaged)
        rejected, _, rejected_length = _score(
            sums, ref_logps, lengths, pairs + pair, inside, beta, averaged
        )
        labelled = (chosen_length > 0) & (rejected_length > 0)
        gap = tl.where(labelled, chosen - rejected, 0.0)
        tl.store(wide_gaps + pair, gap, mask=inside)
        tl.store(gaps + pair, gap.to(tl.float32), mask=inside)
    if gamma is not None:
        for first in range(0, extra, BLOCK):
            index = first + tl.arange(0, BLOCK)
            gap = tl.load(extra_gaps + index, mask=index < extra, other=0.0)
            tl.store(wide_gaps + pairs + index, gap, mask=index < extra)
    tl.debug_barrier()  # from here on gaps are read by other threads than wrote them
    if gamma is not None:
        a = gamma0 / tau
        s, lack = solve(wide_gaps, pairs + extra, gamma0, a, BLOCK)
    for first in range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        inside = pair < pairs
        _, chosen_factor, chosen_length = _score(
            sums, ref_logps, lengths, pair, inside, beta, averaged
        )
        _, rejected_factor, rejected_length = _score(
            sums, ref_logps, lengths, pairs + pair, inside, beta, averaged
        )
        labelled = (chosen_length > 0) & (rejected_length > 0)
        gap = tl.load(wide_gaps + pair, mask=inside, other=0.0)
        goal = tl.zeros_like(gap) + gamma0
        if gamma is not None:
            goal = margin(gap, inside, s, lack, gamma0, a)
            tl.store(gamma + pair, goal.to(tl.float32), mask=inside)
        t = gap - (goal - centre) - beta * length_penalty * (chosen_length - rejected_length)
        loss, slope = _link(t, beta, right, wrong, link)
        loss, slope = tl.where(labelled, loss, 0.0), tl.where(labelled, slope, 0.0)
        tl.store(losses + pair, loss.to(tl.float32), mask=inside)
        tl.store(coefficients + pair, (slope * chosen_factor).to(tl.float32), mask=inside)
        tl.store(
            coefficients + pairs + pair, (-slope * rejected_factor).to(tl.float32), mask=inside
        )


@triton.jit
def _score(sums, ref_logps, lengths, sequence, inside, beta, averaged):
    """(c·logp, c, |y|) of one block of sequences, read past L1: other programs wrote them."""
    logp = tl.load(sums + sequence, mask=inside, other=0.0, cache_modifier=".cg")
    length = tl.load(lengths + sequence, mask=inside, other=0, cache_modifier=".cg").to(tl.float64)
    factor = beta / tl.where((averaged != 0) & (length > 0), length, 1.0)
    if ref_logps is not None:
        logp -= tl.load(ref_logps + sequence, mask=inside, other=0.0).to(tl.float64)
    return factor * logp, factor, length


@triton.jit
def _link(t, beta, right, wrong, link):
    """Loss and d loss/dt."""
    # softplus(−t) = max(−t, 0) + tail
    tail = tl.log(1 + tl.exp(-tl.abs(t)))
    loss = (right + wrong) * tail + tl.where(t < 0, -right * t, wrong * t)
    slope = wrong * tl.sigmoid(t) - right * tl.sigmoid(-t)
    if link == 1:
        loss = tl.where(t >= 1, 0.0, 1 - t)
        slope = tl.where(t < 1, -1.0, 0.0).to(tl.float64)
    if link == 2:
        shortfall = (t - 0.5) / beta
        loss = shortfall * shortfall
        slope = 2 * shortfall / beta
    return loss, slope
