"""Time of the operation on this CPU as a multiple of G, one N×V×H product, beside the plain logits path.

Run ``python -m benchmarks.timing``. Rounds are interleaved and the medians quoted, so that a shared machine's
noise falls on all alike; only ratios mean anything there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fastpo

from .memory import draw, eager_step, fastpo_step


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each step over ``rounds`` rounds A B C A B C …, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for count in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if count:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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

    def product() -> object:
        with torch.no_grad():
            return hidden @ weight.t()

    def forward() -> object:
        with torch.no_grad():
            return fastpo.linear_logprobs(hidden, weight, labels)

    seconds = interleaved(
        {
            "G": product,
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
    for name, value in seconds.items():
        print(f"{name:<26} {value:8.3f} s {value / seconds['G']:6.2f} G")


if __name__ == "__main__":
    main()
