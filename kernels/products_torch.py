"""Matrix products of the PyTorch backend, each by the faster of the libraries that PyTorch brings.

On x86 PyTorch multiplies float32 by MKL, which keeps to instructions of 256 bits on processors that are not
Intel's. oneDNN, which PyTorch has for its lower precisions, makes its code for the processor at hand, and is
twice as fast where that has AVX-512 (docs/performance.md). It is called as PyTorch's compiler calls it, and
writes to memory of its own: results come over in parts of at most ``chunking.CPU_PRODUCT_BYTES``.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

from .chunking import CPU_PRODUCT_BYTES, spans

# Multiplications from which on oneDNN is called: its code for a shape not seen lately takes 0.4 ms to make.
LEAST_WORK = 2**26


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a (R, K) · bᵀ, b (C, K), plus bias (C,): (R, C), in ``out`` if given."""
    if not _by_onednn(a, b.shape[0]):
        return torch.mm(a, b.t(), out=out) if bias is None else torch.addmm(bias, a, b.t(), out=out)
    if out is None:
        return _onednn(a, b, bias)
    for r in _parts(out):
        out[r].copy_(_onednn(a[r], b, bias))
    return out


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (R, C) += a (R, K) · b (K, C)."""
    if not _by_onednn(a, b.shape[1]):
        total.addmm_(a, b)
        return
    for r in _parts(total):
        total[r].add_(_onednn(a[r], b.t(), None))


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _parts(out: Tensor) -> list[slice]:
    rows = max(1, CPU_PRODUCT_BYTES // max(1, out.shape[1] * out.element_size()))
    return list(spans(out.shape[0], rows))


def _by_onednn(a: Tensor, cols: int) -> bool:
    return (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.numel() * cols >= LEAST_WORK
        and onednn_is_faster()
    )


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
