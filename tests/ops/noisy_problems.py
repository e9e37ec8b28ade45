"""Inputs of the noisy log-probs, and what they must give, dense and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.logit_transform import LogitTransform

NAMES = ("hidden", "weight", "bias", "noise_weight", "noise_bias", "noise_proj")
PLAIN, CAPPED = LogitTransform(), LogitTransform(0.7, 5.0, 1.3)
SEED = 2**63 + 12345


def draw(
    n: int = 13, width: int = 9, vocab: int = 37, *, rank: int | None = None,
    dtype: torch.dtype = torch.float64, sigma: float = 0.5,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
    """Inputs that require gradients, labels with two ignored rows, and upstream coefficients."""
    shapes = {
        "hidden": (n, width), "weight": (vocab, width), "bias": (vocab,),
        "noise_weight": (vocab, rank or width), "noise_bias": (vocab,), "noise_proj": (rank or 0, width),
    }  # fmt: skip
    inputs = {}
    for name, shape in shapes.items():
        if name == "noise_proj" and rank is None:
            continue
        scale = sigma if name in ("noise_weight", "noise_bias") else 1.0
        inputs[name] = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (n,))
    labels[[1, n - 2]] = -100
    return inputs, labels, torch.randn(n)


def noisy_logits(inputs: dict[str, Tensor], transform: LogitTransform, tokens: Tensor) -> Tensor:
    """z̃ (N, V), dense, in float64, differentiable by autograd."""
    x = {name: tensor.double() for name, tensor in inputs.items()}
    raw = x["hidden"] @ x["weight"].t() + x["bias"]
    z = raw * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / transform.temperature
    of_noise = x["hidden"] @ x["noise_proj"].t() if "noise_proj" in x else x["hidden"]
    sigma = of_noise @ x["noise_weight"].t() + x["noise_bias"]
    epsilon = fastpo.philox_normal(SEED, tokens[:, None], torch.arange(z.shape[1]))
    return z + sigma * epsilon.double()


def oracle(
    inputs: dict[str, Tensor], labels: Tensor, transform: LogitTransform, tokens: Tensor
) -> Tensor:
    """Log-probs (N,) of the same."""
    logps = torch.log_softmax(noisy_logits(inputs, transform, tokens), dim=-1)
    kept = labels != -100
    return torch.where(kept, logps.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)


def run(inputs: dict[str, Tensor], labels: Tensor, **options: Any) -> Any:
    return fastpo.noisy_linear_logprobs(labels=labels, seed=SEED, **inputs, **options)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())
