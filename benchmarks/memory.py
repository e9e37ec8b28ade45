"""Peak extra memory of a step, beyond its inputs and gradients; and of fastpo beside the plain logits path.

Run ``python -m fastpo.benchmarks.memory`` for a table. On a CPU the figures are sums of what PyTorch's
allocator was asked for, so they repeat exactly and do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastpo

MIB = 1024 * 1024
CPU = torch.device("cpu")


def peak_extra_bytes(step: Callable[[], Sequence[Tensor]], device: torch.device = CPU) -> int:
    """Most bytes alive at once during ``step`` beyond its results (the gradients it returns), on ``device``."""
    peak, results = (_cuda_peak if device.type == "cuda" else _cpu_peak)(step)
    return peak - sum(t.untyped_storage().nbytes() for t in results)


def _cpu_peak(step: Callable[[], Sequence[Tensor]]) -> tuple[int, Sequence[Tensor]]:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        results = step()
    finally:
        with _silent_stderr():
            profiler.stop()
    recorded: Any = profiler.profiler
    changes = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    alive = peak = 0
    for event in changes:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak, results


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Without the lines that PyTorch 2.13's profiler writes past Python at its start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cuda_peak(step: Callable[[], Sequence[Tensor]]) -> tuple[int, Sequence[Tensor]]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def draw(
    n: int, vocab: int, width: int, tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, head (logits of deviation 3) and labels; ``tokens`` > n adds unlabelled rows."""
    tokens = tokens or n
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocab, width) * (3 / width**0.5)).requires_grad_()
    labels = torch.full((tokens,), -100)
    labels[torch.randperm(tokens)[:n]] = torch.randint(vocab, (n,))
    return hidden, weight, labels


def fastpo_step(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the summed log-probs through the operation."""
    logps = fastpo.linear_logprobs(hidden, weight, labels)
    return list(torch.autograd.grad(logps.sum(), (hidden, weight)))


def eager_step(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """The same through all logits at once."""
    kept = labels != -100
    logps = torch.log_softmax(hidden @ weight.t(), dim=-1)
    picked = logps.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return list(torch.autograd.grad(picked[kept].sum(), (hidden, weight)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--no-eager", action="store_true", help="leave out the plain logits path")
    args = parser.parse_args()
    print(f"float32 on CPU, V = {args.vocab}, H = {args.width}; MiB beyond inputs and gradients")
    print(f"{'N':>8} {'fastpo':>10} {'eager':>10} {'ratio':>8}")
    for n in args.rows:
        inputs = draw(n, args.vocab, args.width)
        ours = peak_extra_bytes(functools.partial(fastpo_step, *inputs)) / MIB
        if args.no_eager:
            print(f"{n:>8} {ours:>10.1f}")
            continue
        plain = peak_extra_bytes(functools.partial(eager_step, *inputs)) / MIB
        print(f"{n:>8} {ours:>10.1f} {plain:>10.1f} {plain / ours:>8.1f}")


if __name__ == "__main__":
    main()
