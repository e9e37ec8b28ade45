"""What the operations on hidden states and an LM head demand of their arguments."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastpo.kernels.precision import TORCH_DTYPES


def check_tensors(bias: Tensor | None, **required: Tensor) -> None:
    if not (bias is None or isinstance(bias, Tensor)):
        raise TypeError(f"bias: got {type(bias).__name__}, expected a tensor or None")
    for name, value in required.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    for name, given in (*required.items(), ("bias", bias)):
        if is_dtensor(given):
            raise TypeError(f"{name}: got a DTensor, expected a plain tensor, whole on this rank")


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor. Plain tensors do not import the module that defines it, which is slow."""
    if type(value) in (Tensor, torch.nn.Parameter) or not isinstance(value, Tensor):
        return False
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def under_autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as a linear layer takes them: cast to the autocast dtype where that is on; float64 stays."""
    device = hidden.device.type
    return tuple(
        None if t is None else t.to(dtype_under_autocast(t.dtype, device))
        for t in (hidden, *others)
    )


def dtype_under_autocast(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which a linear layer takes a tensor of ``dtype`` on this type of device."""
    stays = dtype == torch.float64 or not dtype.is_floating_point
    if stays or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    sharded: bool = False,
) -> None:
    """Raise unless the arguments fit together; a ``sharded`` weight may have no row here."""
    if hidden.dtype not in TORCH_DTYPES:
        raise TypeError(
            f"hidden: got dtype {hidden.dtype}, expected float32, bfloat16, float16 or float64"
        )
    if hidden.dim() == 0:
        raise ValueError("hidden: got a scalar, expected shape (..., H)")
    empty = weight.dim() == 2 and weight.shape[0] == 0 and not sharded
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or empty:
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
    rows = kept_first(kept)
    count, bad_count = torch.stack([kept.sum(), bad.sum()]).tolist()
    if bad_count:
        refuse_out_of_range(labels, ignore_index, vocab)
    return rows, count


def kept_first(kept: Tensor) -> Tensor:
    """Indices (N,) of the true rows, then of the others.

    A stable sort makes them without a data-dependent shape, hence without a read.
    """
    return torch.sort(~kept, stable=True).indices


def refuse_out_of_range(labels: Tensor, ignore_index: int, vocab: int) -> NoReturn:
    """Raise the ValueError for labels of which some are neither ``ignore_index`` nor in [0, vocab)."""
    kept = labels != ignore_index
    bad = (kept & ((labels < 0) | (labels >= vocab))).nonzero()
    first = int(bad[0])
    raise ValueError(
        f"labels: {len(bad)} of {int(kept.sum())} outside [0, {vocab}) and not ignore_index {ignore_index}; "
        f"the first is {int(labels[first])} at flat position {first}"
    )
