"""``noisy_linear_logprobs``: token log-probabilities under logits with trainable noise, as DNPO has them.

Checks and the registration with ``torch.library``; the arithmetic is in
``fastpo.kernels.noisy_linear_logprobs_torch`` and ``fastpo.kernels.noisy_linear_logprobs_triton``, that of the
certified backward in ``fastpo.kernels.certified_noisy_torch`` and ``fastpo.kernels.certified_noisy_triton``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastpo.kernels.backends import choose_backend, noisy_linear_logprobs_module
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.noise import Needed, Noise
from fastpo.kernels.nucleus import block_count
from fastpo.kernels.precision import accumulation_dtype

from .arguments import check_arguments, check_tensors, kept_rows, under_autocast
from .certificate import check_certificate
from .certified import DEFAULT_TOL, blocks_of, check_backward, effective_tol, empty_blocks
from .checks import check_everything
from .differentiable_once import refuse_double_backward
from .philox import SEEDS, check_seed


@overload
def noisy_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    noise_weight: Tensor,
    noise_bias: Tensor | None = None,
    *,
    seed: int,
    noise_proj: Tensor | None = None,
    token_index: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    backend: str = "auto",
    return_clean: Literal[False] = False,
) -> Tensor: ...


@overload
def noisy_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    noise_weight: Tensor,
    noise_bias: Tensor | None = None,
    *,
    seed: int,
    noise_proj: Tensor | None = None,
    token_index: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    backend: str = "auto",
    return_clean: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def noisy_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    noise_weight: Tensor,
    noise_bias: Tensor | None = None,
    *,
    seed: int,
    noise_proj: Tensor | None = None,
    token_index: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    backend: str = "auto",
    return_clean: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def noisy_linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    noise_weight: Tensor,  # (V, H) or (V, r)
    noise_bias: Tensor | None = None,  # (V,)
    *,
    seed: int,
    noise_proj: Tensor | None = None,  # (r, H)
    token_index: Tensor | None = None,  # (...)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    backward: str = "auto",
    tol: float = DEFAULT_TOL,
    backend: str = "auto",
    return_clean: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label under softmax(z + σ∘ε), σ = U h + s (U A h + s with ``noise_proj``).

    z is the logit of :func:`fastpo.linear_logprobs`; ε = :func:`fastpo.philox_normal` (seed, token index,
    vocabulary index), so the noise depends neither on batching nor on the device. Logits, σ and ε are held for
    one tile at a time, in the forward and, made again, in the backward, there by the certified backward only
    where they matter: for each token all but ``tol`` of the noisy probability.

    Source: the noise of DNPO (Yang et al., arXiv 2502.05400). The sign of σ is free, as ε is symmetric.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64.
        weight: (V, H), the LM head, same dtype and device as ``hidden``.
        labels: (...) int64, already shifted.
        noise_weight: U, (V, H), or (V, r) with ``noise_proj``; the dtype of ``hidden`` or float32.
        noise_bias: s, (V,), or None; dtypes as above.
        seed: of the noise, in [0, 2⁶⁴).
        noise_proj: A, (r, H), or None; dtypes as above.
        token_index: (...) int64, which token each row is, as the noise is to see it; None: 0 to N − 1.
        bias: (V,) of the LM head, or None.
        logit_scale, softcap, temperature: of z, as in :func:`fastpo.linear_logprobs`; the noise is added to z.
        ignore_index: rows with this label cost nothing, get log-prob 0 and no gradient.
        backward: ``"exact"``; ``"certified"``; or ``"auto"``, as in :func:`fastpo.linear_logprobs`. The
            certified gradient is exact on a set of vocabulary entries and 0 elsewhere: for every token
            ‖error of d loss/d z‖₁ ≤ tol·|d loss/d log-prob|, and at most max |ε| times that for σ.
        tol: the probability that the certified backward may leave out per token, in [0, 1); 0 is exact.
        backend: ``"auto"`` (Triton on CUDA, else PyTorch), ``"triton"`` or ``"torch"``.
        return_clean: also return the log-probs without the noise, which cost no product more.

    Returns:
        (...) log-probs in nats, float32 (float64 for float64 inputs), differentiable once in ``hidden``,
        ``weight``, ``bias``, ``noise_weight``, ``noise_bias`` and ``noise_proj``; with ``return_clean`` the
        pair (noisy, clean), the clean ones detached.

    Raises:
        TypeError: an argument of the wrong dtype.
        ValueError: shapes or devices that do not fit, a label outside [0, V), a seed out of range, a tolerance
            outside [0, 1).

    Memory beyond inputs and gradients: tiles of bounded size, 4·N·H bytes where ``hidden`` has a gradient, and
    4·N·r with ``noise_proj`` (8·N·r in the backward). The Triton kernels also hold the labelled rows of
    ``hidden`` in the backward and, beside 16-bit states, 6·N·r bytes with ``noise_proj``; a certified backward
    of full rank takes the 4·N·H twice. In float16 they need |``noise_proj`` h| and |``noise_weight``| < 65504.
    """
    check_tensors(bias=bias, hidden=hidden, weight=weight, labels=labels, noise_weight=noise_weight)
    check_backward(backward, tol)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_arguments(hidden, weight, labels, bias, logit_scale, softcap, temperature)
    check_seed(seed)
    _check_noise(hidden, weight, noise_weight, noise_bias, noise_proj)
    if token_index is None:
        token_index = torch.arange(labels.numel(), device=labels.device)
    elif not isinstance(token_index, Tensor):
        raise TypeError(f"token_index: got {type(token_index).__name__}, expected a tensor or None")
    elif token_index.device != labels.device:
        raise ValueError(
            f"token_index: got device {token_index.device}, expected that of labels, {labels.device}"
        )
    elif token_index.dtype != torch.int64 or token_index.shape != labels.shape:
        raise ValueError(
            f"token_index: got {token_index.dtype} of shape {tuple(token_index.shape)}, expected "
            f"torch.int64 of that of labels, {tuple(labels.shape)}"
        )
    choose_backend(backend, hidden.device, hidden.dtype)
    leaves = (hidden, weight, bias, noise_weight, noise_bias, noise_proj)
    logps, _, _, _, clean, _, _ = _noisy_linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        bias,
        noise_weight,
        noise_bias,
        noise_proj,
        token_index.reshape(-1),
        seed if seed < SEEDS // 2 else seed - SEEDS,  # operators take signed integers
        float(logit_scale),
        None if softcap is None else float(softcap),
        float(temperature),
        ignore_index,
        return_clean,
        backend,
        effective_tol(backward, tol, leaves),
    )
    logps = logps.view(labels.shape)
    return (logps, clean.detach().view(labels.shape)) if return_clean else logps


def _check_noise(
    hidden: Tensor,
    weight: Tensor,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    noise_proj: Tensor | None,
) -> None:
    for name, tensor in (("noise_bias", noise_bias), ("noise_proj", noise_proj)):
        if not (tensor is None or isinstance(tensor, Tensor)):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor or None")
    vocab, width = weight.shape
    rank = width
    if noise_proj is not None:
        if noise_proj.dim() != 2 or noise_proj.shape[1] != width or noise_proj.shape[0] == 0:
            raise ValueError(
                f"noise_proj: got shape {tuple(noise_proj.shape)}, expected (r, {width}) with r ≥ 1"
            )
        rank = noise_proj.shape[0]
    if noise_weight.shape != (vocab, rank):
        raise ValueError(
            f"noise_weight: got shape {tuple(noise_weight.shape)}, expected {(vocab, rank)} for weight "
            f"{tuple(weight.shape)}" + ("" if noise_proj is None else f" and rank {rank}")
        )
    if noise_bias is not None and noise_bias.shape != (vocab,):
        raise ValueError(
            f"noise_bias: got shape {tuple(noise_bias.shape)}, expected {(vocab,)} as weight has rows"
        )
    for name, tensor in (
        ("noise_weight", noise_weight),
        ("noise_bias", noise_bias),
        ("noise_proj", noise_proj),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"{name}: got dtype {tensor.dtype}, expected {hidden.dtype} as hidden has, or torch.float32"
            )
        if tensor.device != hidden.device:
            raise ValueError(
                f"{name}: got device {tensor.device}, expected that of hidden, {hidden.device}"
            )


@torch.library.custom_op("fastpo::noisy_linear_logprobs", mutates_args=())
def _noisy_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    noise_proj: Tensor | None,
    token_index: Tensor,
    seed: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    want_clean: bool,
    backend: str,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(N,) log-probs, (N,) lse, (N,) kept rows first, their number on the CPU, (N,) or (0,) clean log-probs,
    column masks and counts of the blocks ((0,) for the exact backward).

    The kept rows are in block order where there are blocks.
    """
    order, count = kept_rows(labels, ignore_index, weight.shape[0])
    rows = order[:count]
    module = noisy_linear_logprobs_module(hidden, weight, backend, certified=tol > 0)
    arguments = (
        hidden, weight, bias, labels[rows], rows, LogitTransform(logit_scale, softcap, temperature),
        Noise(noise_weight, noise_proj, noise_bias, seed % SEEDS, token_index[rows]), want_clean,
    )  # fmt: skip
    if tol == 0:
        result = module.forward(*arguments)
        columns, counts = (torch.empty(0, dtype=torch.int32, device=hidden.device) for _ in "ab")
    else:
        result, nuclei = module.forward(*arguments, tol)
        order = torch.cat([rows[nuclei.order], order[count:]])
        columns, counts = blocks_of(nuclei, labels.numel(), weight.shape[0])
    logps, lse, clean = (
        result.logps.new_empty(0)
        if values is None
        else values.new_zeros(labels.shape).index_copy_(0, rows, values)
        for values in result
    )
    return logps, lse, order, torch.tensor([count]), clean, columns, counts


@_noisy_linear_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    per_token = labels.new_empty(labels.shape, dtype=accumulation_dtype(hidden.dtype))
    want_clean, _, tol = others[-3:]
    return (
        per_token,
        torch.empty_like(per_token),
        torch.empty_like(labels),
        torch.empty(1, dtype=torch.int64, device="cpu"),
        torch.empty_like(per_token) if want_clean else per_token.new_empty(0),
        *empty_blocks(labels, weight.shape[0], tol),
    )


@torch.library.custom_op("fastpo::noisy_linear_logprobs_backward", mutates_args=())
def _noisy_linear_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    noise_proj: Tensor | None,
    token_index: Tensor,
    lse: Tensor,
    order: Tensor,
    count: Tensor,
    columns: Tensor,
    counts: Tensor,
    seed: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    backend: str,
    tol: float,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients in the order of ``Needed``; (0,) for each that is not needed."""
    kept = int(count)  # a CPU tensor: no device is waited for
    rows = order[:kept]
    transform = LogitTransform(logit_scale, softcap, temperature)
    noise = Noise(noise_weight, noise_proj, noise_bias, seed % SEEDS, token_index[rows])
    used = block_count(kept, columns.device)
    blocks = (columns[:used], counts[:used]) if tol > 0 else ()
    if blocks and check_everything():
        check_certificate(hidden, weight, bias, rows, lse[rows], *blocks, transform, tol, noise)
    module = noisy_linear_logprobs_module(hidden, weight, backend, certified=tol > 0)
    found = module.backward(
        grad[rows], hidden, weight, bias, labels[rows], rows, lse[rows], *blocks, transform, noise,
        Needed(*needed),
    )  # fmt: skip
    return [hidden.new_empty(0) if g is None else g for g in found]


@_noisy_linear_logprobs_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    noise_weight: Tensor,
    noise_bias: Tensor | None,
    noise_proj: Tensor | None,
    *others: Any,
) -> list[Tensor]:
    inputs = (hidden, weight, bias, noise_weight, noise_proj, noise_bias)
    return [
        t.new_empty(t.shape) if t is not None and wanted else hidden.new_empty(0)
        for t, wanted in zip(inputs, others[-1], strict=True)
    ]


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, seed, logit_scale, softcap, temperature, _, _, backend, tol = inputs
    _, lse, order, count, clean, columns, counts = output
    ctx.save_for_backward(*tensors, lse, order, count, columns, counts)
    ctx.options = (seed, logit_scale, softcap, temperature, backend, tol)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, order, count, clean, columns, counts)


def _differentiate(ctx, d_logps, *_):  # type: ignore[no-untyped-def]
    places = (0, 1, 3, 4, 6, 5)  # of the fields of Needed among the inputs
    gradients: list[Tensor | None] = [None] * 16
    if d_logps is None:
        return tuple(gradients)
    needed = [ctx.needs_input_grad[k] for k in places]
    found = _noisy_linear_logprobs_backward(d_logps, *ctx.saved_tensors, *ctx.options, needed)
    for place, wanted, gradient in zip(places, needed, found, strict=True):
        gradients[place] = gradient if wanted else None
    return tuple(gradients)


_noisy_linear_logprobs.register_autograd(_differentiate, setup_context=_save_for_backward)
refuse_double_backward(_noisy_linear_logprobs_backward, "fastpo.noisy_linear_logprobs")
