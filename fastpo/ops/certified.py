"""The option ``backward``, and what a certified backward is handed by its forward, for every operation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastpo.kernels.nucleus import Nuclei, block_count, words
from fastpo.kernels.precision import LOW_PRECISION

BACKWARDS = ("auto", "exact", "certified")
DEFAULT_TOL = 2**-10


def check_backward(backward: str, tol: float) -> None:
    if backward not in BACKWARDS:
        raise ValueError(f"backward: got {backward!r}, expected one of {', '.join(BACKWARDS)}")
    if not 0.0 <= tol < 1.0:
        raise ValueError(f"tol: got {tol}, expected a number in [0, 1)")


def effective_tol(backward: str, tol: float, leaves: Iterable[Tensor | None]) -> float:
    """``tol``, or 0 where the backward is exact or none can follow; ``"auto"`` goes by the first leaf."""
    given = [t for t in leaves if t is not None]
    if backward == "exact" or (backward == "auto" and given[0].dtype not in LOW_PRECISION):
        return 0.0
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return 0.0  # there is no backward to prepare
    return float(tol)


def blocks_of(nuclei: Nuclei, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Masks and counts in tensors whose size depends on shapes alone: as if every token carried a label."""
    used, most = nuclei.counts.numel(), block_count(tokens, nuclei.counts.device)
    columns = nuclei.columns.new_zeros(most, words(vocab))
    counts = nuclei.counts.new_zeros(most)
    columns[:used], counts[:used] = nuclei.columns, nuclei.counts
    return columns, counts


def empty_blocks(labels: Tensor, vocab: int, tol: float) -> tuple[Tensor, Tensor]:
    """Fakes of what ``blocks_of`` returns, (0,) for the exact backward."""
    blocks = block_count(labels.numel(), labels.device) if tol > 0 else 0
    return (
        labels.new_empty(blocks and (blocks, words(vocab)), dtype=torch.int32),
        labels.new_empty(blocks, dtype=torch.int32),
    )
