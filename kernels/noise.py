"""What the noise of DNPO is to every backend: a generator and its draw, results, and wanted gradients."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Noise(NamedTuple):
    """A generator of noise, and which noise it makes."""

    weight: Tensor  # (V, R) U
    projection: Tensor | None  # (R, H) A, or None: R = H
    bias: Tensor | None  # (V,) s
    seed: int  # in [0, 2⁶⁴)
    tokens: Tensor  # (n,) int64 indices of the tokens with a label


class NoisyForward(NamedTuple):
    """What the forward leaves for every token."""

    logps: Tensor  # (n,) z̃_label − lse(z̃)
    lse: Tensor  # (n,) log Σ_v exp(z̃_v)
    clean_logps: Tensor | None  # (n,) without the noise, if asked for


class Needed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    noise_weight: bool
    noise_projection: bool
    noise_bias: bool


class NoisyGradients(NamedTuple):
    """The gradients that were wanted, in the dtypes of the inputs; None else."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    noise_weight: Tensor | None  # (V, R)
    noise_projection: Tensor | None  # (R, H)
    noise_bias: Tensor | None  # (V,)
