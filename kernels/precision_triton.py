"""The one place that says how Triton kernels multiply and round.

float32 operands are multiplied as three tf32 products (tf32x3, about 21 bits), never as one; the setting does
not touch 16-bit operands, whose products are exact in the float32 accumulator. Roundings are to nearest even.

Triton 3.7's interpreter multiplies the bit patterns of bfloat16 and truncates on conversion to it, so under
``TRITON_INTERPRET=1`` both are written out in what it does well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile_configs import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a·b in float32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += tl.where(x == x, 0x7FFF + ((bits >> 16) & 1), 0)  # a NaN keeps its bits
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
