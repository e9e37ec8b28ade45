"""``linear_logprobs``: per-token log-probabilities straight from hidden states and the LM head.

This file holds what is the same for every backend: validation, dropping of rows without a label, and the
registration with ``torch.library``. The arithmetic is in ``fastpo.kernels.linear_logprobs_torch`` and
``fastpo.kernels.linear_logprobs_triton``.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastpo.kernels.backends import choose_backend, linear_logprobs_module
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.precision import TORCH_DTYPES, accumulation_dtype

from .differentiable_once import refuse_double_backward

BACKWARDS = ("auto", "exact")


class TokenStats(NamedTuple):
    """Detached statistics of every token's distribution, shaped like ``labels``; 0 or False where ignored."""

    entropy: Tensor  # nats
    top1: Tensor  # bool: the label is the most probable token (of equal logits the lowest id)
    logit_mean: Tensor  # mean logit over the vocabulary


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
    backend: str = "auto",
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
    backend: str = "auto",
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
    backend: str = "auto",
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
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Log-probability of each label under softmax(z), z = softcap·tanh(scale·(W h + b)/softcap)/temperature.

    The N×V logits are never held: they are made in tiles of bounded size, and made again in the backward.

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
        backward: ``"exact"`` or ``"auto"``, which is exact.
        backend: ``"auto"`` (Triton on CUDA, else PyTorch), ``"triton"`` or ``"torch"``.
        return_stats: also return :class:`TokenStats`.

    Returns:
        (...) log-probs in nats, ≤ 0, float32 (float64 for float64 inputs), differentiable once in ``hidden``,
        ``weight`` and ``bias``; with ``return_stats`` the pair (log-probs, :class:`TokenStats`).

    Raises:
        TypeError: an argument of the wrong dtype, or dtypes that differ.
        ValueError: shapes or devices that do not fit, a label outside [0, V), a softcap or temperature ≤ 0.

    Under autocast, ``hidden``, ``weight`` and ``bias`` are cast to the autocast dtype first, as a linear layer
    would do; float64 stays.
    """
    if backward not in BACKWARDS:
        raise ValueError(f"backward: got {backward!r}, expected one of {', '.join(BACKWARDS)}")
    _check_tensors(hidden=hidden, weight=weight, labels=labels, bias=bias)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden, weight = _autocast(hidden), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    _check_arguments(hidden, weight, labels, bias, logit_scale, softcap, temperature)
    choose_backend(backend, hidden.device, hidden.dtype)
    shape = labels.shape
    logps, _, _, _, entropy, top1, logit_mean = _linear_logprobs(
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
    )
    logps = logps.view(shape)
    if not return_stats:
        return logps
    stats = TokenStats(
        entropy.detach().view(shape), top1.view(shape), logit_mean.detach().view(shape)
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


def _check_tensors(bias: Tensor | None, **required: Tensor) -> None:
    if not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"bias: got {type(bias).__name__}, expected a tensor or None")
    for name, value in required.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")


def _autocast(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    if hidden.dtype not in TORCH_DTYPES:
        raise TypeError(
            f"hidden: got dtype {hidden.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if hidden.dim() == 0:
        raise ValueError("hidden: got a scalar, expected shape (..., H)")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected (V, {hidden.shape[-1]}) with V ≥ 1 "
            f"for hidden {tuple(hidden.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: got shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])} "
            f"for hidden {tuple(hidden.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: got dtype {labels.dtype}, expected torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},) as weight has rows"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name}: got dtype {tensor.dtype}, expected that of hidden, {hidden.dtype}"
            )
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected that of hidden, {hidden.device}"
            )
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale: got {logit_scale}, expected a finite number")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap: got {softcap}, expected a finite number > 0, or None")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")


def kept_rows(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, int]:
    """Indices of the rows that carry a label, first in an (N,) tensor, and how many they are.

    The one host read of a forward; it also carries how many labels are out of range.

    Raises:
        ValueError: a label that is neither ``ignore_index`` nor in [0, vocab).
    """
    kept = labels != ignore_index
    bad = kept & ((labels < 0) | (labels >= vocab))
    # A stable sort puts the kept rows first without a data-dependent shape, hence without a second read.
    rows = torch.sort(~kept, stable=True).indices
    count, bad_count = torch.stack([kept.sum(), bad.sum()]).tolist()
    if bad_count:
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: {bad_count} of {count} outside [0, {vocab}) and not ignore_index {ignore_index}; "
            f"the first is {int(labels[first])} at flat position {first}"
        )
    return rows, count


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(N,) log-probs, (N,) lse, (N,) kept rows first, their number on the CPU, and three (N,) or (0,) stats."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    order, count = kept_rows(labels, ignore_index, weight.shape[0])
    rows = None if count == labels.numel() else order[:count]
    compact_labels = labels if rows is None else labels[rows]
    result = linear_logprobs_module(hidden, weight, backend).forward(
        hidden, weight, bias, compact_labels, rows, transform, want_stats
    )

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
        torch.tensor([count]),
        per_token(result.entropy),
        per_token(result.top1),
        per_token(result.logit_mean),
    )


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
        torch.empty(1, dtype=torch.int64, device="cpu"),
        *stats,
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
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH (N, H), dW (V, H), db (V,); (0,) for each that is not needed."""
    transform = LogitTransform(logit_scale, softcap, temperature)
    kept = int(count)  # a CPU tensor: no device is waited for
    if kept == labels.numel():
        rows, grad, lse = None, grad.contiguous(), lse
    else:
        rows = order[:kept]
        grad, lse, labels = grad[rows], lse[rows], labels[rows]
    gradients = linear_logprobs_module(hidden, weight, backend).backward(
        grad,
        hidden,
        weight,
        bias,
        labels,
        rows,
        lse,
        transform,
        need_hidden,
        need_weight,
        need_bias,
    )
    return tuple(hidden.new_empty(0) if g is None else g for g in gradients)  # type: ignore[return-value]


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
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if needed else 0)

    return (
        like(hidden, need_hidden),
        like(weight, need_weight),
        hidden.new_empty(weight.shape[0] if need_bias else 0),
    )


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, weight, labels, bias, logit_scale, softcap, temperature, _, backend, _ = inputs
    _, lse, order, count, *stats = output
    ctx.save_for_backward(hidden, weight, labels, bias, lse, order, count)
    ctx.options = (logit_scale, softcap, temperature, backend)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, order, count, *stats)


def _differentiate(ctx, d_logps, *_):  # type: ignore[no-untyped-def]
    if d_logps is None:
        return (None,) * 10
    hidden, weight, labels, bias, lse, order, count = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    d_hidden, d_weight, d_bias = _linear_logprobs_backward(
        d_logps, hidden, weight, labels, bias, lse, order, count, *ctx.options, *needed
    )
    return (
        d_hidden if needed[0] else None,
        d_weight if needed[1] else None,
        None,
        d_bias if needed[2] else None,
        *(None,) * 6,
    )


_linear_logprobs.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_double_backward(_linear_logprobs_backward, "fastpo.linear_logprobs")
