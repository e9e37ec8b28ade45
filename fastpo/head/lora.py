"""LoRA on the head: log-probs from one product of concatenated operands, equal to what PEFT's layer computes.

    u_k = s_k·dropout_k(h) A_kᵀ
    logits = h Wᵀ + b + Σ_k (u_k B_kᵀ + s_k c_k) = [h, u]·[W, B]ᵀ + b + Σ_k s_k c_k

for the active adapters k, of rank r_k; c_k is the bias of ``lora_bias=True``. Shapes: h (..., H), u (..., r),
W (V, H), B (V, r), r = Σ r_k. To the operation that is a head of H + r inputs; its logits never exist.

Memory: [W, B] is V·(H + r) elements in the dtype of the product, a copy of W that a call holds from its forward
to the end of its backward; [h, u] and its gradient are as large as the hidden states. Time: of the gradient of
[W, B] only the last r columns are made, at 2·N·V·r flop, unless W is trained too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.head.causal_lm import is_plain_linear
from fastpo.ops.arguments import dtype_under_autocast
from fastpo.ops.linear_logprobs import TokenStats, linear_logprobs, score

# [W, B] is filled up with columns of zeros to a multiple of so many: bulk copies of Triton's kernels need it.
ALIGNMENT = 16


def is_lora(layer: nn.Module) -> bool:
    """Whether ``layer`` is PEFT's LoRA around a linear layer, of whichever variant."""
    # Where PEFT has not been imported, no layer is of its classes.
    peft_layers = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(layer, peft_layers.Linear)


def is_plain_lora(layer: Any) -> bool:
    """Whether ``layer`` computes the formula above: LoRA on plain layers, no variant (DoRA and others)."""
    if not is_lora(layer):
        return False
    plain_forward = sys.modules["peft.tuners.lora.layer"].Linear.forward
    parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
    return (
        type(layer).forward is plain_forward
        and not layer.lora_variant
        and all(is_plain_linear(part) for part in parts)
    )


def lora_logprobs(
    layer: Any,  # of which is_plain_lora
    operation: Callable[..., Any],
    hidden: Tensor,  # (..., H)
    labels: Tensor,  # (...)
    **options: Any,
) -> Any:
    """What :func:`fastpo.linear_logprobs` returns, for the logits of ``layer``, adapters on or off.

    Differentiable in ``hidden``, in A and B, and in the base's weight and bias where they are trained. Dropout
    is drawn as the layer draws it, for all rows at once.

    Args:
        layer: the head. Each weight is read in the forward of the module that owns it, where FSDP and DeepSpeed
            have gathered it.
        operation: what is called for the base without adapter; with one it must be ``linear_logprobs``.
        hidden: in the dtype of the base's weight, unless under autocast; the adapter's product is made in the
            adapter's own dtype and rounded to that of the base.
        labels: int64.
        options: of :func:`fastpo.linear_logprobs`.

    Raises:
        ValueError: an operation of one's own while an adapter is active.
    """
    base = layer.base_layer
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as the layer's own forward would
    off = layer.disable_adapters or layer.merged
    active = [] if off else [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return _in_forward_of(
            base,
            lambda h: _no_view(operation(h, base.weight, labels, base.bias, **options)),
            hidden,
        )
    if operation is not linear_logprobs:
        raise ValueError(
            f"operation: the head carries the active LoRA adapter {', '.join(active)}, expected it disabled "
            "(disable_adapter) where the operation is not fastpo.linear_logprobs"
        )
    inputs, columns, biases = zip(*(_adapter(layer, name, hidden) for name in active), strict=True)

    def logprobs(h: Tensor) -> Any:
        dtype = dtype_under_autocast(base.weight.dtype, h.device.type)
        weight, last_columns = _extended(base.weight, columns, dtype)
        h = h.to(dtype_under_autocast(h.dtype, h.device.type))
        wide = torch.cat([h, *(u.to(h.dtype) for u in inputs)], dim=-1)
        wide = nn.functional.pad(wide, (0, weight.shape[1] - wide.shape[-1]))
        given = [b.to(dtype) for b in (base.bias, *biases) if b is not None]
        bias = sum(given[1:], given[0]) if given else None
        return _no_view(score(wide, weight, labels, bias, last_columns, **options))

    return _in_forward_of(base, logprobs, hidden)


def _adapter(layer: Any, name: str, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """u (..., r), B (V, r) and s·c (V,) or None, of one adapter."""
    lora_a, lora_b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    x = hidden.to(lora_a.weight.dtype) if layer.cast_input_dtype_enabled else hidden
    u = lora_a(layer.lora_dropout[name](x)) * scale

    def weights(_: Tensor) -> tuple[Tensor, Tensor | None]:
        # Copies: hooks on an output (FSDP's) must not end up on the parameter itself.
        return lora_b.weight.clone(), None if lora_b.bias is None else lora_b.bias * scale

    return u, *_in_forward_of(lora_b, weights, u)


def _extended(
    weight: Tensor,  # (V, H)
    columns: tuple[Tensor, ...],  # (V, r_k) each
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """[W, B], zeros after it, and what takes the gradient of its last columns if W is frozen: (V, ≥ r)."""
    vocab, width = weight.shape
    rank = sum(part.shape[1] for part in columns)
    padding = weight.new_zeros(vocab, -(width + rank) % ALIGNMENT, dtype=dtype)
    last = torch.cat([*(part.to(dtype) for part in columns), padding], dim=1)
    if torch.is_grad_enabled() and weight.requires_grad:
        return torch.cat([weight.to(dtype), last], dim=1), None
    whole = weight.new_empty(vocab, width + last.shape[1], dtype=dtype)
    with torch.no_grad():
        whole[:, :width].copy_(weight)
        whole[:, width:].copy_(last)
    return whole, last if last.requires_grad else None


def _no_view(result: Tensor | tuple[Tensor, TokenStats]) -> Any:
    """A module's output for FSDP, which warns of views: an in-place change of one would lose its hooks."""
    return (result[0].clone(), result[1]) if isinstance(result, tuple) else result.clone()


def _in_forward_of(module: nn.Module, compute: Callable[[Tensor], Any], x: Tensor) -> Any:
    """``compute(x)`` as the forward of ``module``, between its hooks."""
    if torch.compiler.is_compiling():
        return compute(
            x
        )  # a graph cannot take an attribute off a module again; it has no such hooks
    previous = vars(module).get("forward")
    module.forward = compute  # type: ignore[method-assign]
    try:
        return module(x)
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous  # type: ignore[method-assign]
