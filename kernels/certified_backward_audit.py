"""The calls of ``certified_backward_triton`` that ``fastpo.kernels.audit`` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from . import tile_configs
from .audit import AuditCase, flag_combinations
from .certified_backward_triton import launch_backward
from .linear_logprobs_audit import LAYOUTS, matrix, vector
from .logit_transform import LogitTransform
from .nucleus import words
from .precision import TRITON_DTYPES

HEIGHT = 128


def audit_cases() -> Iterator[AuditCase]:
    """Every combination, with n ≤ V and with n > V, which are cut along different sides.

    The gate takes aligned bfloat16: with no flag, and with all but ``apart`` for n > V.
    """
    for dtype, layout, wide in product(TRITON_DTYPES, LAYOUTS, (True, False)):
        for _, on in flag_combinations("bias", "softcap", "cut", "apart"):
            name = " ".join(
                ["certified backward", str(dtype), layout, "n ≤ V" if wide else "n > V"]
                + [f"+{flag}" for flag, value in on.items() if value]
            )
            in_gate = dtype == torch.bfloat16 and layout == "aligned" and not on["apart"]
            in_gate &= not any(on.values()) if wide else on["bias"] and on["softcap"] and on["cut"]
            yield AuditCase(name, in_gate, partial(_call, dtype, layout, wide, **on))


def _call(
    dtype: torch.dtype,
    layout: str,
    wide: bool,
    bias: bool,
    softcap: bool,
    cut: bool,
    apart: bool,
) -> None:
    """``cut``: in slices and batches whose products are summed; ``apart``: dH and dW in sweeps of their own."""
    (n, vocab), width = (512, 2048) if wide else (2048, 512), 65 if layout == "odd" else 64
    blocks = n // HEIGHT
    columns = torch.zeros(blocks * words(vocab) + 1, dtype=torch.int32)
    per_row = vector(torch.zeros(n + 1), layout)
    launch_backward(
        per_row,
        matrix(2 * n, width, dtype, layout),
        matrix(vocab, width, dtype, layout),
        vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None,
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        per_row,
        vector(columns, layout).view(blocks, -1),
        vector(torch.zeros(blocks + 1, dtype=torch.int32), layout),
        HEIGHT,
        LogitTransform(softcap=30.0 if softcap else None),
        True,
        True,
        bias,
        apart,
        tile_configs.target(torch.device("cpu")),
        300_000 if cut else 2**26,
    )
