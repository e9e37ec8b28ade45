"""``linear_logprobs``: per-token log-probabilities straight from hidden states and the LM head.

This file holds what is the same for every backend: dropping of rows without a label and the registration with
``torch.library``. Arguments are checked in ``arguments``. The arithmetic is in
``fastpo.kernels.linear_logprobs_torch`` and ``fastpo.kernels.linear_logprobs_triton``, that of the certified
backward in ``fastpo.kernels.certified_torch`` and ``fastpo.kernels.certified_triton``; what ranks exchange that
hold shards of a vocabulary, in ``vocab_parallel``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastpo.kernels.backends import choose_backend, linear_logprobs_module
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.nucleus import Nuclei, block_count, block_rows
from fastpo.kernels.precision import accumulation_dtype

from .arguments import check_arguments, check_tensors, kept_rows, under_autocast
from .certificate import check_certificate
from .certified import DEFAULT_TOL, blocks_of, check_backward, effective_tol, empty_blocks
from .checks import check_everything
from .differentiable_once import refuse_double_backward
from .vocab_parallel import (
    agree,
    check_same,
    group_called,
    local_labels,
    local_shard,
    sharded_statistics,
    sum_over_shards,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenStats(NamedTuple):
    """Detached statistics: of every token, shaped like ``labels``, 0 or False where ignored; and of the call.

    Those of the call are scalars on the device of ``hidden``: what the forward decided for a certified
    backward. Otherwise, and where no gradient is recorded, nothing is dropped and every pair is touched.
    """

    entropy: Tensor  # nats
    top1: Tensor  # bool: the label is the most probable token (of equal logits the lowest id)
    logit_mean: Tensor  # mean logit over the vocabulary
    dropped_mass_max: Tensor  # the largest probability that a row loses, at most tol
    active_fraction: (
        Tensor  # share of (labelled token, vocabulary entry) pairs that the backward touches
    )
    dense_rows: Tensor  # int64: labelled tokens whose gradient takes the whole vocabulary


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    low_memory: bool = False,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    low_memory: bool = False,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, TokenStats]: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    low_memory: bool = False,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, TokenStats]: ...


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    low_memory: bool = False,
    backend: str = "auto",
    vocab_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Log-probability of each label under softmax(z), z = softcap·tanh(scale·(W h + b)/softcap)/temperature.

    The N×V logits are never held: they are made in tiles of bounded size, and made again in the backward, there
    by the certified backward only where they matter: for each token all but ``tol`` of the probability.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or (PyTorch backend) float64; any strides.
        weight: (V, H), the LM head, same dtype and device as ``hidden``.
        labels: (...) int64, already shifted: ``labels[i]`` is the token scored from ``hidden[i]``
            (see :func:`fastpo.shift_labels`).
        bias: (V,) or None.
        logit_scale: factor on W h + b (Cohere's ``logit_scale``, 1/``logits_scaling`` of Granite).
        softcap: bound of the tanh cap (Gemma 2's ``final_logit_softcapping``), > 0, or None.
        temperature: divides the logits, > 0.
        ignore_index: rows with this label cost nothing, get log-prob 0 and no gradient.
        backward: ``"exact"``; ``"certified"``; or ``"auto"``, certified for bfloat16 and float16, else exact.
            The certified gradient of the logits is exact on a set of vocabulary entries and 0 elsewhere: for
            every token ‖error of d loss/d logits‖₁ ≤ tol·|d loss/d log-prob|.
        tol: the probability that the certified backward may leave out per token, in [0, 1); 0 is exact.
        low_memory: the certified backward makes dH and dW in two sweeps, which costs its logits twice and saves
            a float32 sum of the size of one of them, where ``weight`` is in low precision.
        backend: ``"auto"`` (Triton on CUDA, else PyTorch), ``"triton"`` or ``"torch"``.
        vocab_group: process group over which the rows of ``weight`` and ``bias`` are sharded: each rank passes
            its own, contiguous and in rank order, as many as it has but at least one. All ranks pass the same
            ``hidden``, ``labels`` (ids among the rows of all ranks) and options, get the same result, and must
            differentiate it alike, all or none with respect to ``hidden``: dH is summed up over the group, dW
            and db stay where their rows are. None, or a group of one rank: ``weight`` is whole. A ``weight``
            (and ``bias``) that is a DTensor, ``Shard(0)`` on a mesh of one dimension, brings its group along,
            and gets a DTensor for its gradient. See docs/many-devices.md.
        return_stats: also return :class:`TokenStats`.

    Returns:
        (...) log-probs in nats, ≤ 0, float32 (float64 for float64 inputs), differentiable once in ``hidden``,
        ``weight`` and ``bias``; with ``return_stats`` the pair (log-probs, :class:`TokenStats`).

    Raises:
        TypeError: an argument of the wrong dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, a label outside [0, V), a softcap or temperature ≤ 0, a
            tolerance outside [0, 1). With ``vocab_group``, on all its ranks: shapes of ``hidden``, labels or
            options that differ between them, or a rank without rows. Hidden states that differ, and gradients
            of the log-probs, are looked for under ``FASTPO_CHECK=1`` alone.

    Under autocast, ``hidden``, ``weight`` and ``bias`` are cast to the autocast dtype first, as a linear layer
    would do; float64 stays.
    """
    weight, bias, group = local_shard(weight, bias, vocab_group)
    check_tensors(bias=bias, hidden=hidden, weight=weight, labels=labels)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    return score(
        hidden,
        weight,
        labels,
        bias,
        None,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
        backward=backward,
        tol=tol,
        low_memory=low_memory,
        backend=backend,
        return_stats=return_stats,
        group=group,
    )


def score(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None,  # (V,)
    last_columns: Tensor | None,  # (V, K)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    low_memory: bool = False,
    backend: str = "auto",
    return_stats: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """:func:`linear_logprobs` on operands that are tensors, in the dtype in which they are to be multiplied.

    With ``last_columns``, which hold what the last K columns of ``weight`` hold, the gradient of the weight
    goes to them and is made for them alone, at 2·N·V·K flop in the place of 2·N·V·H; ``weight`` gets none.
    With ``group``, ``weight`` and ``bias`` are this rank's rows of a whole that the ranks share.
    """
    check_backward(backward, tol)
    check_arguments(
        hidden, weight, labels, bias, logit_scale, softcap, temperature, sharded=group is not None
    )
    choose_backend(backend, hidden.device, hidden.dtype)
    shape = labels.shape
    logps, _, _, _, entropy, top1, logit_mean, _, _, *per_call = _linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        bias,
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        backend,
        return_stats,
        effective_tol(backward, tol, (hidden, weight, bias, last_columns)),
        low_memory,
        last_columns,
        "" if group is None else group.group_name,
    )
    logps = logps.view(shape)
    if not return_stats:
        return logps
    stats = TokenStats(
        entropy.detach().view(shape),
        top1.view(shape),
        logit_mean.detach().view(shape),
        *(value.detach() for value in per_call),
    )
    return logps, stats


def shift_labels(input_ids: Tensor, completion_mask: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Labels for :func:`linear_logprobs`: position t scores token t + 1 where that is part of a completion.

    Args:
        input_ids: (B, T) int64.
        completion_mask: (B, T) bool or 0/1: which tokens are to be scored.
        ignore_index: what marks a position that scores nothing.

    Returns:
        (B, T) int64; the last column is ``ignore_index``.

    Raises:
        ValueError: the shapes differ.
    """
    if input_ids.shape != completion_mask.shape:
        raise ValueError(
            f"completion_mask: got shape {tuple(completion_mask.shape)}, expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    labels = torch.full_like(input_ids, ignore_index)
    labels[..., :-1] = torch.where(
        completion_mask[..., 1:].bool(), input_ids[..., 1:], ignore_index
    )
    return labels


@torch.library.custom_op("fastpo::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,
    want_stats: bool,
    tol: float,
    low_memory: bool,
    last_columns: Tensor | None = None,
    group: str = "",
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """(N,) log-probs, (N,) lse, (N,) kept rows first, their number on the CPU, three (N,) or (0,) statistics,
    column masks and counts of the blocks ((0,) for the exact backward), and three scalars of the call.

    The kept rows are in block order where there are blocks. ``low_memory`` is for the backward, and so are the
    ``last_columns`` (V, K) of the weight, which then take its gradient. ``group`` names the ranks over which a
    vocabulary is sharded, of which ``weight`` is this rank's part: results are then those of the whole, masks
    and counts those of the part, and beside the number of rows on the CPU stands the id of the part's first
    token.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    shard = None
    if group:
        options = (bias is None, logit_scale, softcap, temperature, want_stats, tol)
        shard, order, count = agree(
            hidden, weight, labels, ignore_index, options, group_called(group)
        )
    else:
        order, count = kept_rows(labels, ignore_index, weight.shape[0])
    rows = None if count == labels.numel() else order[:count]
    compact_labels = labels if rows is None else labels[rows]
    # Of a label in another shard any place serves: what is found there is not used.
    places = (
        compact_labels
        if shard is None
        else local_labels(compact_labels, shard.first, shard.size, elsewhere=0)
    )
    module = linear_logprobs_module(hidden, weight, backend, certified=tol > 0)
    arguments = (hidden, weight, bias, places, rows, transform, want_stats)
    if tol == 0:
        result = module.forward(*arguments)
        if shard is not None:
            result = shard.join(result, compact_labels, shard.lse(result.lse))
        columns, counts = (torch.empty(0, dtype=torch.int32, device=hidden.device) for _ in "ab")
        per_call = exact_statistics(count, hidden)
    else:
        if shard is None:
            result, nuclei = module.forward(*arguments, tol)
            per_call = _certified_statistics(nuclei, count, weight.shape[0])
        else:
            lse = hidden.new_empty(count, dtype=accumulation_dtype(hidden.dtype))
            allowance = shard.allowance(tol, lse)
            own, nuclei = module.forward(*arguments, tol, allowance=allowance)
            result = shard.join(own, compact_labels, lse)
            per_row = shard.join_nuclei(own.lse - lse, nuclei)
            per_call = sharded_statistics(*per_row, shard.vocab)
        order = torch.cat([order[:count][nuclei.order], order[count:]])
        columns, counts = blocks_of(nuclei, labels.numel(), weight.shape[0])

    def per_token(values: Tensor | None) -> Tensor:
        if values is None:
            return hidden.new_empty(0)
        return (
            values if rows is None else values.new_zeros(labels.shape).index_copy_(0, rows, values)
        )

    return (
        per_token(result.logps),
        per_token(result.lse),
        order,
        torch.tensor([count] if shard is None else [count, shard.first]),
        per_token(result.entropy),
        per_token(result.top1),
        per_token(result.logit_mean),
        columns,
        counts,
        *per_call,
    )


def exact_statistics(count: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of a call that decides nothing for its ``count`` labelled tokens."""
    wide = accumulation_dtype(hidden.dtype)
    return (
        torch.zeros((), dtype=wide, device=hidden.device),
        torch.ones((), dtype=wide, device=hidden.device),
        torch.full((), count, device=hidden.device),
    )


def _certified_statistics(nuclei: Nuclei, count: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    height = block_rows(nuclei.counts.device)
    if count == 0:
        return (
            nuclei.dropped.new_zeros(()),
            nuclei.dropped.new_zeros(()),
            nuclei.order.new_zeros(()),
        )
    heights = torch.full_like(nuclei.counts, height)
    heights[-1] = count - height * (heights.numel() - 1)
    touched = (heights * nuclei.counts.to(nuclei.dropped.dtype)).sum() / (count * vocab)
    dense = torch.where(nuclei.counts == vocab, heights, 0).sum()
    return nuclei.dropped.amax(), touched, dense


@_linear_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    backend: str,
    want_stats: bool,
    tol: float,
    low_memory: bool,
    last_columns: Tensor | None = None,
    group: str = "",
) -> tuple[Tensor, ...]:
    wide = accumulation_dtype(hidden.dtype)
    per_token = labels.new_empty(labels.shape, dtype=wide)
    if not want_stats:
        stats = [hidden.new_empty(0) for _ in range(3)]
    else:
        stats = [torch.empty_like(per_token) for _ in range(3)]
        stats[1] = stats[1].bool()
    return (
        per_token,
        torch.empty_like(per_token),
        torch.empty_like(labels),
        torch.empty(2 if group else 1, dtype=torch.int64, device="cpu"),
        *stats,
        *empty_blocks(labels, weight.shape[0], tol),
        per_token.new_empty(()),
        per_token.new_empty(()),
        labels.new_empty(()),
    )


@torch.library.custom_op("fastpo::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    order: Tensor,
    count: Tensor,
    columns: Tensor,
    counts: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    tol: float,
    low_memory: bool,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    last_columns: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH (N, H), dW (V, H), or (V, ``last_columns``) of so many, db (V,); (0,) for each that is not needed.

    dH is that of all ranks of ``group``.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    kept, *first = count.tolist()  # a CPU tensor: no device is waited for
    ranks = group_called(group) if group else None
    if ranks is not None:
        labels = local_labels(labels, first[0], weight.shape[0], elsewhere=-1)
    certified = tol > 0
    module = linear_logprobs_module(hidden, weight, backend, certified)
    needed = (need_hidden, need_weight, need_bias)
    rows = order[:kept]
    if ranks is not None and check_everything():
        in_order = rows.sort().values  # else by blocks, which every rank has of its own
        check_same("gradient of the log-probs", grad[in_order], in_order, ranks)
    if certified or kept < labels.numel():
        grad, lse, labels = grad[rows], lse[rows], labels[rows]
    if certified:
        used = block_count(kept, columns.device)
        blocks = (columns[:used], counts[:used])
        if check_everything():
            check_certificate(hidden, weight, bias, rows, lse, *blocks, transform, tol, group=ranks)
        gradients = module.backward(
            grad,
            hidden,
            weight,
            bias,
            labels,
            rows,
            lse,
            *blocks,
            transform,
            *needed,
            low_memory,
            last_columns,
        )
    else:
        gathered = rows if kept < order.numel() else None
        gradients = module.backward(
            grad.contiguous(),
            hidden,
            weight,
            bias,
            labels,
            gathered,
            lse,
            transform,
            *needed,
            last_columns,
        )
    d_hidden, *others = gradients
    if d_hidden is not None and ranks is not None:
        d_hidden = sum_over_shards(d_hidden, ranks)
    return tuple(hidden.new_empty(0) if g is None else g for g in (d_hidden, *others))  # type: ignore[return-value]


@_linear_logprobs_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    order: Tensor,
    count: Tensor,
    columns: Tensor,
    counts: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    tol: float,
    low_memory: bool,
    group: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    last_columns: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab, width = weight.shape
    trained = width if last_columns is None else last_columns
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty((vocab, trained) if need_weight else 0),
        hidden.new_empty(vocab if need_bias else 0),
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (hidden, weight, labels, bias, logit_scale, softcap, temperature, _, backend, _, tol, low_memory,
     last_columns, group) = inputs  # fmt: skip
    _, lse, order, count, entropy, top1, logit_mean, columns, counts, *per_call = output
    ctx.save_for_backward(hidden, weight, labels, bias, lse, order, count, columns, counts)
    ctx.options = (logit_scale, softcap, temperature, backend, tol, low_memory, group)
    ctx.last_columns = None if last_columns is None else last_columns.shape[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(
        lse, order, count, entropy, top1, logit_mean, columns, counts, *per_call
    )


def _differentiate(ctx, d_logps, *_):  # type: ignore[no-untyped-def]
    if d_logps is None:
        return (None,) * 14
    in_columns = ctx.last_columns is not None
    needed = [ctx.needs_input_grad[i] for i in (0, 12 if in_columns else 1, 3)]
    d_hidden, d_weight, d_bias = _linear_logprobs_backward(
        d_logps, *ctx.saved_tensors, *ctx.options, *needed, ctx.last_columns
    )
    d_weight = d_weight if needed[1] else None
    return (
        d_hidden if needed[0] else None,
        None if in_columns else d_weight,
        None,
        d_bias if needed[2] else None,
        *(None,) * 8,
        d_weight if in_columns else None,
        None,
    )


_linear_logprobs.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_double_backward(_linear_logprobs_backward, "fastpo.linear_logprobs")
