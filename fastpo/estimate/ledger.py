"""``Ledger``: which bytes are alive at each moment, by what they are for, while code runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, REFERENCE, NOISE, GRADIENTS, OPTIMIZER, LOSS_LAYER, ACTIVATIONS, HOST = PARTS = (
    "weights",
    "reference model",
    "noise generator",
    "gradients",
    "optimizer",
    "loss layer",
    "activations",
    "host memory",  # of a device's run: not the device's
)


class Ledger(TorchDispatchMode):
    """While active, every storage that an operation makes is entered, and struck out when it is freed.

    Args:
        workspace: (operation, arguments) of one of fastpo's own operations → bytes that it holds while it runs,
            beyond its results; the fake implementation of an operation makes its results alone.

    Attributes:
        history: bytes alive per part, in the order of ``PARTS``, whenever there is more of one.
    """

    def __init__(self, workspace: Callable[[Any, tuple[Any, ...]], int]) -> None:
        super().__init__()
        self._workspace = workspace
        self._held: dict[int, tuple[int, int]] = {}  # storage → part, bytes
        self._alive = [0] * len(PARTS)
        self._part = PARTS.index(ACTIVATIONS)
        self.history: list[tuple[int, ...]] = []

    @contextmanager
    def charging(self, part: str) -> Iterator[None]:
        """What is made inside is for ``part``; fastpo's own operations always count as the loss layer."""
        before, self._part = self._part, PARTS.index(part)
        try:
            yield
        finally:
            self._part = before

    def move(self, tensor: Tensor, part: str) -> None:
        """From now on the storage of ``tensor`` is for ``part``."""
        key = tensor.untyped_storage()._cdata
        before, size = self._held[key]
        self._held[key] = (PARTS.index(part), size)
        self._alive[before] -= size
        self._alive[PARTS.index(part)] += size
        self.history.append(tuple(self._alive))

    def timeline(self) -> np.ndarray:
        """``history`` as an array (moments, parts) int64 of bytes."""
        return np.array(self.history, dtype=np.int64).reshape(-1, len(PARTS))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = _run(func, args, kwargs or {})
        ours = func.namespace == "fastpo"
        part = PARTS.index(LOSS_LAYER) if ours else self._part
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and self._enter(t, part)]
        if made or ours:
            alive = list(self._alive)
            if ours:
                alive[part] += self._workspace(func, args)
            self.history.append(tuple(alive))
        return result

    def _enter(self, tensor: Tensor, part: int) -> bool:
        """Enter the storage of a tensor unless it is known; whether it was not."""
        if tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return False
        self._held[key] = (part, storage.nbytes())
        self._alive[part] += storage.nbytes()
        # The storage's Python object lives as long as the storage itself.
        weakref.finalize(storage, self._leave, key)
        return True

    def _leave(self, key: int) -> None:
        part, size = self._held.pop(key)
        self._alive[part] -= size


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation, also where its shapes are known to PyTorch for bfloat16 alone though it takes others."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    narrow = func(*(a.bfloat16() if i < 2 else a for i, a in enumerate(args)), **kwargs)
    return torch.empty_strided(narrow.shape, narrow.stride(), dtype=args[0].dtype)
