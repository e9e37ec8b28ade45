"""The calls of ``margins_triton`` and ``preference_epilogue_triton`` that ``fastpo.kernels.audit`` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from .audit import AuditCase, flag_combinations
from .margins_triton import exact_margins
from .preference_epilogue_torch import PAIR_LOSSES
from .preference_epilogue_triton import preference_epilogue

SIZES = (2, 300)  # pairs: both block sizes
LAYOUTS = ("padded", "packed int32", "packed int64")


def audit_cases() -> Iterator[AuditCase]:
    """Everything that changes what is compiled; the gate takes the solver alone, and all flags off and on."""
    for n in SIZES:
        gaps = torch.zeros(n, dtype=torch.float64)
        yield AuditCase(f"solve_margins {n}", True, partial(exact_margins, gaps, 1.0, 1.0))
    for n, layout in product(SIZES, LAYOUTS):
        for _, on in flag_combinations("margins", "reference", "odd"):
            flags = "".join(f" +{flag}" for flag, value in on.items() if value)
            all_off = n == SIZES[0] and layout == "padded" and not any(on.values())
            all_on = n == SIZES[1] and layout == "packed int64" and all(on.values())
            launch = partial(_call, n, layout, **on)
            yield AuditCase(f"epilogue {n} {layout}{flags}", all_off or all_on, launch)


def _call(pairs: int, layout: str, margins: bool, reference: bool, odd: bool) -> None:
    """With ``odd`` the tokens lie at an address that is not a multiple of 16."""
    shape = (2 * pairs, 3) if layout == "padded" else (2 * pairs * 3,)
    tokens = torch.zeros(2 * pairs * 3 + 1)[int(odd) :][: 2 * pairs * 3].view(shape)
    cu_dtype = torch.int32 if layout == "packed int32" else torch.int64
    preference_epilogue(
        tokens,
        torch.zeros(shape, dtype=torch.int64),
        PAIR_LOSSES["dpo" if reference else "simpo"],
        beta=1.0,
        gamma0=1.0,
        tau=1.0 if margins else None,
        cu_seqlens=None if layout == "padded" else torch.zeros(2 * pairs + 1, dtype=cu_dtype),
        ref_logps=torch.zeros(2 * pairs) if reference else None,
    )
