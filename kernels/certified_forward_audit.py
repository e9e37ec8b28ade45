"""The calls of ``certified_forward_triton`` that ``fastpo.kernels.audit`` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from . import tile_configs
from .audit import AuditCase, flag_combinations
from .certified_forward_triton import launch_forward
from .linear_logprobs_audit import LAYOUTS, matrix, vector
from .logit_transform import LogitTransform
from .nucleus import Allowance
from .precision import TRITON_DTYPES


def audit_cases() -> Iterator[AuditCase]:
    """Every combination; the gate takes all flags on and all off for aligned bfloat16 and float32."""
    for dtype, layout in product(TRITON_DTYPES, LAYOUTS):
        for extreme, on in flag_combinations("bias", "softcap", "gather", "stats", "shard"):
            name = " ".join(
                ["certified forward", str(dtype), layout]
                + [f"+{flag}" for flag, value in on.items() if value]
            )
            in_gate = layout == "aligned" and extreme and dtype != torch.float16
            yield AuditCase(name, in_gate, partial(_call, dtype, layout, **on))


def _call(
    dtype: torch.dtype,
    layout: str,
    bias: bool,
    softcap: bool,
    gather: bool,
    stats: bool,
    shard: bool,
) -> None:
    """With ``shard`` every row may leave out something else."""
    n, vocab, width = 64, 2048, 65 if layout == "odd" else 64
    launch_forward(
        matrix(2 * n if gather else n, width, dtype, layout),
        matrix(vocab, width, dtype, layout),
        vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None,
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        torch.arange(n) if gather else None,
        LogitTransform(softcap=30.0 if softcap else None),
        stats,
        2**-10,
        tile_configs.target(torch.device("cpu")),
        2**26,
        Allowance(vocab, lambda places, lse: torch.full_like(lse, 0.01)) if shard else None,
    )
