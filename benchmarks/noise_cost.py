"""What the noise of DNPO costs, as multiples of G, one N×V×H product, and which share the draw has.

    python -m fastpo.benchmarks.noise_cost [--rows 2048] [--vocab 32000] [--width 1024] [--out FILE]

Steps, interleaved, on states of a language model at 1.6 nats (``workloads``), with a generator of full rank
whose σ is about 0.3, as DNPO uses it: hidden states and head frozen, gradients to the generator, no penalty.

    clean forward                    fastpo.linear_logprobs without gradients
    noisy forward                    fastpo.noisy_linear_logprobs without gradients
    noisy exact, noisy certified     forward and backward
    draw                             all N×V normals, tile by tile, and nothing else
    penalty, penalty of N/8          mean(σ²) of all tokens and of the first eighth, and its gradient

The penalty takes N·H² + 2V·H² multiplications, so its time should hardly depend on N where V is much larger.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpo
from fastpo.kernels.chunking import plan_tile, spans
from fastpo.kernels.philox_torch import normal_tile

from . import bench, workloads
from .measure import median
from .memory import MIB, peak_extra_bytes
from .timing import interleaved, product

SEED = 1
SIGMA = 0.3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--states", type=Path, metavar="FILE", help="as for fastpo bench")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON; the default writes none")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = measure(args.rows, args.vocab, args.width, args.rounds, device, args.states)
    print(text(document))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {args.out}")


def measure(
    n: int, vocab: int, width: int, rounds: int, device: torch.device, states: Path | None = None
) -> dict[str, Any]:
    """Medians in seconds and peak extra bytes of every step; bfloat16 on CUDA, else float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    workload = workloads.lm(n, width, vocab, entropy=1.6, states=states, dtype=dtype, device=device)
    steps = steps_of(workload) | penalties(workload)
    timings = interleaved(
        {"G": product(workload.hidden, workload.weight), **steps}, rounds, device=device
    )
    return {
        "format": "fastpo noise cost 1",
        "environment": bench.environment(device),
        "arguments": {"n": n, "vocab": vocab, "width": width, "rounds": rounds},
        "dtype": str(dtype),
        "states": bench.describe_states(states),
        "entropy": workload.entropy,
        "sigma": SIGMA,
        "seconds": timings.seconds,
        "failures": timings.failures,
        "extra_bytes": {
            name: peak_extra_bytes(step, device)
            for name, step in steps.items()
            if name not in timings.failures
        },
    }


def steps_of(workload: workloads.Workload) -> dict[str, Callable[[], list[Tensor]]]:
    hidden, weight, labels = workload.hidden, workload.weight, workload.labels
    device = hidden.device
    torch.manual_seed(SEED)
    scale = SIGMA / float(hidden.float().norm(dim=1).mean())
    noise_weight = (torch.randn(weight.shape, device=device) * scale).requires_grad_()
    noise_bias = torch.zeros(weight.shape[0], device=device).requires_grad_()

    def noisy(backward: str) -> list[Tensor]:
        logps = fastpo.noisy_linear_logprobs(
            hidden, weight, labels, noise_weight, noise_bias, seed=SEED, backward=backward
        )
        if not logps.requires_grad:
            return [logps]
        return list(torch.autograd.grad(logps.sum(), (noise_weight, noise_bias)))

    @torch.no_grad()
    def forward() -> list[Tensor]:
        return noisy("exact")

    @torch.no_grad()
    def clean() -> list[Tensor]:
        return [fastpo.linear_logprobs(hidden, weight, labels)]

    def draw() -> list[Tensor]:
        tile = plan_tile(len(hidden), len(weight), hidden.shape[1], device, torch.float32)
        tokens = torch.arange(len(hidden), device=device)
        room = torch.empty(tile.rows * tile.cols, device=device)
        for v in spans(len(weight), tile.cols):
            for r in spans(len(hidden), tile.rows):
                shape = (r.stop - r.start, v.stop - v.start)
                out = room[: shape[0] * shape[1]].view(shape)
                normal_tile(SEED, tokens[r], v.start, v.stop, out)
        return []

    return {
        "clean forward": clean,
        "noisy forward": forward,
        "noisy exact": lambda: noisy("exact"),
        "noisy certified": lambda: noisy("certified"),
        "draw": draw,
    }


def penalties(workload: workloads.Workload) -> dict[str, Callable[[], list[Tensor]]]:
    hidden = workload.hidden
    vocab, width = workload.weight.shape
    generator = fastpo.NoiseGenerator(width, vocab, device=hidden.device)

    def penalty(count: int) -> list[Tensor]:
        mean_square = generator.penalty(hidden[:count])
        return list(torch.autograd.grad(mean_square, [generator.weight, generator.bias]))

    n = len(hidden)
    return {"penalty": lambda: penalty(n), "penalty of N/8": lambda: penalty(max(1, n // 8))}


def text(document: dict[str, Any]) -> str:
    """The table, times in G, and the share that the draw has of the noisy forward."""
    arguments, seconds = document["arguments"], document["seconds"]
    unit = median(seconds["G"])
    if unit is None:
        return f"G failed: {document['failures']}"
    lines = [
        f"{bench.title(document['environment'])}",
        f"{document['dtype']}, N = {arguments['n']}, V = {arguments['vocab']}, H = {arguments['width']}, "
        f"entropy {document['entropy']:.2f} nats; medians of {arguments['rounds']} interleaved rounds",
    ]
    medians = {name: median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        if value is None:
            continue
        extra = document["extra_bytes"].get(name)
        room = "" if extra is None else f"{extra / MIB:8.1f} MiB"
        lines.append(f"{name:<18} {value:8.3f} s {value / unit:6.2f} G {room}")
    for name, why in document["failures"].items():
        lines.append(f"{name:<18} failed: {why}")
    draw, forward = medians.get("draw"), medians.get("noisy forward")
    if document["environment"]["device"] == "cpu" and draw is not None and forward is not None:
        count = arguments["n"] * arguments["vocab"]
        lines.append(
            f"the draw is {draw / forward:.0%} of the noisy forward, {1e9 * draw / count:.1f} ns each"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
