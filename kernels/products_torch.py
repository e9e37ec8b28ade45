"""Matrix products of the PyTorch backend, each by the faster of the libraries that PyTorch brings.

On x86 PyTorch multiplies float32 by MKL, which keeps to instructions of 256 bits on processors that are not
Intel's. oneDNN, which PyTorch has for its lower precisions, makes its code for the processor at hand, and is
twice as fast where that has AVX-512. It is called as PyTorch's compiler calls it. On its own it sums up 512
terms one after the other, with twice MKL's rounding error; logits are given to it ``TERMS`` at a time, which
costs less than MKL's (docs/performance.md). It writes to memory of its own: results come over in parts of
``CPU_PRODUCT_BYTES``, and the terms of a part take a quarter of that.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .chunking import CPU_PRODUCT_BYTES, spans

# Multiplications from which on oneDNN is called: its code for a shape not seen lately takes 0.4 ms to make.
LEAST_WORK = 2**26
TERMS = 128  # of a logit that are summed up one after the other


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (R, K) · bᵀ, b (C, K), plus bias (C,): (R, C), in ``out`` if given."""
    if not _by_onednn(a, b):
        return torch.mm(a, b.t(), out=out) if bias is None else torch.addmm(bias, a, b.t(), out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[0])
    for c in spans(b.shape[0], max(1, CPU_PRODUCT_BYTES // 4 // (4 * TERMS))):
        for k in spans(b.shape[1], TERMS):
            terms = b[c, k] if _without_gaps(b[c, k]) else b[c, k].contiguous()
            for r in _parts(out[:, c]):
                if k.start == 0:
                    out[r, c].copy_(_onednn(a[r, k], terms, None if bias is None else bias[c]))
                else:
                    out[r, c].add_(_onednn(a[r, k], terms, None))
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (R, C) += a (R, K) · b (K, C)."""
    turned = b.t()
    if not _by_onednn(a, turned):
        total.addmm_(a, b)
        return
    for r in _parts(total):
        total[r].add_(_onednn(a[r], turned, None))


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _parts(out: Tensor) -> Iterator[slice]:
    """Equal parts of the rows, each of at most ``CPU_PRODUCT_BYTES`` if there is more than a row to it."""
    rows, row_bytes = out.shape[0], max(1, 4 * out.shape[1])
    count = -(-rows // max(1, CPU_PRODUCT_BYTES // row_bytes))
    return spans(rows, -(-rows // max(1, count)))


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.numel() * b.shape[0] >= LEAST_WORK
        and _without_gaps(a)
        and _without_gaps(b)
        and onednn_is_faster()
    )


def _without_gaps(matrix: Tensor) -> bool:
    """Whether its rows or its columns lie side by side: other matrices take oneDNN a thousand times longer."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


@functools.lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that is not Intel's, and PyTorch has both libraries."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _made_by_intel()
    )


def _made_by_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()
