"""The one place that knows dtypes: which are accepted, and how their products are accumulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOW_PRECISION = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, *LOW_PRECISION)
TORCH_DTYPES = (*TRITON_DTYPES, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits, log-probs and gradient accumulators: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 tensors are float32 products inside, whatever the caller has allowed.

    Switches off autocast, and tf32 (CUDA) and bf16 (oneDNN) substitution for matrix products, for the
    duration of the block. The switches are process-wide, as PyTorch has them.
    """
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    previous = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    # The older switch has to agree: PyTorch refuses to read the setting where the two contradict each other.
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for switch, value in zip(switches, previous, strict=True):
            switch.fp32_precision = value
