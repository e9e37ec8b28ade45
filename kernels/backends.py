"""Which implementation takes a call: an explicit rule, never a try/except around a kernel."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


# Whether Triton can be imported; it is not loaded to find out.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET=1`` makes Triton kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """``"torch"`` or ``"triton"`` for a call on ``device``.

    ``"auto"`` takes Triton on CUDA (and on CPU tensors under ``TRITON_INTERPRET=1``) for the dtypes it has,
    else PyTorch. An explicit ``"triton"`` that cannot be served is a ValueError, never a silent detour.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend: got {requested!r}, expected one of {', '.join(BACKENDS)}")
    if requested == "torch":
        return "torch"
    if not TRITON_INSTALLED:
        reason = "Triton is not installed"
    elif device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        reason = f"the tensors are on {device} and TRITON_INTERPRET=1 is not set"
    elif dtype == torch.float64:
        reason = "float64 has no Triton path"
    else:
        return "triton"
    if requested == "triton":
        raise ValueError(f"backend: got 'triton', but {reason}; use 'torch' or 'auto'")
    return "torch"


def linear_logprobs_module(
    hidden: Tensor, weight: Tensor, backend: str, certified: bool = False
) -> ModuleType:
    """The module whose ``forward`` and ``backward`` compute token log-probs for ``hidden`` and ``weight``."""
    return _module("certified" if certified else "linear_logprobs", hidden, weight, backend)


def noisy_linear_logprobs_module(
    hidden: Tensor, weight: Tensor, backend: str, certified: bool = False
) -> ModuleType:
    """The same of token log-probs under noisy logits."""
    family = "certified_noisy" if certified else "noisy_linear_logprobs"
    return _module(family, hidden, weight, backend)


def _module(family: str, hidden: Tensor, weight: Tensor, backend: str) -> ModuleType:
    """``"auto"`` takes PyTorch where Triton's kernels do not support the device, ``"triton"`` raises there."""
    name = choose_backend(backend, hidden.device, hidden.dtype)
    module = importlib.import_module(f".{family}_{name}", __package__)
    if backend == "auto" and name == "triton" and module.supported(hidden, weight) is not None:
        return importlib.import_module(f".{family}_torch", __package__)
    return module
