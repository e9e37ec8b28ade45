"""``fastpo doctor``: versions, devices, optional packages, and every backend against float64."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.backends import TRITON_INSTALLED, choose_backend

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "numpy", "matplotlib")
OPTIONAL = {  # distribution → module
    "triton": "triton",
    "flash-attn": "flash_attn",
    "liger-kernel": "liger_kernel.transformers",
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "deepspeed": "deepspeed",
    "trl": "trl",
}
# Largest errors allowed: log-probs in nats, per unit of the largest logit; gradients relative to their norm.
LOGPROB_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-4}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def report() -> bool:
    """Print the report; return whether every backend that works here agrees with float64."""
    print(f"fastpo {fastpo.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in REQUIRED:
        _line(name, torch.__version__ if name == "torch" else version(name))  # with its build

    print("\nDevices")
    _line("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch")
    if not torch.cuda.is_available():
        _line("CUDA", "none")
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        _line(f"cuda:{index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")

    print("\nOptional packages")
    for distribution, module in OPTIONAL.items():
        _line(distribution, _package(distribution, module))

    print("\nSelf-check: log-probs and gradients against float64")
    agreements = [_check(backend, device, dtype) for backend, device, dtype in _backends()]
    return all(agreements)


def _line(name: str, text: str) -> None:
    print(f"  {name:<14} {text}")


def _package(distribution: str, module: str) -> str:
    try:
        number = version(distribution)
    except PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it is, the package does not work here
        return f"{number}, but it cannot be imported: {type(error).__name__}: {error}"
    return number


def _backends() -> list[tuple[str, torch.device, torch.dtype]]:
    """(backend, device, dtype) of everything that a call could be served by here."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    found = []
    for device in devices:
        for dtype in LOGPROB_TOLERANCE:
            found.append(("torch", device, dtype))
            if choose_backend("auto", device, dtype) == "triton":
                found.append(("triton", device, dtype))
    if not any(backend == "triton" for backend, _, _ in found):
        reason = "no CUDA device" if TRITON_INSTALLED else "Triton is not installed"
        print(f"  {'triton':<7} not used: {reason}")
    return found


def _check(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Compare one backend with float64 logits on a small problem of odd sizes, and print the errors."""
    hidden, weight, labels, upstream = _problem(device, dtype)
    expected, largest_logit = _dense_float64(hidden, weight, labels, upstream)
    name = f"  {backend:<7} {device!s:<8} {str(dtype).removeprefix('torch.'):<10}"
    try:
        got = _computed(backend, hidden, weight, labels, upstream)
    except Exception as error:  # a backend that cannot run is what this command is to find
        print(f"{name} FAILED: {type(error).__name__}: {error}")
        return False
    nats = float((got[0] - expected[0]).abs().max())
    relative = max(
        float((g - e).norm() / e.norm()) for g, e in zip(got[1:], expected[1:], strict=True)
    )
    # Comparisons are written so that NaN fails.
    good = (
        nats <= LOGPROB_TOLERANCE[dtype] * max(1.0, largest_logit)
        and relative <= GRADIENT_TOLERANCE[dtype]
    )
    print(
        f"{name} {'ok' if good else 'WRONG':<6} {nats:.1e} nats, gradients {relative:.1e} relative"
    )
    return good


def _problem(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (37, 67), weight (131, 67), labels with two ignored rows, upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 67, generator=generator)
    weight = torch.randn(131, 67, generator=generator) / 4
    labels = torch.randint(131, (37,), generator=generator)
    labels[[3, 20]] = -100
    upstream = torch.randn(37, generator=generator, dtype=torch.float64)
    return (
        hidden.to(device, dtype),
        weight.to(device, dtype),
        labels.to(device),
        upstream.to(device),
    )


def _dense_float64(
    hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> tuple[list[Tensor], float]:
    """[log-probs, d hidden, d weight] from the full logits, and the largest of these."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight.T
    kept = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0] * kept
    gradients = torch.autograd.grad(logps, (hidden, weight), upstream)
    return [logps.detach(), *gradients], float(logits.detach().abs().max())


def _computed(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor
) -> list[Tensor]:
    """[log-probs, d hidden, d weight] of one backend, as float64."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    logps = fastpo.linear_logprobs(hidden, weight, labels, backend=backend)
    gradients = torch.autograd.grad(logps, (hidden, weight), upstream.to(logps.dtype))
    return [t.detach().double() for t in (logps, *gradients)]
