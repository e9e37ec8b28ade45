"""What gradient checkpoints keep of a layer, its hidden states, waits for the backward in the host's memory.

transformers gives every layer that it checkpoints a function to run it with. Around that function go hooks of
autograd which copy what is saved to the host in the forward and back in the backward. Both copies are queued on
the stream that computes: nothing waits for them but what comes after. transformers has an option for this too,
but not in every version that is supported, only beside an accelerator, and it copies masks for each layer anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_RUN_LAYER = "_gradient_checkpointing_func"  # transformers' name


def offload_activations(
    model: nn.Module,
    to_host: Callable[[Tensor], Any] | None = None,
    to_device: Callable[[Any], Tensor] | None = None,
) -> None:
    """Have the checkpointed layers of ``model`` keep their hidden states in the host's memory.

    Call it after transformers has switched gradient checkpointing on, and again whenever it did so.

    Args:
        model: a transformers model, bare or wrapped.
        to_host, to_device: take the place of :func:`keep_on_host` and :func:`bring_back`.

    Raises:
        ValueError: no layer is checkpointed by transformers.
    """
    hooks = to_host or keep_on_host, to_device or bring_back
    around: dict[int, Callable[..., Any]] = {}  # all layers usually share one function
    for module in model.modules():
        run = getattr(module, _RUN_LAYER, None)
        if not (run and getattr(module, "gradient_checkpointing", False)):
            continue
        if not hasattr(run, "fastpo_offloads"):
            setattr(module, _RUN_LAYER, around.setdefault(id(run), _with_hooks(run, *hooks)))
        else:
            around[id(run)] = run
    if not around:
        raise ValueError(
            f"activation_offloading: got True, but {type(model).__name__} has no layer that transformers "
            "checkpoints; expected gradient_checkpointing: true and a model that supports it"
        )


def _with_hooks(
    run: Callable[..., Any], to_host: Callable[[Tensor], Any], to_device: Callable[[Any], Tensor]
) -> Callable[..., Any]:
    @functools.wraps(run)
    def offloading(*arguments: Any, **options: Any) -> Any:
        # What the layer saves inside goes to the checkpoint's own hooks, which keep nothing: only its inputs
        # come to these.
        with saved_tensors_hooks(to_host, to_device):
            return run(*arguments, **options)

    offloading.fastpo_offloads = True  # type: ignore[attr-defined]
    return offloading


def keep_on_host(tensor: Tensor) -> tuple[torch.device | None, Tensor]:
    """The device of a hidden state and a copy of it on the host, in pinned memory for an accelerator's.

    Masks and positions, which some models pass on to every layer, have no gradient and stay: each is there
    once for all layers. So does the empty tensor by which PyTorch's checkpoints note that they are due.
    """
    if not tensor.requires_grad or not tensor.numel():
        return None, tensor
    pinned = tensor.device.type not in ("cpu", "mps")  # Apple's GPUs share the host's memory
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return tensor.device, host.copy_(tensor.detach(), non_blocking=pinned)


def bring_back(kept: tuple[torch.device | None, Tensor]) -> Tensor:
    """The tensor that :func:`keep_on_host` was given."""
    device, tensor = kept
    return tensor if device is None else tensor.to(device, non_blocking=True)


class OffloadCallback(TrainerCallback):
    """Offloads activations as soon as transformers' Trainer has switched gradient checkpointing on."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        offload_activations(model)
