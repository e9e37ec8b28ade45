"""``sequence_logprobs``: token log-probs summed or averaged over each sequence, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_boundaries


def sequence_logprobs(
    token_logps: Tensor,  # (B, T) or (N,)
    labels: Tensor,  # (B, T) or (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:  # (B,)
    """Log-prob of every sequence: the sum (or mean) over its labelled tokens.

    Args:
        token_logps: (B, T), or packed (N,) with ``cu_seqlens``; nats.
        labels: same shape; tokens whose label is ``ignore_index`` count for nothing.
        cu_seqlens: (B + 1,) int32 or int64, from 0 to N: segment b is ``[cu_seqlens[b], cu_seqlens[b + 1])``.
        average: divide by the number of labelled tokens.

    Returns:
        (B,) in the dtype of ``token_logps``, summed in float64. A sequence without a labelled token gives 0.

    Raises:
        TypeError: ``cu_seqlens`` is not an integer tensor.
        ValueError: shapes or devices that do not fit.
    """
    sums, counts = sequence_sums(
        token_logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index
    )
    result = sums / counts.clamp(min=1) if average else sums
    return result.to(token_logps.dtype)


def sequence_sums(
    token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Each sequence's float64 sum of log-probs (B,) and its number of labelled tokens (B,) int64."""
    if token_logps.shape != labels.shape:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected that of token_logps, "
            f"{tuple(token_logps.shape)}"
        )
    dims = 2 if cu_seqlens is None else 1
    if token_logps.dim() != dims:
        layout = "(B, T) without cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"token_logps: got shape {tuple(token_logps.shape)}, expected {layout}")
    for name, tensor in (("labels", labels), ("cu_seqlens", cu_seqlens)):
        if tensor is not None and tensor.device != token_logps.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected that of token_logps, {token_logps.device}"
            )
    kept = labels != ignore_index
    values = torch.where(kept, token_logps, 0.0).double()
    if cu_seqlens is None:
        return values.sum(dim=1), kept.sum(dim=1)
    check_boundaries(cu_seqlens, values.numel())
    batch = cu_seqlens.numel() - 1
    position = torch.arange(values.numel(), device=values.device)
    segment = torch.bucketize(position, cu_seqlens[1:].to(position.dtype), right=True)
    # Positions past the last boundary belong to no sequence; they fall into a segment that is cut off.
    sums = values.new_zeros(batch + 1).index_add(0, segment, values)
    counts = position.new_zeros(batch + 1).index_add(0, segment, kept.long())
    return sums[:batch], counts[:batch]
