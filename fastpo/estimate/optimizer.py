"""The optimizer of a run on fake parameters: its state, and what a step of it holds for a moment."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

if TYPE_CHECKING:
    from .config import EstimateConfig

# bitsandbytes keeps so many moments per parameter; its kernels do not run on fake tensors.
_MOMENTS = {"ademamix": 3, "adamw": 2, "lion": 1, "rmsprop": 1}
_BLOCK = 256  # numbers of an 8-bit moment that share a float32 scale
_LEAST_SIZE = 4096  # below it a parameter's moments stay in float32


def make_optimizer(
    config: EstimateConfig, parameters: Sequence[Tensor], on_cuda: bool
) -> Callable[[], None]:
    """The optimizer's step, which is a function of no arguments; its state is made in the first.

    AdamW, Adafactor, RMSprop, SGD and what else transformers makes of PyTorch's classes are run. Of
    bitsandbytes' the state is known: a byte per parameter and moment and a float32 per 256 of them, or four
    bytes, where the name has no "8bit"; a step holds nothing more. A paged state counts as on the device.

    Raises:
        ValueError: an optimizer that cannot be made or run so; the message names it.
    """
    name = str(getattr(config.optim, "value", config.optim))
    if _of_bitsandbytes(name):
        return _BlockwiseMoments(name, parameters)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(config)
        # PyTorch takes the variant that holds lists of temporaries by the device, which is not here.
        accepts = inspect.signature(kind).parameters
        if on_cuda and "foreach" in accepts and not settings.get("fused"):
            settings = {"foreach": True, **settings}
        optimizer = kind(parameters, **settings)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"optim: the memory of {name!r} is not known here: {_first_line(error)}"
        ) from error

    def step() -> None:
        try:
            optimizer.step()
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"optim: the memory of {name!r} is not known here: {_first_line(error)}"
            ) from error

    return step


def _of_bitsandbytes(name: str) -> bool:
    by_bits = name.endswith(("_8bit", "_32bit")) and not name.startswith(("galore", "adamw_torch"))
    return by_bits or name == "rmsprop_bnb"


class _BlockwiseMoments:
    """The state of an optimizer of bitsandbytes."""

    def __init__(self, name: str, parameters: Sequence[Tensor]) -> None:
        self.moments = next(n for words, n in _MOMENTS.items() if words in name)
        self.in_bytes = "8bit" in name
        self.parameters = parameters
        self.state: list[Tensor] = []

    def __call__(self) -> None:
        if self.state:
            return
        for parameter in self.parameters:
            size = self.moments * parameter.numel()
            if self.in_bytes and parameter.numel() >= _LEAST_SIZE:
                self.state.append(torch.empty(size, dtype=torch.uint8))
                self.state.append(torch.empty(-(-size // _BLOCK), dtype=torch.float32))
            else:
                self.state.append(torch.empty(size, dtype=torch.float32))


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
