"""The calls of ``noisy_linear_logprobs_triton`` and ``philox_triton`` that the audit compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from . import tile_configs
from .audit import AuditCase, flag_combinations
from .linear_logprobs_audit import LAYOUTS, matrix, vector
from .logit_transform import LogitTransform
from .noise import Needed, Noise
from .noisy_linear_logprobs_backward_triton import launch_backward
from .noisy_linear_logprobs_forward_triton import launch_forward
from .philox_triton import normal_tile
from .precision import TRITON_DTYPES

# Generators: of full rank in hidden's dtype, the same in float32 beside 16 bits, of low rank in float32.
GENERATORS = ("full", "split", "low rank")


def audit_cases() -> Iterator[AuditCase]:
    """Every combination of dtypes, layouts, generators and flags, and the draw alone.

    With ``model`` all gradients and the clean log-probs are wanted, else those of the generator alone; biases,
    which only add loads, come with the generators that are not split. The gate takes aligned bfloat16: all
    flags off for a split generator, and all on for one of low rank.
    """
    tokens = torch.zeros(8, dtype=torch.int64)
    yield AuditCase("philox", True, partial(normal_tile, 7, tokens, 3, 100))
    for dtype, layout, generator in product(TRITON_DTYPES, LAYOUTS, GENERATORS):
        if dtype == torch.float32 and generator == "split":
            continue
        for extreme, on in flag_combinations("softcap", "model"):
            name = " ".join(
                ["noisy_linear_logprobs", str(dtype), layout, generator]
                + [f"+{flag}" for flag, value in on.items() if value]
            )
            in_gate = extreme and layout == "aligned" and dtype == torch.bfloat16
            in_gate &= generator == ("low rank" if on["softcap"] else "split")
            yield AuditCase(
                name,
                in_gate,
                partial(_call, dtype, layout, generator, **on),
                bulk=layout == "aligned",
            )


def _call(dtype: torch.dtype, layout: str, generator: str, softcap: bool, model: bool) -> None:
    """Forward and backward."""
    bias = has_bias(generator)
    n, vocab, width = 64, 2048, 65 if layout == "odd" else 64
    hidden = matrix(2 * n, width, dtype, layout)
    weight = matrix(vocab, width, dtype, layout)
    labels = vector(torch.zeros(n + 1, dtype=torch.int64), layout)
    rows = torch.arange(n)
    per_row = vector(torch.zeros(n + 1), layout)
    bias_values = vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None
    transform = LogitTransform(softcap=30.0 if softcap else None)
    noise = make_noise(n, vocab, width, dtype, layout, generator, bias)
    target, budget = tile_configs.target(hidden.device), 2**26
    launch_forward(
        hidden, weight, bias_values, labels, rows, transform, noise, model, target, budget
    )
    launch_backward(
        per_row, hidden, weight, bias_values, labels, rows, per_row, transform, noise,
        make_needed(noise, model, bias), target, budget,
    )  # fmt: skip


def has_bias(generator: str) -> bool:
    """Whether head and generator of a case have a bias."""
    return generator != "split"


def make_noise(
    n: int, vocab: int, width: int, dtype: torch.dtype, layout: str, generator: str, bias: bool
) -> Noise:
    """A generator of zeros, with a bias or without."""
    low = 5 if layout == "odd" else width // 2
    rank = low if generator == "low rank" else width
    of_noise = dtype if generator == "full" else torch.float32
    return Noise(
        weight=matrix(vocab, rank, of_noise, layout),
        projection=torch.zeros(rank, width) if generator == "low rank" else None,
        bias=vector(torch.zeros(vocab + 1, dtype=of_noise), layout) if bias else None,
        seed=2**63 + 7,
        tokens=vector(torch.zeros(n + 1, dtype=torch.int64), layout),
    )


def make_needed(noise: Noise, model: bool, bias: bool) -> Needed:
    """All gradients, or those of the generator alone."""
    return Needed(model, model, model and bias, True, noise.projection is not None, bias)
