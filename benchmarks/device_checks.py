"""Correctness of every kernel on a device, against float64 there: what ``gpu_pass`` runs before it measures.

Every check returns ``{"ok": bool, …figures}``. A new kernel gets its entry in :func:`checks`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.linear_logprobs_torch import linear_logprobs_reference
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.preference_epilogue_torch import PAIR_LOSSES, pair_loss
from fastpo.ops.certified import DEFAULT_TOL
from fastpo.ops.preference_epilogue import preference_epilogue

from .reference import relative_error

Shape = tuple[int, int, int]
Check = Callable[[], dict[str, Any]]

# (N, H, V): rows outside and vocabulary outside, odd, prime, tiny, and a wide head
SHAPES: dict[str, list[Shape]] = {
    "cuda": [
        (257, 128, 5003),
        (4096, 96, 1009),
        (64, 1000, 32_000),
        (33, 64, 128_256),
        (1, 1, 1),
    ],
    "cpu": [(33, 16, 101), (1, 1, 1)],
}
# The same for the certified backward, with rows for several blocks
CERTIFIED_SHAPES: dict[str, list[Shape]] = {
    "cuda": [(4096, 96, 8009), (2100, 512, 32_000), (1500, 64, 128_256), (33, 64, 5003)],
    "cpu": [(300, 16, 1009), (1, 1, 1)],
}
PAIRS: dict[str, list[tuple[int, int]]] = {
    "cuda": [(1, 5), (37, 200), (1000, 64), (4096, 16)],
    "cpu": [(1, 5), (6, 7)],
}
# What a result may differ by from float64 of the same inputs: nats per token; relative L2 of a gradient.
TOLERANCES = {
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-4, 4e-3),
    torch.float16: (1e-4, 4e-3),
}


def checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Name and work of every check, the most important first."""
    shapes = SHAPES[device.type]
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in shapes:
            for flags in (False, True):
                label = f"{str(dtype).removeprefix('torch.')} {shape} {'all flags' if flags else 'plain'}"
                check = functools.partial(check_linear_logprobs, shape, dtype, flags, device)
                yield f"linear_logprobs {label}", check
        for shape in CERTIFIED_SHAPES[device.type]:
            for flags in (False, True):
                label = f"{str(dtype).removeprefix('torch.')} {shape} {'all flags' if flags else 'plain'}"
                check = functools.partial(check_certified, shape, dtype, flags, device)
                yield f"certified backward {label}", check
        if dtype == torch.bfloat16:
            yield "determinism", functools.partial(check_determinism, device)
            yield "preference epilogue", functools.partial(check_epilogue, device)


def kernel_backend(device: torch.device) -> str:
    """Triton on CUDA and under its interpreter, else PyTorch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if device.type == "cuda" or interpreted else "torch"


def draw(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """hidden, weight, labels, bias; a third of the labels ignored."""
    n, width, vocab = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, generator=generator)

    labels = torch.randint(vocab, (n,), device=device, generator=generator)
    labels[torch.rand(n, device=device, generator=generator) < 1 / 3] = -100
    weight = normal(vocab, width) * (3 / width**0.5)
    return [normal(n, width).to(dtype), weight.to(dtype), labels, normal(vocab).to(dtype)]


def check_linear_logprobs(
    shape: Shape, dtype: torch.dtype, flags: bool, device: torch.device
) -> dict[str, Any]:
    """Log-probs and gradients of the exact path; with ``flags`` all options of the logits, and statistics."""
    hidden, weight, labels, bias = draw(shape, dtype, device, seed=sum(shape))
    transform = LogitTransform(0.7, 8.0, 1.3) if flags else LogitTransform()
    if not flags:
        labels = labels.clamp(min=0)
    leaves = [t.requires_grad_() for t in ((hidden, weight, bias) if flags else (hidden, weight))]
    result = fastpo.linear_logprobs(
        hidden,
        weight,
        labels,
        bias if flags else None,
        backward="exact",
        backend=kernel_backend(device),
        return_stats=flags,
        **transform._asdict(),
    )
    logps, stats = result if isinstance(result, tuple) else (result, None)
    coefficient = torch.randn(shape[0], device=device)
    gradients = torch.autograd.grad(logps, leaves, coefficient)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide_bias = wide[2] if flags else None
    truth = linear_logprobs_reference(wide[0], wide[1], labels, wide_bias, transform)
    true_gradients = torch.autograd.grad(truth, wide, coefficient.double())
    nats, relative = TOLERANCES[dtype]
    peak = max(1.0, float(truth.detach().abs().max())) if dtype == torch.float32 else 1.0
    figures: dict[str, Any] = {
        "logp_error_nats": float((logps.detach().double() - truth.detach()).abs().max()),
        "logp_max": float(logps.detach().max()),
        "gradient_errors": {
            key: relative_error(got, expected)
            for key, got, expected in zip(
                ("dH", "dW", "db"), gradients, true_gradients, strict=False
            )
        },
    }
    # Comparisons are written so that NaN fails.
    good = (
        figures["logp_error_nats"] <= nats * peak
        and figures["logp_max"] <= 0.0
        and all(error <= relative for error in figures["gradient_errors"].values())
    )
    if stats is not None:
        z = transform.apply_(torch.addmm(wide[2], wide[0], wide[1].t()).detach())
        kept = labels != -100
        logp = torch.log_softmax(z, -1)
        entropy = torch.where(kept, -(logp.exp() * logp).sum(-1), 0.0)
        figures["entropy_error_nats"] = float((stats.entropy.double() - entropy).abs().max())
        figures["top1_wrong"] = int((stats.top1 != (kept & (z.argmax(-1) == labels))).sum())
        good &= figures["entropy_error_nats"] <= 1e-3 and figures["top1_wrong"] == 0
    return {"ok": good, **figures}


def check_certified(
    shape: Shape, dtype: torch.dtype, flags: bool, device: torch.device
) -> dict[str, Any]:
    """The certificate: ‖error of dz_i‖₁ ≤ tol·|c_i| bounds the errors of dH and dW, beside rounding.

    A quarter of the rows is flat and the others peaked, in any order, so that nuclei of every size stand side
    by side and the blocks of the peaked ones are sparse.
    """
    n = shape[0]
    hidden, weight, labels, bias = draw(shape, dtype, device, seed=sum(shape))
    flat = torch.logspace(-1, 0.5, n // 4, device=device)
    peaked = torch.logspace(0.6, 1.0, n - n // 4, device=device)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
    hidden.mul_(torch.cat([flat, peaked])[order].unsqueeze(1))
    transform = LogitTransform(0.7, 100.0, 1.3) if flags else LogitTransform()
    coefficient = torch.randn(n, device=device) * (labels != -100)

    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wide_bias = bias.double() if flags else None
    truth = linear_logprobs_reference(wide[0], wide[1], labels, wide_bias, transform)
    expected = torch.autograd.grad(truth, wide, coefficient.double())
    slope = DEFAULT_TOL * transform.logit_scale / transform.temperature
    rounding = TOLERANCES[dtype][1]
    bounds = [
        slope * float(wide[1].detach().norm(dim=1).max() * coefficient.norm()),
        slope * float((wide[0].detach().norm(dim=1) * coefficient.abs()).sum()),
    ]
    bounds = [
        bound * 1.001 + rounding * float(g.norm())
        for bound, g in zip(bounds, expected, strict=True)
    ]

    good, figures = True, {}
    for name, frozen, low_memory in (
        ("plain", None, False),
        ("low memory", None, True),
        ("frozen head", 1, False),
        ("frozen hidden", 0, False),
    ):
        leaves = [
            t.detach().requires_grad_(place != frozen) for place, t in enumerate((hidden, weight))
        ]
        logps, stats = fastpo.linear_logprobs(
            leaves[0],
            leaves[1],
            labels,
            bias if flags else None,
            backward="certified",
            low_memory=low_memory,
            backend=kernel_backend(device),
            return_stats=True,
            **transform._asdict(),
        )
        asked = [t for t in leaves if t.requires_grad]
        gradients = iter(torch.autograd.grad(logps, asked, coefficient))
        dropped = float(stats.dropped_mass_max)
        used = [
            float((next(gradients).double() - expected[place]).norm()) / max(bounds[place], 1e-300)
            for place in (0, 1)
            if place != frozen
        ]  # shares of the bounds
        active = float(stats.active_fraction)
        figures[name] = {
            "dropped_mass_max": dropped,
            "active_fraction": active,
            "errors_over_bounds": used,
        }
        good &= dropped <= DEFAULT_TOL * 1.001 and all(share <= 1 for share in used)
        good &= n < 300 or active < 0.9  # else nothing sparse was checked
    return {"ok": good, **figures}


def check_determinism(device: torch.device) -> dict[str, Any]:
    """The same call twice gives the same bits, with either backward."""
    shape = (2000, 512, 32_000) if device.type == "cuda" else (50, 16, 101)
    hidden, weight, labels, _ = draw(shape, torch.bfloat16, device)

    def once(backward: str) -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = fastpo.linear_logprobs(
            h, w, labels, backward=backward, backend=kernel_backend(device)
        )
        return [logps.detach(), *torch.autograd.grad(logps.sum(), (h, w))]

    same = {
        backward: all(
            torch.equal(a, b) for a, b in zip(once(backward), once(backward), strict=True)
        )
        for backward in ("exact", "certified")
    }
    return {"ok": all(same.values()), "same_bits": same}


def draw_pairs(
    pairs: int, length: int, device: torch.device, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs, labels (a third ignored) and reference sums of ``pairs`` pairs."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (2 * pairs, length)
    labels = torch.randint(1000, size, device=device, generator=generator)
    labels[torch.rand(size, device=device, generator=generator) < 1 / 3] = -100
    token_logps = -2 * torch.rand(size, device=device, generator=generator)
    return (
        token_logps,
        labels,
        -length * torch.rand(2 * pairs, device=device, generator=generator),
    )


def check_epilogue(device: torch.device) -> dict[str, Any]:
    """Every loss of the one-launch kernel, fixed and dynamic margin, against its float64 twin on the CPU."""
    worst: dict[str, float] = {}
    extra = torch.linspace(-4, 4, 256, dtype=torch.float64)
    for pairs, length in PAIRS[device.type]:
        inputs = draw_pairs(pairs, length, device, seed=pairs)
        host = [t.cpu() for t in inputs]
        for name in PAIR_LOSSES:
            for tau in (None, 0.5):
                compute = functools.partial(
                    preference_epilogue,
                    loss=pair_loss(name, label_smoothing=0.1),
                    beta=0.3,
                    gamma0=1.0,
                    tau=tau,
                )
                got = compute(
                    inputs[0],
                    inputs[1],
                    ref_logps=inputs[2],
                    extra_gaps=extra.to(device) if tau else None,
                    backend=kernel_backend(device),
                )
                truth = compute(
                    host[0].double(),
                    host[1],
                    ref_logps=host[2].double(),
                    extra_gaps=extra if tau else None,
                    backend="torch",
                )
                for field in ("losses", "logps", "gaps", "gamma", "coefficients"):
                    a, b = getattr(got, field), getattr(truth, field)
                    if b is not None:
                        error = relative_error(a.cpu(), b.double())
                        worst[field] = max(worst.get(field, 0.0), error)
    return {
        "ok": len(worst) == 5 and all(error <= 1e-5 for error in worst.values()),
        "errors": worst,
    }
