"""One pass over a CUDA device: every kernel checked against float64 there, then timed. Under 8 minutes.

    python -m benchmarks.gpu_pass --out benchmarks/results [--minutes 7]

Most important first, and the JSON is rewritten after every entry, so a run that is cut off leaves what it had.
Times are medians of CUDA-event timings in milliseconds; G is one N×V×H product of the vendor library in the
same dtype, timed in the same run; memory is the allocator's peak beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.linear_logprobs_torch import linear_logprobs_reference
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.preference_epilogue_torch import PAIR_LOSSES, pair_loss
from fastpo.ops.preference_epilogue import preference_epilogue

MIB = 1024 * 1024
# (N, H, V): rows outside and vocabulary outside, odd, prime, tiny, and a wide head
CHECK_SHAPES = [
    (257, 128, 5003),
    (4096, 96, 1009),
    (64, 1000, 32_000),
    (33, 64, 128_256),
    (1, 1, 1),
]
TIME_SHAPES = [
    (4096, 4096, 32_000),
    (16_384, 4096, 128_256),
    (16_384, 4096, 151_936),
    (8192, 1024, 151_936),
]
# What a result may differ by from float64 of the same inputs: nats per token; relative L2 of a gradient.
TOLERANCES = {
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-4, 4e-3),
    torch.float16: (1e-4, 4e-3),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="stop starting new entries after this long"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_pass: no CUDA device", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * args.minutes
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-pass-{name}.json"
    report: dict[str, Any] = {"environment": environment(), "entries": []}
    failures = 0
    for label, entry in entries():
        if time.monotonic() > deadline:
            report["cut_off_before"] = label
            break
        started = time.monotonic()
        try:
            result = entry()
        except Exception as error:  # a crash of one entry must not cost the others their run
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        failures += result.get("ok") is False
        report["entries"].append({"name": label, "seconds": time.monotonic() - started, **result})
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.replace(partial, path)
        shown = {k: v for k, v in result.items() if not isinstance(v, list)}
        print(label, json.dumps(shown), flush=True)
        torch.cuda.empty_cache()
    print(f"{len(report['entries'])} entries, {failures} failed; written to {path}")
    return 1 if failures else 0


def environment() -> dict[str, Any]:
    """Versions and device."""
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "fastpo": fastpo.__version__, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "cuda": torch.version.cuda, "device": device.name,
        "capability": f"{device.major}.{device.minor}", "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
    }  # fmt: skip


def entries() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and work of every entry, most important first."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for shape in CHECK_SHAPES:
            for flags in (False, True):
                label = f"check {short(dtype)} {shape} {'all flags' if flags else 'plain'}"
                yield label, lambda d=dtype, s=shape, f=flags: check_linear_logprobs(s, d, f)
    yield "check epilogue", check_epilogue
    yield "check determinism", check_determinism
    for shape in TIME_SHAPES:
        yield f"time bf16 {shape}", lambda s=shape: time_linear_logprobs(s, torch.bfloat16)
    yield (
        "time fp32 (2048, 1024, 32000)",
        lambda: time_linear_logprobs((2048, 1024, 32_000), torch.float32),
    )
    yield "time epilogue", time_epilogue


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def draw(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """hidden, weight, labels, bias; a third of the labels ignored."""
    n, width, vocab = shape
    generator = torch.Generator("cuda").manual_seed(seed)
    options = {"device": "cuda", "generator": generator}
    hidden = torch.randn(n, width, **options).to(dtype)
    weight = (torch.randn(vocab, width, **options) * (3 / width**0.5)).to(dtype)
    labels = torch.randint(vocab, (n,), **options)
    labels[torch.rand(n, **options) < 1 / 3] = -100
    return [hidden, weight, labels, torch.randn(vocab, **options).to(dtype)]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def check_linear_logprobs(
    shape: tuple[int, int, int], dtype: torch.dtype, flags: bool
) -> dict[str, Any]:
    """Log-probs, statistics and gradients of the Triton path against float64 on the device."""
    hidden, weight, labels, bias = draw(shape, dtype, seed=sum(shape))
    if flags:
        transform = LogitTransform(0.7, 8.0, 1.3)
    else:
        transform, bias, labels = LogitTransform(), None, labels.clamp(min=0)
    leaves = [None if t is None else t.requires_grad_() for t in (hidden, weight, bias)]
    result = fastpo.linear_logprobs(
        leaves[0],
        leaves[1],
        labels,
        leaves[2],
        backend="triton",
        return_stats=flags,
        **transform._asdict(),
    )
    logps, stats = result if flags else (result, None)
    coefficient = torch.randn(shape[0], device="cuda")
    logps.backward(coefficient)
    truths = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    truth = linear_logprobs_reference(truths[0], truths[1], labels, truths[2], transform)
    truth.backward(coefficient.double())
    nats, gradient = TOLERANCES[dtype]
    figures: dict[str, Any] = {
        "logp_error_nats": float((logps.double() - truth).abs().max()),
        "logp_max": float(logps.max()),
        "gradient_errors": {
            key: relative(a.grad, b.grad)
            for key, a, b in zip(("dH", "dW", "db"), leaves, truths, strict=True)
            if a is not None and b is not None
        },
    }
    peak = max(1.0, float(truth.abs().max()))
    figures["ok"] = (
        figures["logp_error_nats"] <= nats * (peak if dtype == torch.float32 else 1.0)
        and figures["logp_max"] <= 0.0
        and all(error <= gradient for error in figures["gradient_errors"].values())
    )
    if stats is not None:
        z = transform.apply_(truths[0].detach() @ truths[1].detach().t() + truths[2].detach())
        kept = labels != -100
        logp = torch.log_softmax(z, -1)
        entropy = torch.where(kept, -(logp.exp() * logp).sum(-1), 0.0)
        figures["entropy_error_nats"] = float((stats.entropy.double() - entropy).abs().max())
        figures["top1_wrong"] = int((stats.top1 != (kept & (z.argmax(-1) == labels))).sum())
        figures["ok"] = (
            figures["ok"] and figures["entropy_error_nats"] <= 1e-3 and figures["top1_wrong"] == 0
        )
    return figures


def check_determinism() -> dict[str, Any]:
    """The same call twice gives the same bits."""
    hidden, weight, labels, _ = draw((2000, 512, 32_000), torch.bfloat16)

    def once() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = fastpo.linear_logprobs(h, w, labels, backend="triton")
        return [logps.detach(), *torch.autograd.grad(logps.sum(), (h, w))]

    return {"ok": all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))}


def draw_pairs(pairs: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs, labels (a third ignored) and reference sums of ``pairs`` pairs."""
    options: dict[str, Any] = {
        "device": "cuda",
        "generator": torch.Generator("cuda").manual_seed(seed),
    }
    labels = torch.randint(1000, (2 * pairs, length), **options)
    labels[torch.rand(labels.shape, **options) < 1 / 3] = -100
    token_logps = -2 * torch.rand(labels.shape, **options)
    return token_logps, labels, -length * torch.rand(2 * pairs, **options)


def check_epilogue() -> dict[str, Any]:
    """Every loss of the one-launch kernel, fixed and dynamic margin, against its float64 twin on the CPU."""
    worst: dict[str, float] = {}
    for pairs, length in ((1, 5), (37, 200), (1000, 64), (4096, 16)):
        inputs = draw_pairs(pairs, length, seed=pairs)
        for name in PAIR_LOSSES:
            loss = pair_loss(name, label_smoothing=0.1)
            for tau in (None, 0.5):
                options: dict[str, Any] = {"beta": 0.3, "gamma0": 1.0, "tau": tau}
                extra = torch.linspace(-4, 4, 256, dtype=torch.float64)
                got = preference_epilogue(
                    inputs[0], inputs[1], loss, ref_logps=inputs[2], backend="triton",
                    extra_gaps=extra.cuda() if tau else None, **options,
                )  # fmt: skip
                host = [t.cpu() for t in inputs]
                truth = preference_epilogue(
                    host[0], host[1], loss, ref_logps=host[2], backend="torch",
                    extra_gaps=extra if tau else None, **options,
                )  # fmt: skip
                for field in ("losses", "logps", "gaps", "gamma", "coefficients"):
                    a, b = getattr(got, field), getattr(truth, field)
                    if b is not None:
                        worst[field] = max(worst.get(field, 0.0), relative(a.cpu(), b.double()))
    return {
        "ok": len(worst) == 5 and all(error <= 1e-5 for error in worst.values()),
        "errors": worst,
    }


def time_epilogue() -> dict[str, Any]:
    """The launch for 256 pairs of 1024 tokens with 256 γ, and the γ solve alone for 256 and 4096 gaps."""
    token_logps, labels, ref_logps = draw_pairs(256, 1024)
    loss = pair_loss("dpo")
    raw = {
        f"256 pairs, {backend}": milliseconds(
            lambda b=backend: preference_epilogue(
                token_logps,
                labels,
                loss,
                beta=0.1,
                gamma0=1.0,
                tau=10.0,
                ref_logps=ref_logps,
                backend=b,
            ),
            20,
        )
        for backend in ("triton", "torch")
    }
    for n in (256, 4096):
        gaps = torch.randn(n, device="cuda") * 3
        raw[f"solve {n}"] = milliseconds(lambda g=gaps: fastpo.solve_margins(g, 1.0, 10.0), 20)
    figures: dict[str, Any] = {
        f"{name} ms": statistics.median(times) for name, times in raw.items()
    }
    return {**figures, "raw_ms": list(raw.items())}


def milliseconds(step: Callable[[], object], repeats: int = 7) -> list[float]:
    """CUDA-event times of ``repeats`` runs after two warm-ups."""
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return times


def time_linear_logprobs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Forward, and forward + exact backward, in G; PyTorch backend of the same operation beside it."""
    n, width, vocab = shape
    hidden, weight, labels, _ = draw(shape, dtype)
    labels = labels.clamp(min=0)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def step(backend: str, gradients: bool) -> Callable[[], object]:
        def run() -> object:
            logps = fastpo.linear_logprobs(h, w, labels, backend=backend)
            return torch.autograd.grad(logps.sum(), (h, w)) if gradients else logps

        return run

    flop = 2 * n * width * vocab
    rows = max(1, min(n, 2 * 1024**3 // (2 * vocab)))  # the product in slices of at most 2 GiB

    def product() -> None:
        for start in range(0, n, rows):
            hidden.detach()[start : start + rows] @ weight.detach().t()

    raw = {"G": milliseconds(product)}
    for backend in ("triton", "torch"):
        raw[f"{backend} forward"] = milliseconds(step(backend, False), 5)
        raw[f"{backend} forward+backward"] = milliseconds(step(backend, True), 5)
    unit = statistics.median(raw["G"])
    figures: dict[str, Any] = {"G_ms": unit, "G_tflops": flop / unit / 1e9}
    for name, times in raw.items():
        if name != "G":
            figures[f"{name} ms"] = statistics.median(times)
            figures[f"{name} G"] = statistics.median(times) / unit
    for backend in ("triton", "torch"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = step(backend, True)()
        kept = sum(g.numel() * g.element_size() for g in gradients)  # type: ignore[attr-defined]
        figures[f"{backend} extra MiB"] = (torch.cuda.max_memory_allocated() - before - kept) / MIB
        del gradients
    return {**figures, "raw_ms": list(raw.items())}


if __name__ == "__main__":
    sys.exit(main())
