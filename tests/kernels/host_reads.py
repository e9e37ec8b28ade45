"""A mode in which whatever makes the host wait for a number from the device is an error."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "repeat_interleave",
        "equal",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not function.__name__.startswith(self.WAITING), function
        return function(*args, **kwargs or {})
