"""The calls of ``linear_logprobs_triton`` that ``fastpo.kernels.audit`` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from . import tile_configs
from .audit import AuditCase, flag_combinations
from .linear_logprobs_backward_triton import launch_backward
from .linear_logprobs_triton import forward
from .logit_transform import LogitTransform
from .precision import TRITON_DTYPES

LAYOUTS = ("aligned", "odd", "strided")


def audit_cases() -> Iterator[AuditCase]:
    """Every combination, with n ≤ V and with n > V, which cut the logits along different sides.

    The gate takes all flags on and all off for aligned bfloat16, and all on for aligned float32.
    """
    for dtype, layout, wide in product(TRITON_DTYPES, LAYOUTS, (True, False)):
        for extreme, on in flag_combinations("bias", "softcap", "gather", "stats", "cut"):
            name = " ".join(
                ["linear_logprobs", str(dtype), layout, "n ≤ V" if wide else "n > V"]
                + [f"+{flag}" for flag, value in on.items() if value]
            )
            in_gate = wide and layout == "aligned" and extreme
            in_gate &= dtype == torch.bfloat16 or (dtype == torch.float32 and on["cut"])
            yield AuditCase(
                name, in_gate, partial(_call, dtype, layout, wide, **on), bulk=layout == "aligned"
            )


def _call(
    dtype: torch.dtype,
    layout: str,
    wide: bool,
    bias: bool,
    softcap: bool,
    gather: bool,
    stats: bool,
    cut: bool,
) -> None:
    """Forward and backward; with ``cut`` in slices whose products are summed."""
    (n, vocab), width = (64, 2048) if wide else (2048, 64), 65 if layout == "odd" else 64
    weight = matrix(vocab, width, dtype, layout)
    hidden = matrix(2 * n if gather else n, width, dtype, layout)
    labels = vector(torch.zeros(n + 1, dtype=torch.int64), layout)
    per_row = vector(torch.zeros(n + 1), layout)
    rows = vector(torch.zeros(n + 1, dtype=torch.int64), layout) if gather else None
    bias_values = vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None
    transform = LogitTransform(softcap=30.0 if softcap else None)
    forward(hidden, weight, bias_values, labels, rows, transform, stats)
    launch_backward(
        per_row, hidden, weight, bias_values, labels, rows, per_row, transform,
        True, True, bias, tile_configs.target(hidden.device), 140_000 if cut else 2**26,
    )  # fmt: skip


def matrix(rows: int, cols: int, dtype: torch.dtype, layout: str) -> Tensor:
    """(rows, cols): 16-byte aligned; at an odd address; or with its columns far apart."""
    if layout == "strided":
        return torch.zeros(cols, rows + 1, dtype=dtype).t()[:rows]
    return vector(torch.zeros(rows * cols + 1, dtype=dtype), layout).view(rows, cols)


def vector(one_too_many: Tensor, layout: str) -> Tensor:
    return one_too_many[1:] if layout == "odd" else one_too_many[:-1]
