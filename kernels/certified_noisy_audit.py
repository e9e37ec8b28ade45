"""The calls of ``certified_noisy_triton`` that ``fastpo.kernels.audit`` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from . import tile_configs
from .audit import AuditCase, flag_combinations
from .certified_noisy_backward_triton import launch_backward
from .certified_noisy_forward_triton import launch_forward
from .linear_logprobs_audit import LAYOUTS, matrix, vector
from .logit_transform import LogitTransform
from .noisy_linear_logprobs_audit import GENERATORS, has_bias, make_needed, make_noise
from .nucleus import words
from .precision import TRITON_DTYPES

HEIGHT = 128


def audit_cases() -> Iterator[AuditCase]:
    """Every combination of dtypes, layouts, generators and flags, forward and backward.

    With ``model`` all gradients and the clean log-probs are wanted, else those of the generator alone; biases,
    which only add loads, come with the generators that are not split. The gate takes the same as in
    ``noisy_linear_logprobs_audit``. The backward gathers, so only the forward must fetch its operands by bulk
    copies.
    """
    for dtype, layout, generator in product(TRITON_DTYPES, LAYOUTS, GENERATORS):
        if dtype == torch.float32 and generator == "split":
            continue
        for extreme, on in flag_combinations("softcap", "model"):
            of_case = [str(dtype), layout, generator]
            of_case += [f"+{flag}" for flag, value in on.items() if value]
            in_gate = extreme and layout == "aligned" and dtype == torch.bfloat16
            in_gate &= generator == ("low rank" if on["softcap"] else "split")
            for direction, call in (("forward", _forward), ("backward", _backward)):
                yield AuditCase(
                    " ".join(["certified noisy", direction, *of_case]),
                    in_gate,
                    partial(call, dtype, layout, generator, **on),
                    bulk=layout == "aligned" and direction == "forward",
                )


def _forward(dtype: torch.dtype, layout: str, generator: str, softcap: bool, model: bool) -> None:
    bias = has_bias(generator)
    n, vocab, width = 64, 2048, 65 if layout == "odd" else 64
    launch_forward(
        matrix(2 * n, width, dtype, layout),
        matrix(vocab, width, dtype, layout),
        vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None,
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        torch.arange(n),
        LogitTransform(softcap=30.0 if softcap else None),
        make_noise(n, vocab, width, dtype, layout, generator, bias),
        model,
        2**-10,
        tile_configs.target(torch.device("cpu")),
        2**26,
    )


def _backward(dtype: torch.dtype, layout: str, generator: str, softcap: bool, model: bool) -> None:
    """In slices, over which the gradients of the rows are summed."""
    bias = has_bias(generator)
    n, vocab, width = 512, 2048, 65 if layout == "odd" else 64
    blocks = n // HEIGHT
    noise = make_noise(n, vocab, width, dtype, layout, generator, bias)
    per_row = vector(torch.zeros(n + 1), layout)
    launch_backward(
        per_row,
        matrix(2 * n, width, dtype, layout),
        matrix(vocab, width, dtype, layout),
        vector(torch.zeros(vocab + 1, dtype=dtype), layout) if bias else None,
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        vector(torch.zeros(n + 1, dtype=torch.int64), layout),
        per_row,
        vector(torch.zeros(blocks * words(vocab) + 1, dtype=torch.int32), layout).view(blocks, -1),
        vector(torch.zeros(blocks + 1, dtype=torch.int32), layout),
        HEIGHT,
        LogitTransform(softcap=30.0 if softcap else None),
        noise,
        make_needed(noise, model, bias),
        tile_configs.target(torch.device("cpu")),
        300_000,
    )
