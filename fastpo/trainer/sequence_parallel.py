"""Training with the tokens of each sequence spread over several ranks.

The ranks are laid out as (data, sequence): the ``sequence_parallel_size`` ranks of a sequence group read the
same pairs, run the model on their own part of every sequence (:mod:`fastpo.head.sequence_attention`) and score
their own labels; the token log-probs of all of them make the loss, the same on each. Whatever averages
gradients over all ranks (DDP, FSDP2, DeepSpeed) knows nothing of it: the sum over the group carries the factor
that undoes the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from fastpo.data.collator import IGNORE_INDEX
from fastpo.head.sequence_attention import SequenceAttention, part_of
from fastpo.losses import PreferenceLoss
from fastpo.margins import DynamicMargin
from fastpo.ops.linear_logprobs import TokenStats

from .loaders import deal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainingArguments


class SequenceParallel:
    """The sequence groups of a run.

    Args:
        size: ranks that share a sequence.
        device: this rank's.
        models: policy and, where one is run, reference; see :class:`SequenceAttention`.

    Attributes:
        group: the ranks that share this one's sequences.
        data_group: the ranks with this one's place in their groups; each has other pairs.

    Raises:
        ValueError: the ranks cannot be split up so, or a model cannot.
    """

    def __init__(self, size: int, device: torch.device, *models: nn.Module) -> None:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks % size:
            raise ValueError(
                f"sequence_parallel_size: got {size} with {ranks} processes, expected a divisor of them"
            )
        mesh = init_device_mesh(
            device.type, (ranks // size, size), mesh_dim_names=("data", "sequence")
        )
        self.size = size
        self.group: ProcessGroup = mesh.get_group("sequence")
        self.data_group: ProcessGroup = mesh.get_group("data")
        self.data_ranks = ranks // size
        self.data_rank = dist.get_rank(self.data_group)
        self.rank = dist.get_rank(self.group)
        self._attention = SequenceAttention(self.group, *models)
        self._device = device
        self._tried: set[int] = set()
        self._active = False

    @classmethod
    def of(
        cls, args: TrainingArguments, accelerator: Accelerator, *models: nn.Module
    ) -> SequenceParallel | None:
        """What a configuration asks for; None where every process has whole sequences.

        Raises:
            ValueError: as :func:`sequence_size` and the class itself.
        """
        size = sequence_size(args, accelerator)
        if size == 1:
            return None
        return cls(size, args.device, *models)

    def deal(self, loader: Any) -> Any:
        """Let a loader of accelerate's give the same batches to all ranks of a group."""
        return deal(loader, self.data_ranks, self.data_rank)

    def try_on(self, model: nn.Module, *, exact: bool) -> None:
        """Try a model that is ready to run, once; see :meth:`SequenceAttention.try_on`. All ranks must call."""
        if id(model) not in self._tried:
            self._tried.add(id(model))
            self._attention.try_on(model, self._device, exact=exact)

    @contextmanager
    def training(self) -> Iterator[None]:
        """A forward and backward on parts of sequences; outside, models run on whole ones."""
        self._active = True
        try:
            with self._attention.active():
                yield
        finally:
            self._active = False

    def couple(self, loss: PreferenceLoss) -> None:
        """Have γ and what else couples pairs taken over the ranks that have other ones: in evaluation all."""
        loss.group = self.data_group if self._active else dist.group.WORLD
        if isinstance(loss.margin, DynamicMargin):
            loss.margin.group = loss.group

    def around(self, model: nn.Module) -> Callable[..., Any]:
        """What is called in the place of ``model``, with whole sequences; in training it runs it on a part.

        ``model`` is under a fused head; ``log_probs`` and ``token_stats`` are those of all labels.
        """
        if not self._active:
            return model

        def run(**inputs: Any) -> Any:
            part, places = self._part(inputs)
            output = model(**part)
            shape = inputs["labels"].shape
            output.log_probs = _Sum.apply(_placed(output.log_probs, places, shape), self.group)
            if output.token_stats is not None:
                output.token_stats = self._stats(output.token_stats, part["labels"], places, shape)
            return output

        return run

    def _part(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor]:
        """This rank's keywords, and the places (…) of its labels among all (flattened)."""
        part = part_of(inputs, self.rank, self.size)
        labels, count = inputs["labels"], part["input_ids"].shape[1]
        first = self.rank * count
        numbers = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
        if "hidden_index" not in inputs:
            here = slice(first, first + count)
            return {**part, "labels": labels[:, here]}, numbers[:, here]
        row, at = (
            inputs["hidden_index"] // (count * self.size),
            inputs["hidden_index"] % (count * self.size),
        )
        own = (labels != IGNORE_INDEX) & (at // count == self.rank)
        places = own.flatten().nonzero()[:, 0]
        if not len(places):  # the head runs on all ranks or on none: a place that scores nothing
            nothing = labels.new_full((1,), IGNORE_INDEX)
            part |= {"labels": nothing, "hidden_index": torch.zeros_like(nothing)}
            return part, numbers.flatten()[:1]
        index = (row * count + at - first).flatten()[places]
        return {**part, "labels": labels.flatten()[places], "hidden_index": index}, places

    def _stats(
        self, stats: TokenStats, labels: Tensor, places: Tensor, shape: torch.Size
    ) -> TokenStats:
        """Of all labels, from each rank's own."""
        by_token = torch.stack(
            [
                _placed(part.detach().float(), places, shape)
                for part in (stats.entropy, stats.top1, stats.logit_mean)
            ]
        )
        dist.all_reduce(by_token, group=self.group)
        entropy, top1, logit_mean = by_token.unbind()
        count = (labels != IGNORE_INDEX).sum()
        sums = torch.stack([count, stats.active_fraction * count, stats.dense_rows]).double()
        dist.all_reduce(sums, group=self.group)
        dropped = stats.dropped_mass_max.detach().clone()
        dist.all_reduce(dropped, dist.ReduceOp.MAX, group=self.group)
        return TokenStats(
            entropy, top1 > 0, logit_mean, dropped,
            (sums[1] / sums[0].clamp_min(1)).to(stats.active_fraction.dtype), sums[2].long(),
        )  # fmt: skip


def sequence_size(args: TrainingArguments, accelerator: Accelerator) -> int:
    """Processes that share a sequence: by the field ``sequence_parallel_size``, or by accelerate's ``cp_size``.

    Raises:
        ValueError: both, or a parallelism of accelerate's that does not go with pairs.
    """
    size = getattr(args, "sequence_parallel_size", 1)
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.sp_enabled:
        raise ValueError(
            f"parallelism_config: got sp_size {parallelism.sp_size}, expected 1 and the field "
            f"sequence_parallel_size: {parallelism.sp_size}; DeepSpeed's own attention takes batches of "
            "one size and drops masks"
        )
    if parallelism is not None and parallelism.cp_enabled:
        if size != 1:
            raise ValueError(
                f"sequence_parallel_size: got {size} with cp_size {parallelism.cp_size} in "
                "parallelism_config, expected 1, or no cp_size"
            )
        if parallelism.cp_size == accelerator.num_processes:
            raise ValueError(
                f"parallelism_config: got cp_size {parallelism.cp_size} on as many processes, whose batches "
                "accelerate then does not deal out; expected 1 and the field sequence_parallel_size: "
                f"{parallelism.cp_size}"
            )
        if parallelism.tp_enabled:
            raise ValueError(
                f"parallelism_config: got cp_size {parallelism.cp_size} and tp_size {parallelism.tp_size}, "
                "expected one of them"
            )
        if getattr(args, "padding_free", False) or getattr(args, "prefix_sharing", False):
            raise ValueError(
                f"parallelism_config: got cp_size {parallelism.cp_size} with packed rows, expected 1 and "
                f"the field sequence_parallel_size: {parallelism.cp_size}; accelerate takes masks away"
            )
        if getattr(args, "method", None) == "dnpo":
            raise ValueError(
                f"parallelism_config: got cp_size {parallelism.cp_size}, expected 1 with method 'dnpo', whose "
                "penalty is taken over whole sequences"
            )
        size = parallelism.cp_size
    return size


def _placed(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """``values`` at their places in zeros of ``shape``; differentiable."""
    zeros = values.new_zeros(shape.numel())
    return zeros.index_put((places.flatten(),), values.flatten()).view(shape)


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group, each of which computes the same loss of it.

    The gradient is n times that of the loss, for n ranks: what each adds to a parameter's is then averaged.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:
        ctx.size = dist.get_world_size(group)
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.size, None
