"""The normals of ``philox_torch`` in Triton, inside a tile of logits.

The words are the same to the bit, and so are the uniform numbers and the angles that are made of them.
Logarithm, sine and cosine are written out here: the hardware's own are short by some 1e-6, which near u = 1 is
most of the logarithm, and after which the radius multiplies the error of the angle by up to 6.77. These stay
within 1e-6 of ``philox_torch``, relative where |ε| > 1, on every device.

    ln u = e·ln 2 + f + f²·Q(f)                    u = 2^e·(1 + f), 1 + f in [√½, √2)
    (cos θ, sin θ) from those of y = θ − k·π/2     k the nearest integer, |y| ≤ π/4

Q and the two of y are fitted polynomials, with relative errors of 3e-8 and 4e-9.

Cost of a normal: a quarter of a Philox counter (10 rounds, each two 32-bit products of full width) and half of
the above, about 30 instructions, where the columns of a tile are neighbours; four counters' worth for gathered
ones.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox_torch import LANES, WORD

NORMAL_BOUND = 8.0  # a power of two above the largest |ε|, 6.77
TILE_ROWS, TILE_COLS = 16, 128  # of a program of ``normal_tile``

_LANES = tl.constexpr(LANES)
_TWO_PI = tl.constexpr(2 * math.pi)
_LN_2 = tl.constexpr(math.log(2))
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_QUARTERS = tl.constexpr(2 / math.pi)
# π/2 in two parts: a small multiple of the first is exact, and so is its difference to an angle.
_HALF_PI_HIGH = tl.constexpr(201 / 128)
_HALF_PI_LOW = tl.constexpr(math.pi / 2 - 201 / 128)
# Adding 1.5·2^23 rounds a float32 to an integer, which then is what its lowest bits hold.
_INTEGERS = tl.constexpr(1.5 * 2.0**23)


def key_words(seed: int) -> tuple[int, int]:
    """The key of ``seed`` as the kernels take it: two signed 32-bit words, the low one first."""
    low, high = seed & WORD, seed >> 32
    return tuple(word - 2**32 if word >= 2**31 else word for word in (low, high))  # type: ignore[return-value]


@triton.jit
def philox_words(group, token, key0, key1):
    """The four words, uint32, of the counters (group, 0, low and high word of token).

    ``group`` int32 and ``token`` int64 broadcast against each other; ``key0`` and ``key1`` are of
    ``key_words``.
    """
    low, high = token.to(tl.uint32), (token >> 32).to(tl.uint32)
    group = group.to(tl.uint32, bitcast=True)
    key0, key1 = key0.to(tl.uint32, bitcast=True), key1.to(tl.uint32, bitcast=True)
    return tl.philox_impl(group, tl.zeros_like(low), low, high, key0, key1)


@triton.jit
def uniform(word):
    """(word + ½)·2⁻³² in float32, in (0, 1]. The product is exact, so that fusing it changes nothing."""
    return word.to(tl.float32) * (2.0**-32) + 2.0**-33


@triton.jit
def log_unit(u):
    """ln u in float32 for normal u > 0, to a relative error of 2e-7."""
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    q = 0.149179737 + f * (-0.143075217 + f * 0.0873484278)
    q = -0.250017553 + f * (0.199620721 + f * (-0.165705082 + f * q))
    q = -0.499999916 + f * (0.333339502 + f * q)
    return exponent.to(tl.float32) * _LN_2 + (f + f * f * q)


@triton.jit
def cos_sin(angle):
    """(cos, sin) in float32 of angles in [0, 2π], to an absolute error of 1e-7, relative near 0."""
    # Written as fused steps lest the product that made the angle be fused into one, and stay unrounded there.
    shifted = tl.fma(angle, _QUARTERS, _INTEGERS)
    quarter = shifted.to(tl.int32, bitcast=True)
    k = shifted - _INTEGERS
    y = tl.fma(k, -_HALF_PI_HIGH, angle) - k * _HALF_PI_LOW
    square = y * y
    sine = -0.166666549 + square * (0.00833217792 + square * -0.000195172668)
    sine = y + y * square * sine
    cosine = 0.0416666469 + square * (-0.00138873672 + square * 2.44384155e-05)
    cosine = 1.0 + square * (-0.5 + square * cosine)
    swap = (quarter & 1) != 0
    first, second = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    # k = 1, 2: cos is negative; k = 2, 3: sin is. The sign is the highest bit.
    first_sign, second_sign = ((quarter + 1) & 2) << 30, (quarter & 2) << 30
    first = first.to(tl.int32, bitcast=True) ^ first_sign
    second = second.to(tl.int32, bitcast=True) ^ second_sign
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(x, y):
    """Two independent standard normals, float32, of two words."""
    radius = tl.sqrt(-2.0 * log_unit(uniform(x)))
    cosine, sine = cos_sin(uniform(y) * _TWO_PI)
    return radius * cosine, radius * sine


@triton.jit
def draw_tile(token, first, key0, key1, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Normals (ROWS, COLS) of tokens (ROWS,) and the vocabulary entries from ``first``, a multiple of 4, on."""
    group = first // _LANES + tl.arange(0, COLS // _LANES)
    x0, y0, x1, y1 = philox_words(group[None, :], token[:, None], key0, key1)
    cosine0, sine0 = normal_pair(x0, y0)
    cosine1, sine1 = normal_pair(x1, y1)
    pairs = tl.join(tl.join(cosine0, cosine1), tl.join(sine0, sine1))
    return pairs.reshape(ROWS, COLS)


@triton.jit
def draw_columns(token, column, key0, key1):
    """Normals of any token and column ≥ 0 (int32), which broadcast against each other: a counter for each."""
    x0, y0, x1, y1 = philox_words(column // _LANES, token, key0, key1)
    second = (column & 2) != 0
    cosine, sine = normal_pair(tl.where(second, x1, x0), tl.where(second, y1, y0))
    return tl.where((column & 1) != 0, sine, cosine)


@triton.jit(do_not_specialize=["n", "first", "last", "key0", "key1"])
def _normal_tile_kernel(
    tokens, out, n, first, last, key0, key1, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = first // _LANES * _LANES + tl.program_id(1) * COLS
    cols = start + tl.arange(0, COLS)
    token = tl.load(tokens + rows, mask=rows < n, other=0)
    kept = (rows < n)[:, None] & ((cols >= first) & (cols < last))[None, :]
    at = rows.to(tl.int64)[:, None] * (last - first) + (cols - first)[None, :]
    tl.store(out + at, draw_tile(token, start, key0, key1, ROWS, COLS), mask=kept)


def normal_tile(seed: int, token: Tensor, first: int, last: int) -> Tensor:
    """What ``philox_torch.normal_tile`` returns: (R, last − first) float32 of tokens (R,) int64, contiguous."""
    n = token.numel()
    out = torch.empty((n, last - first), dtype=torch.float32, device=token.device)
    grid = triton.cdiv(n, TILE_ROWS), triton.cdiv(last - first // LANES * LANES, TILE_COLS)
    if out.numel():
        _normal_tile_kernel[grid](
            token,
            out,
            n,
            first,
            last,
            *key_words(seed),
            ROWS=TILE_ROWS,
            COLS=TILE_COLS,
            num_warps=4,
        )
    return out
