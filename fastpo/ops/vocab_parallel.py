"""The vocabulary-parallel head: rows of ``weight`` and ``bias`` spread over the ranks of a process group.

Rank k holds the columns of the logits from first_k on, a *shard*, and knows from its own forward, for each row,
l_k = log Σ_{v in shard} exp(z_v). From there, with lse = log Σ_k exp(l_k) and shares s_k = exp(l_k − lse):

    log p_y = log p_y(within the label's shard) + l_k − lse          entropy = Σ_k s_k·(entropy_k + lse − l_k)
    dz_v = c·(1[v = y] − exp(z_v − lse))                             dH = Σ_k dz_k·W_k, dW_k = dz_kᵀ·H

so forward and backward of one shard are those of a whole vocabulary, with another lse. Exchanged are, in the
forward, eight integers per rank (``agree``), the maximum and the sum of exp(l_k), and sums of the rest
(``Shard.join``, ``Shard.join_nuclei``); in the backward dH, once, in float32 where it is of lower precision.

**Certified backward.** A row may lose ``tol`` of its probability over all shards. Shard k may leave out

    tol·(V_k/V + s_k)/2,        which sums up to tol over the shards, as V_k/V and s_k do to 1,

half of it by its number of columns and half by its probability, both known as soon as lse is, and nothing more
has to be exchanged to choose the columns. So a shard that hardly matters to a row drops all of it, and one that
holds most of a row's probability, tail included, is not held to 1/K of ``tol``. docs/many-devices.md has the
figures. A forward that asks before it chooses (``Allowance``) makes its logits once, as on one device.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.kernels.linear_logprobs_torch import ForwardResult
from fastpo.kernels.nucleus import Allowance, Nuclei, block_rows
from fastpo.kernels.precision import accumulation_dtype

from .arguments import is_dtensor, kept_first, refuse_out_of_range
from .checks import check_everything

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of a shard's allowance: shares come from rounded lse, and may sum up to a little more than 1.
ROUNDING = 1e-4


def local_shard(
    weight: Any, bias: Any, vocab_group: ProcessGroup | None
) -> tuple[Any, Any, ProcessGroup | None]:
    """This rank's rows of ``weight`` and ``bias``, and the group that has the others; None: there are none.

    A DTensor gives its own rows, differentiably, and its mesh the group.

    Raises:
        TypeError: ``vocab_group`` is no process group that this process belongs to.
        ValueError: a DTensor that is not sharded by rows over a mesh of one dimension; one of ``weight`` and
            ``bias`` a DTensor and the other not, or on another mesh; a mesh of other ranks than
            ``vocab_group``.
    """
    if is_dtensor(weight) or is_dtensor(bias):
        if not is_dtensor(weight) or not (bias is None or is_dtensor(bias)):
            name, other = ("bias", "weight") if is_dtensor(weight) else ("weight", "bias")
            raise ValueError(
                f"{name}: got a plain tensor, expected a DTensor sharded by rows, as {other} is"
            )
        group = _group_of("weight", weight)
        for name, ranks in (
            ("bias", None if bias is None else _ranks(_group_of("bias", bias))),
            ("vocab_group", None if vocab_group is None else _ranks(vocab_group)),
        ):
            if ranks is not None and ranks != _ranks(group):
                raise ValueError(
                    f"{name}: got ranks {ranks}, expected those of the mesh of weight, {_ranks(group)}"
                )
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        vocab_group = group
    if vocab_group is None:
        return weight, bias, None
    if not isinstance(vocab_group, dist.ProcessGroup):
        raise TypeError(
            f"vocab_group: got {type(vocab_group).__name__}, expected a torch.distributed process group that "
            "this process belongs to, or None"
        )
    return weight, bias, None if dist.get_world_size(vocab_group) == 1 else vocab_group


def _group_of(name: str, tensor: Any) -> ProcessGroup:
    from torch.distributed.tensor import Shard as ByRows

    mesh = tensor.device_mesh
    if mesh.ndim != 1 or tuple(tensor.placements) != (ByRows(0),):
        raise ValueError(
            f"{name}: got a DTensor with placements {tuple(tensor.placements)} on a mesh of {mesh.ndim} "
            "dimensions, expected (Shard(0),) on one"
        )
    return mesh.get_group()


def _ranks(group: ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def group_called(name: str) -> ProcessGroup:
    """The process group of that name: an operator of ``torch.library`` can be handed no more than that."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


class Shard(NamedTuple):
    """The columns of this rank among those of its group."""

    group: ProcessGroup
    first: int  # id of the first
    size: int
    vocab: int  # columns of all ranks
    widest: int  # of one of them

    def lse(self, own: Tensor) -> Tensor:
        """(R,) over all shards, from that over this one."""
        peak = own.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        peak.clamp_(min=torch.finfo(peak.dtype).min)  # where all are −inf, no −inf − (−inf)
        total = torch.exp(own - peak)
        dist.all_reduce(total, group=self.group)
        return peak + total.log_()  # total ≥ 1 because the largest contributes exp(0)

    def allowance(self, tol: float, lse: Tensor) -> Allowance:
        """What this shard may leave out, by the rule at the top; ``lse`` (n,), over all shards, is written."""
        by_columns = self.size / self.vocab

        def of_rows(places: slice, own: Tensor) -> Tensor:
            whole = self.lse(own)
            lse[places] = whole
            of_all = tol * (1.0 - ROUNDING) / 2
            return of_all * (1.0 + by_columns * torch.exp(whole - own))  # over s_k: of its own

        return Allowance(self.widest, of_rows)

    def join(
        self,
        own: ForwardResult,  # of this shard
        labels: Tensor,  # (n,) ids among those of all ranks
        lse: Tensor,  # (n,) over all shards
    ) -> ForwardResult:
        """The results over all shards."""
        here = (labels >= self.first) & (labels < self.first + self.size)
        log_share = own.lse - lse  # ≤ 0
        # Where a bias forbids all of the shard, the label's logit is −inf and its own log-prob may be NaN.
        of_label = torch.where(own.lse == -torch.inf, -torch.inf, own.logps + log_share)
        parts = [torch.where(here, of_label, 0.0)]
        if own.entropy is None:
            (logps,) = self._sums(parts)
            return ForwardResult(logps, lse, None, None, None, None)
        assert own.top1 is not None
        assert own.logit_mean is not None
        assert own.peak is not None
        peak = own.peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.group)
        highest = own.peak == peak
        # In the label's shard another token is likelier, or one of a shard before it is as likely.
        better = torch.where(here, ~(own.top1 & highest), highest & (labels >= self.first))
        parts.append(_weighted(log_share, own.entropy - log_share))
        parts.append(own.logit_mean * (self.size / self.vocab))
        parts.append(better.to(lse.dtype))
        logps, entropy, logit_mean, betters = self._sums(parts)
        entropy = entropy.clamp(min=0.0)
        return ForwardResult(logps, lse, entropy, betters == 0.0, logit_mean, peak)

    def join_nuclei(self, log_share: Tensor, nuclei: Nuclei) -> tuple[Tensor, Tensor]:
        """(n,) the probability that each row drops over all shards, and the columns that it looks at."""
        height, n = block_rows(log_share.device), len(log_share)
        columns = torch.empty_like(log_share)
        columns[nuclei.order] = nuclei.counts.repeat_interleave(height)[:n].to(columns.dtype)
        dropped, columns = self._sums([_weighted(log_share, nuclei.dropped), columns])
        return dropped, columns

    def _sums(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """Of each over the shards, in one exchange; no two share memory, as an operator's outputs may not."""
        stacked = torch.stack(parts)
        dist.all_reduce(stacked, group=self.group)
        return tuple(part.clone() for part in stacked)


def _weighted(log_share: Tensor, mean: Tensor) -> Tensor:
    """What an average over a shard adds to that over all; that of a shard without a share may be NaN."""
    share = log_share.exp()
    return torch.where(share == 0.0, 0.0, share * mean)


def local_labels(labels: Tensor, first: int, size: int, elsewhere: int) -> Tensor:
    """Places of the labels among ``size`` columns from ``first`` on, ``elsewhere`` where they are not there."""
    here = (labels >= first) & (labels < first + size)
    return torch.where(here, labels - first, elsewhere)


def sharded_statistics(
    dropped: Tensor, columns: Tensor, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a certified call: most probability dropped, share of pairs looked at, rows that are dense."""
    if not len(dropped):
        none = dropped.new_zeros(())
        return none, none.clone(), none.long()
    return dropped.amax(), columns.mean() / vocab, (columns == vocab).sum()


def agree(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V_k, H)
    labels: Tensor,  # (N,)
    ignore_index: int,
    options: tuple[Any, ...],  # all else that must be the same on all ranks
    group: ProcessGroup,
) -> tuple[Shard, Tensor, int]:
    """This rank's shard, the kept rows first in an (N,) tensor, and how many they are.

    The one host read of a forward. It tells of every rank what it brings, so that ranks that do not fit
    together raise, all of them, instead of waiting for each other.

    Raises:
        ValueError: labels outside the vocabulary of all ranks; a rank without a row of ``weight``; shapes,
            labels or options that differ between ranks; under ``FASTPO_CHECK=1`` also hidden states.
    """
    kept = labels != ignore_index
    ids = torch.cat([torch.where(kept, labels, 0), labels.new_zeros(1)])
    checking = check_everything()
    options = (str(hidden.dtype), hidden.device.type, ignore_index, checking, *options)
    known = [weight.shape[0], *hidden.shape, zlib.crc32(repr(options).encode())]
    seen = torch.stack([kept.sum(), ids.amin(), ids.amax(), _digest(labels)])
    own = torch.cat([torch.tensor(known, device=labels.device), seen])
    rank = dist.get_rank(group)
    table = own.new_zeros(dist.get_world_size(group), len(own))
    table[rank] = own
    dist.all_reduce(table, group=group)
    sizes, *same = zip(*table.tolist(), strict=True)
    for what, values in zip(
        (
            "hidden: rows",
            "hidden: widths",
            "vocab_group: dtypes or options",
            "labels: labelled rows",
        ),
        same,
        strict=False,
    ):
        if len(set(values)) > 1:
            shown = "" if "options" in what else f", got {list(values)}"
            raise ValueError(
                f"{what} differ between the ranks of vocab_group{shown}, expected the same"
            )
    if len(set(same[-1])) > 1:
        raise ValueError(
            "labels: differ between the ranks of vocab_group, expected the same on all"
        )
    if min(sizes) == 0:
        raise ValueError(
            f"weight: got {list(sizes)} rows on the ranks of vocab_group, expected at least one on each"
        )
    vocab, count, lowest, highest = sum(sizes), same[3][0], same[4][0], same[5][0]
    if lowest < 0 or highest >= vocab:
        refuse_out_of_range(labels, ignore_index, vocab)
    rows = kept_first(kept)
    if checking:
        check_same("hidden", hidden[rows[:count]], rows[:count], group)
    return Shard(group, sum(sizes[:rank]), sizes[rank], vocab, max(sizes)), rows, count


def _digest(labels: Tensor) -> Tensor:
    """A number that hangs on every label and its place; int64 arithmetic wraps around."""
    mixed = (
        labels + torch.arange(len(labels), device=labels.device) * 0x5851F42D
    ) * 0x2545F4914F6CDD1D
    return ((mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85).sum()


def check_same(name: str, values: Tensor, rows: Tensor, group: ProcessGroup) -> None:
    """Raise, on all ranks, unless ``values`` (n, ...), which belong to ``rows`` (n,), are those of the first.

    Raises:
        ValueError: they differ; it names what differs, how many rows do, and the first.
    """
    own = values.detach().reshape(len(rows), -1).contiguous()
    first = own.clone()
    dist.broadcast(first, group=group, group_src=0)
    differ = ((own != first) & ~(own.isnan() & first.isnan())).any(dim=1).to(torch.int32)
    dist.all_reduce(differ, dist.ReduceOp.MAX, group=group)
    if bool(differ.any()):
        raise ValueError(
            f"{name}: {int(differ.sum())} labelled rows differ between the ranks of vocab_group, expected the "
            f"same on all; the first is flat row {int(rows[differ.argmax()])}"
        )


def sum_over_shards(gradient: Tensor, group: ProcessGroup) -> Tensor:
    """dH of all shards, from that of this one; summed up in float32, or float64, and rounded once."""
    wide = gradient.to(accumulation_dtype(gradient.dtype))
    dist.all_reduce(wide, group=group)
    return wide.to(gradient.dtype)
