"""``preference_epilogue``: token log-probs → sums → gaps → γ → losses as one operation, one launch on CUDA.

Registered with ``torch.library``; the formula is at the top of ``fastpo.kernels.preference_epilogue_torch``.
The forward already knows d loss/d token log-prob, one coefficient per sequence; the backward spreads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.kernels import preference_epilogue_torch as reference
from fastpo.kernels.backends import choose_backend
from fastpo.kernels.preference_epilogue_torch import EpilogueResult, PairLoss

from .checks import check_boundaries
from .differentiable_once import refuse_double_backward


def epilogue_backend(token_logps: Tensor, pairs: int, extra_gaps: int, backend: str) -> str:
    """``"triton"`` where the one-launch kernel takes such a call, else ``"torch"``."""
    if choose_backend(backend, token_logps.device, token_logps.dtype) == "torch":
        return "torch"
    from fastpo.kernels import preference_epilogue_triton as one_launch

    return "torch" if one_launch.supported(token_logps, pairs, extra_gaps) else "triton"


def preference_epilogue(
    token_logps: Tensor,  # (2B, T) or (N,)
    labels: Tensor,  # same shape, int64
    loss: PairLoss,
    *,
    beta: float,
    gamma0: float = 0.0,
    tau: float | None = None,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    ref_logps: Tensor | None = None,  # (2B,)
    extra_gaps: Tensor | None = None,  # (E,)
    ignore_index: int = -100,
    backend: str = "auto",
) -> EpilogueResult:
    """Losses of B pairs and everything on the way there; arguments and errors as in the kernels' twin.

    ``losses`` and ``logps`` of the result are differentiable, once, in ``token_logps``; ``backend`` is
    ``"torch"``, ``"triton"`` or ``"auto"``.
    """
    sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    extra = 0 if extra_gaps is None else extra_gaps.numel()
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, token_logps.numel())
    results = _preference_epilogue(
        token_logps,
        labels,
        cu_seqlens,
        ref_logps,
        extra_gaps,
        *_flat(loss),
        float(beta),
        float(gamma0),
        None if tau is None else float(tau),
        ignore_index,
        epilogue_backend(token_logps, sequences // 2, extra, backend),
    )
    losses, logps, lengths, gaps, gamma, coefficients = results
    return EpilogueResult(
        losses,
        logps,
        lengths,
        gaps.detach(),
        None if tau is None else gamma.detach(),
        coefficients.detach(),
    )


def _flat(loss: PairLoss) -> tuple[Any, ...]:
    """The fields of a loss as the schema of an operation can hold them."""
    return (
        loss.link,
        loss.reference,
        loss.averaged,
        loss.centred,
        float(loss.right),
        float(loss.wrong),
        float(loss.length_penalty),
    )


@torch.library.custom_op("fastpo::preference_epilogue", mutates_args=())
def _preference_epilogue(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    extra_gaps: Tensor | None,
    link: str,
    has_reference: bool,
    averaged: bool,
    centred: bool,
    right: float,
    wrong: float,
    length_penalty: float,
    beta: float,
    gamma0: float,
    tau: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of an ``EpilogueResult``; γ of shape (0,) without ``tau``."""
    run = reference.preference_epilogue
    if backend == "triton":
        from fastpo.kernels import preference_epilogue_triton

        run = preference_epilogue_triton.preference_epilogue
    result = run(
        token_logps,
        labels,
        PairLoss(link, has_reference, averaged, centred, right, wrong, length_penalty),  # type: ignore[arg-type]
        beta=beta,
        gamma0=gamma0,
        tau=tau,
        cu_seqlens=cu_seqlens,
        ref_logps=ref_logps,
        extra_gaps=extra_gaps,
        ignore_index=ignore_index,
    )
    gamma = result.losses.new_empty(0) if result.gamma is None else result.gamma
    return (
        result.losses,
        result.logps,
        result.lengths,
        result.gaps,
        gamma,
        result.coefficients,
    )


@_preference_epilogue.register_fake
def _(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    extra_gaps: Tensor | None,
    link: str,
    has_reference: bool,
    averaged: bool,
    centred: bool,
    right: float,
    wrong: float,
    length_penalty: float,
    beta: float,
    gamma0: float,
    tau: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = token_logps.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    pairs = sequences // 2

    def empty(length: Any) -> Tensor:
        return token_logps.new_empty(length, dtype=torch.float32)

    return (
        empty(pairs),
        empty(sequences),
        labels.new_empty(sequences, dtype=torch.int64),
        empty(pairs),
        empty(0 if tau is None else pairs),
        empty(sequences),
    )


@torch.library.custom_op("fastpo::preference_epilogue_backward", mutates_args=())
def _preference_epilogue_backward(
    per_sequence: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """Each sequence's coefficient on its labelled tokens, in the dtype of the token log-probs."""
    spread = reference.expand_to_tokens(
        per_sequence, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index
    )
    return spread.to(token_logps.dtype)


@_preference_epilogue_backward.register_fake
def _(
    per_sequence: Tensor,
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(token_logps, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    token_logps, labels, cu_seqlens = inputs[:3]
    coefficients = output[-1]
    ctx.save_for_backward(token_logps, labels, cu_seqlens, coefficients)
    ctx.ignore_index = inputs[-2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx: Any, d_losses: Tensor | None, d_logps: Tensor | None, *_: Any) -> Any:
    nothing = (None,) * 16
    if d_losses is None and d_logps is None:
        return None, *nothing
    token_logps, labels, cu_seqlens, coefficients = ctx.saved_tensors
    per_sequence = torch.zeros_like(coefficients) if d_logps is None else d_logps
    if d_losses is not None:
        per_sequence = per_sequence + torch.cat([d_losses, d_losses]) * coefficients
    gradient = _preference_epilogue_backward(
        per_sequence, token_logps, labels, cu_seqlens, ctx.ignore_index
    )
    return gradient, *nothing


_preference_epilogue.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_double_backward(_preference_epilogue_backward, "fastpo's preference epilogue")
