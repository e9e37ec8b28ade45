"""One rank's part of a micro-step whose sequences are spread over several, without the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpo.head.sequence_attention import SequenceAttention, served_attention


class SequencePart(SequenceAttention):
    """The exchange around attention, of which only the shapes are true.

    Args:
        size: ranks that share a sequence.
        models: as for :class:`fastpo.head.sequence_attention.SequenceAttention`; they are not tried.
    """

    def __init__(self, size: int, *models: nn.Module) -> None:
        self.size = size
        self._masks = {}
        self._implementations = {served_attention(model, size) for model in models}

    def _exchange(self, parts: Tensor) -> Tensor:
        return _Received.apply(parts)  # type: ignore[no-any-return]


class _Received(torch.autograd.Function):
    """A tensor of the same shape, as an all-to-all needs one to receive in."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        return torch.empty_like(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.empty_like(grad, memory_format=torch.contiguous_format)
