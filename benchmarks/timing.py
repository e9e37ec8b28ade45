"""Interleaved timing of several steps: A B C A B C …, so that a shared machine's noise falls on all alike.

On a CPU the wall clock counts; on CUDA events do, with the L2 cache flushed before every step, so that each
starts with inputs that lie in memory. Run ``python -m fastpo.benchmarks.timing`` for the operation alone on
this CPU, as a multiple of G, one N×V×H product; the comparison with other libraries is ``fastpo bench``.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastpo

from .memory import CPU, MIB, draw, eager_step, fastpo_step

L2_FLUSH_BYTES = 256 * MIB  # more than the L2 cache of any GPU
SLICE_BYTES = {"cpu": 64 * MIB, "cuda": 2048 * MIB}


@dataclass
class Timings:
    """Raw seconds of every counted run of each step, and why a step has none."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleaved(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device = CPU,
    expired: Callable[[], bool] = lambda: False,
    warm: bool = False,
    seldom: Mapping[str, int] | None = None,
) -> Timings:
    """Time ``steps`` in ``rounds`` rounds of one run each.

    Args:
        steps: name → what to time; a step that raises is dropped, and the reason kept.
        rounds: counted rounds.
        device: where the steps compute.
        expired: asked before each step; once true, timing ends, and an incomplete round does not count.
        warm: the steps have run already; else one more round comes first that is not counted.
        seldom: name → k for slow steps that take part in the first and then every k-th counted round only.
    """
    timings = Timings({name: [] for name in steps})
    gc.disable()  # a collection in the middle of a step would count as its time
    try:
        _run_rounds(timings, steps, rounds, device, expired, warm, seldom or {})
    finally:
        gc.enable()
    return timings


def _run_rounds(
    timings: Timings,
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    expired: Callable[[], bool],
    warm: bool,
    seldom: Mapping[str, int],
) -> None:
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    for count in range(0 if warm else -1, rounds):  # round −1 is not counted
        gc.collect()
        round_: dict[str, float] = {}
        for name, step in steps.items():
            if name in timings.failures or (count > 0 and count % seldom.get(name, 1)):
                continue
            if expired():
                return
            try:
                round_[name] = clock(step)
            except Exception as error:  # one of them must not cost the others their run
                timings.failures[name] = reason(error)
                del timings.seconds[name]
        if count >= 0:
            for name, seconds in round_.items():
                timings.seconds[name].append(seconds)


def reason(error: Exception) -> str:
    """One line that says why something could not run."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _cpu_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    del result  # its memory is given back outside the time, as an optimiser would do later
    return seconds


def _cuda_seconds(step: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    start.record()
    step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def product(hidden: Tensor, weight: Tensor) -> Callable[[], object]:
    """G: hidden (N, H) × weightᵀ (H, V) by the vendor's library, in slices into one buffer that is there."""
    vocab = weight.shape[0]
    rows = max(1, SLICE_BYTES[hidden.device.type] // (vocab * hidden.element_size()))
    parts = hidden.detach().split(rows)
    transposed = weight.detach().t()
    buffer = hidden.new_empty(min(rows, len(hidden)), vocab)

    def run() -> None:
        for part in parts:
            torch.mm(part, transposed, out=buffer[: len(part)])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peaked", action="store_true", help="logits of deviation 24 instead of 3")
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden, weight, labels = draw(args.rows, args.vocab, args.width)
    if args.peaked:
        weight = (weight.detach() * 8).requires_grad_()

    def forward() -> object:
        with torch.no_grad():
            return fastpo.linear_logprobs(hidden, weight, labels)

    timings = interleaved(
        {
            "G": product(hidden, weight),
            "fastpo forward": forward,
            "fastpo forward + backward": lambda: fastpo_step(hidden, weight, labels),
            "eager forward + backward": lambda: eager_step(hidden, weight, labels),
        },
        args.rounds,
    )
    print(
        f"float32 on CPU, {torch.get_num_threads()} threads, N = {args.rows}, V = {args.vocab}, "
        f"H = {args.width}, medians of {args.rounds} interleaved rounds"
    )
    unit = statistics.median(timings.seconds["G"])
    for name, seconds in timings.seconds.items():
        median = statistics.median(seconds)
        print(f"{name:<26} {median:8.3f} s {median / unit:6.2f} G")


if __name__ == "__main__":
    main()
