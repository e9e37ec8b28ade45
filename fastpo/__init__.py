"""fastpo: preference optimisation of language models without ever materialising the logits.

The names below load on first use, so that ``import fastpo`` needs neither Triton nor a GPU and pulls in
neither ``datasets`` nor ``matplotlib``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastpo.version import __version__

_HOMES = {
    "linear_logprobs": "fastpo.ops.linear_logprobs",
    "shift_labels": "fastpo.ops.linear_logprobs",
    "TokenStats": "fastpo.ops.linear_logprobs",
    "noisy_linear_logprobs": "fastpo.ops.noisy_linear_logprobs",
    "philox_normal": "fastpo.ops.philox",
    "sequence_logprobs": "fastpo.ops.sequence_logprobs",
    "solve_margins": "fastpo.margins",
    "DynamicMargin": "fastpo.margins",
    "NoiseGenerator": "fastpo.noise",
    "PreferenceLoss": "fastpo.losses",
    "PreferenceOutput": "fastpo.losses",
    "fused_head": "fastpo.head",
    "model_logprobs": "fastpo.head",
    "PreferenceConfig": "fastpo.trainer",
    "PreferenceTrainer": "fastpo.trainer",
}

if TYPE_CHECKING:
    from fastpo.head import fused_head, model_logprobs
    from fastpo.losses import PreferenceLoss, PreferenceOutput
    from fastpo.margins import DynamicMargin, solve_margins
    from fastpo.noise import NoiseGenerator
    from fastpo.ops.linear_logprobs import TokenStats, linear_logprobs, shift_labels
    from fastpo.ops.noisy_linear_logprobs import noisy_linear_logprobs
    from fastpo.ops.philox import philox_normal
    from fastpo.ops.sequence_logprobs import sequence_logprobs
    from fastpo.trainer import PreferenceConfig, PreferenceTrainer

__all__ = [
    "DynamicMargin",
    "NoiseGenerator",
    "PreferenceConfig",
    "PreferenceLoss",
    "PreferenceOutput",
    "PreferenceTrainer",
    "TokenStats",
    "__version__",
    "fused_head",
    "linear_logprobs",
    "model_logprobs",
    "noisy_linear_logprobs",
    "philox_normal",
    "sequence_logprobs",
    "shift_labels",
    "solve_margins",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in ("data", "head", "losses", "margins", "noise", "trainer"):
        return importlib.import_module(f"fastpo.{name}")
    raise AttributeError(f"module 'fastpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
