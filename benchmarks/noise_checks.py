"""Correctness of the noise and of the noisy log-probs on a device, beside ``device_checks``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.ops.certified import DEFAULT_TOL

from .device_checks import Check, Shape, kernel_backend

SEED = 2**63 + 99
DRAWS = {"cuda": (1000, 1001), "cpu": (40, 41)}  # tokens and vocabulary entries
SHAPES: dict[str, list[Shape]] = {
    "cuda": [(2100, 512, 32_000), (257, 128, 5003), (33, 64, 128_256), (1, 8, 1)],
    "cpu": [(300, 16, 1009), (1, 1, 1)],
}
# nats per token, and relative L2 of a gradient; as ``device_checks.TOLERANCES``, with σ∘ε in the logits too
TOLERANCES = {torch.float32: (4e-6, 2e-5), torch.bfloat16: (2e-4, 4e-3)}


def noise_checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Name and work of every check, the most important first."""
    yield "philox_normal", functools.partial(check_draws, device)
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES[device.type]:
            for rank in (None, 16):
                kind = "full rank" if rank is None else "low rank"
                label = f"{str(dtype).removeprefix('torch.')} {shape} {kind}"
                check = functools.partial(check_noisy_logprobs, shape, dtype, rank, device)
                yield f"noisy_linear_logprobs {label}", check


def check_draws(device: torch.device) -> dict[str, Any]:
    """The normals of the device, PyTorch's and Triton's, are those of PyTorch on the CPU."""
    tokens, entries = DRAWS[device.type]
    token = torch.arange(tokens) * 2**33 + 7
    column = torch.arange(entries)[None, :]
    there = fastpo.philox_normal(SEED, token[:, None], column).double()
    drawn = {"torch": fastpo.philox_normal(SEED, token[:, None].to(device), column.to(device))}
    if kernel_backend(device) == "triton":
        from fastpo.kernels import philox_triton

        drawn["triton"] = philox_triton.normal_tile(SEED, token.to(device), 0, entries)
    errors = {
        name: float(((here.cpu().double() - there).abs() / there.abs().clamp(min=1)).max())
        for name, here in drawn.items()
    }
    return {"ok": max(errors.values()) <= 1e-6, "errors": errors, "draws": there.numel()}


def check_noisy_logprobs(
    shape: Shape, dtype: torch.dtype, rank: int | None, device: torch.device
) -> dict[str, Any]:
    """Log-probs, and the gradients of the exact and of the certified backward, against dense float64.

    The certified ones may differ by their certificate too: ‖error of dz̃_i‖₁ ≤ tol·|c_i|, max |ε| times that
    for σ. The generator is float32, hidden states and head are of ``dtype``.
    """
    inputs, labels, tokens, coefficient = _draw(shape, dtype, rank, device)
    transform = LogitTransform(0.7, 30.0, 1.3) if rank else LogitTransform()

    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    truth, epsilon = dense(wide, labels, transform, tokens)
    expected = torch.autograd.grad(truth, list(wide.values()), coefficient.double())
    nats, relative = TOLERANCES[dtype]
    peak = max(1.0, float(truth.detach().abs().max())) if dtype == torch.float32 else 1.0
    slack = _certificate(wide, coefficient.double(), transform, float(epsilon.abs().max()))

    options: dict[str, Any] = {**inputs, **transform._asdict()}
    good, figures = True, {}
    for backward in ("exact", "certified"):
        logps = fastpo.noisy_linear_logprobs(
            labels=labels,
            seed=SEED,
            token_index=tokens,
            backward=backward,
            backend=kernel_backend(device),
            **options,
        )
        found = torch.autograd.grad(logps, list(inputs.values()), coefficient)
        error = float((logps.detach().double() - truth.detach()).abs().max())
        used = {}
        for name, got, want in zip(inputs, found, expected, strict=True):
            bound = relative * float(want.norm()) + (slack[name] if backward == "certified" else 0)
            used[name] = float((got.double() - want).norm()) / max(bound, 1e-300)
        figures[backward] = {"logp_error_nats": error, "errors_over_bounds": used}
        good &= error <= nats * peak and all(share <= 1 for share in used.values())
    return {"ok": good, **figures}


def dense(
    inputs: dict[str, Tensor], labels: Tensor, transform: LogitTransform, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy log-probs (N,) differentiable by autograd, and ε (N, V)."""
    raw = inputs["hidden"] @ inputs["weight"].t() + inputs["bias"]
    z = raw * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    x = inputs["hidden"]
    if "noise_proj" in inputs:
        x = x @ inputs["noise_proj"].t()
    sigma = x @ inputs["noise_weight"].t() + inputs["noise_bias"]
    entries = torch.arange(raw.shape[1], device=raw.device)
    epsilon = fastpo.philox_normal(SEED, tokens[:, None], entries).double()
    logps = torch.log_softmax(z / transform.temperature + sigma * epsilon, dim=-1)
    picked = logps.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels != -100, picked, 0.0), epsilon


def _draw(
    shape: Shape, dtype: torch.dtype, rank: int | None, device: torch.device
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Inputs, labels, token indices, coefficients: the same in every call.

    Rows go from flat to peaked in any order, a third of them ignored; σ is about 0.5.
    """
    n, width, vocab = shape
    generator = torch.Generator(device).manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    scale = torch.logspace(-1, 0.7, n, device=device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {
        "noise_weight": normal(vocab, rank or width) * (0.5 / (rank or width) ** 0.5),
        "noise_bias": normal(vocab) * 0.1,
        "noise_proj": normal(rank or 0, width) / width**0.5,
        "hidden": (normal(n, width) * scale[order, None]).to(dtype),
        "weight": (normal(vocab, width) * (3 / width**0.5)).to(dtype),
        "bias": normal(vocab).to(dtype),
    }
    if rank is None:
        del inputs["noise_proj"]
    labels = torch.randint(vocab, (n,), device=device, generator=generator)
    labels[torch.rand(n, device=device, generator=generator) < 1 / 3] = -100
    tokens = torch.randint(2**62, (n,), device=device, generator=generator)
    inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    return inputs, labels, tokens, normal(n) * (labels != -100)


def _certificate(
    inputs: dict[str, Tensor], coefficient: Tensor, transform: LogitTransform, largest: float
) -> dict[str, float]:
    """How far each gradient may be off where tol·|c_i| of dz̃ is left out in every row."""
    h = inputs["hidden"].detach()
    tol = 1.001 * DEFAULT_TOL
    slope = abs(transform.linear_factor)
    of_rows = float(coefficient.abs().sum())
    x = h if "noise_proj" not in inputs else h @ inputs["noise_proj"].detach().t()
    longest = {
        name: float(inputs[name].detach().norm(dim=1).max()) for name in ("weight", "noise_weight")
    }

    def weighted(rows: Tensor) -> float:
        return float((rows.norm(dim=1) * coefficient.abs()).sum())

    into_x = tol * largest * longest["noise_weight"]
    bounds = {
        "noise_weight": tol * largest * weighted(x),
        "noise_bias": tol * largest * of_rows,
        "weight": tol * slope * weighted(h),
        "bias": tol * slope * of_rows,
        "hidden": tol * slope * longest["weight"] * float(coefficient.norm()),
    }
    if "noise_proj" in inputs:
        bounds["noise_proj"] = into_x * weighted(h)
        reach = float(torch.linalg.matrix_norm(inputs["noise_proj"].detach(), 2))
    else:
        reach = 1.0
    bounds["hidden"] += into_x * reach * float(coefficient.norm())
    return bounds
