"""Counter-based noise in PyTorch: Philox 4×32-10 and the normal transform.

A normal is a pure function of (seed, token index, vocabulary index), so a backward makes the noise of its
forward again, and no chunking, shard or device changes it. One counter (v // 4, 0, low word of the token index,
high word) under the key (low word of the seed, high word) gives four words x₀…x₃, hence the normals of the four
vocabulary entries 4·(v // 4) + 0…3, two pairs by Box and Muller:

    r = √(−2 ln u(x₀)),  θ = 2π u(x₁):  r cos θ, r sin θ      and the same of x₂, x₃;      u(x) = (x + ½)·2⁻³²

Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Its words have 32
bits and are held in int64, whose products wrap as those of uint64 do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .chunking import spans

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
LANES = 4  # normals of one counter
# Counters drawn at a time, 512 KiB a word: few enough for a cache, enough for PyTorch to use all threads.
COUNTERS = 2**16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, seed: int) -> Words:
    """The four output words of each counter, int64 in [0, 2³²); words broadcast against each other.

    Args:
        counter: four int64 tensors with values in [0, 2³²).
        seed: the key, in [0, 2⁶⁴).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        # What is not multiplied next may keep bits above the 32nd: they are cut off with those of the shift.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = _mixed(product1, c1, key0), _mixed(product0, c3, key1)
        c1, c3 = product1, product0
        key0, key1 = (key0 + KEY_STEPS[0]) & WORD, (key1 + KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def _mixed(product: Tensor, word: Tensor, key: int) -> Tensor:
    """High word of the product ^ word ^ key, in place where it has the full shape, else small ones first."""
    high = product >> 32
    full = torch.broadcast_shapes(high.shape, word.shape)
    if high.shape != full:
        return ((high ^ key) & WORD) ^ (word & WORD)
    if word.shape != full:
        return high.bitwise_xor_(word ^ key).bitwise_and_(WORD)
    return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(WORD)


def normal_pair(
    x: Tensor, y: Tensor, out: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
) -> tuple[Tensor, Tensor]:
    """Two independent standard normals, float32, of two words."""
    radius = uniform(x).log_().mul_(-2.0).sqrt_()
    angle = uniform(y).mul_(2 * math.pi)
    first = torch.mul(radius, torch.cos(angle), out=out[0])
    return first, torch.mul(radius, angle.sin_(), out=out[1])


def uniform(x: Tensor) -> Tensor:
    """(x + ½)·2⁻³² in float32, in (0, 1]."""
    return x.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)


def normals(seed: int, token: Tensor, column: Tensor) -> Tensor:
    """Standard normals, float32, of index tensors (int64) that broadcast against each other."""
    words = philox(_counter(token, column // LANES), seed)
    lane = column % LANES
    second = lane >= 2
    first, other = normal_pair(
        torch.where(second, words[2], words[0]), torch.where(second, words[3], words[1])
    )
    return torch.where(lane % 2 == 1, other, first)


def normal_tile(
    seed: int, token: Tensor, first: int, last: int, out: Tensor | None = None
) -> Tensor:
    """Normals (R, last − first) of tokens (R,) and the vocabulary entries from ``first`` to ``last`` − 1.

    They are float32, and converted to the dtype of ``out`` where that is given.
    """
    start, stop = first // LANES, -(-last // LANES)
    groups = torch.arange(start, stop, device=token.device)
    if out is None:
        out = torch.empty((token.numel(), last - first), dtype=torch.float32, device=token.device)
    for r in spans(token.numel(), max(1, COUNTERS // groups.numel())):
        _fill_rows(out[r], seed, token[r], groups, first - start * LANES)
    return out


def _fill_rows(out: Tensor, seed: int, token: Tensor, groups: Tensor, skipped: int) -> None:
    """out (R, C) = the normals of tokens (R,) and groups without the first ``skipped`` (0 to 3)."""
    words = philox(_counter(token.unsqueeze(1), groups), seed)
    if out.shape[1] == groups.numel() * LANES and out.dtype == torch.float32:
        lanes = out.unflatten(1, (-1, LANES)).unbind(2)
        for k in (0, 2):
            normal_pair(words[k], words[k + 1], out=(lanes[k], lanes[k + 1]))
    else:
        drawn = [lane for k in (0, 2) for lane in normal_pair(words[k], words[k + 1])]
        out.copy_(torch.stack(drawn, dim=-1).flatten(1)[:, skipped : skipped + out.shape[1]])


def normal_columns(seed: int, token: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """Normals (R, C) of tokens (R,) and any vocabulary entries (C,), in the dtype of ``out``."""
    for r in spans(token.numel(), max(1, COUNTERS // columns.numel())):
        out[r] = normals(seed, token[r].unsqueeze(1), columns)
    return out


def _counter(token: Tensor, group: Tensor) -> Words:
    return (
        group,
        torch.zeros((), dtype=torch.int64, device=group.device),
        token & WORD,
        (token >> 32) & WORD,
    )
