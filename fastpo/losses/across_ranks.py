"""What batch-coupled losses need from the other ranks.

``group`` None: no communication, the batch is this process's own. Otherwise every rank of the group must call
with equally many pairs; the mean of the ranks' losses, and its gradient as averaged by data-parallel
training, are then those of one process that holds all pairs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _Gather(torch.autograd.Function):
    """(B,) on each of R ranks → (R·B,) in rank order on all; backward: the ranks' sum, the own part of it."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        gathered = values.new_empty(dist.get_world_size(group) * values.numel())
        dist.all_gather_into_tensor(gathered, values.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        group = ctx.group  # type: ignore[attr-defined]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return own_part(grad, group), None


def gather_pairs(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The values (B,) of all ranks in rank order, (R·B,), differentiable."""
    return values if group is None else _Gather.apply(values, group)


def own_part(gathered: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's B of R·B gathered values."""
    if group is None:
        return gathered
    return gathered.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def mean_over_ranks(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a detached scalar over the ranks."""
    if group is None:
        return value.detach()
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value / dist.get_world_size(group)
