"""DNPO's noise played by several ranks beside one that has the answers of all of them.

    noise_ranks_worker.py RANKS OUT.json

Writes what each rank found, by optimiser and by whether the generator has a rank. In the second of three steps
the last process has no token to score.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from ranks import gloo_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

import fastpo
from fastpo.losses.noisy_reference import NoisyReference, score_with_noise
from fastpo.trainer import PreferenceConfig
from fastpo.trainer.noise import OPTIMIZERS, NoisePlayer
from fastpo.trainer.sharded import free_gathered

VOCAB, HIDDEN, TOKENS, STEPS = 50, 16, 7, 3  # a vocabulary that three ranks cannot share evenly


def player(optim: str, low_rank: int | None, ranks: int) -> NoisePlayer:
    torch.manual_seed(0)
    generator = fastpo.NoiseGenerator(HIDDEN, VOCAB, rank=low_rank, init_std=0.1)
    config = PreferenceConfig(
        output_dir="unused", use_cpu=True, ddp_backend="gloo", method="dnpo", optim=optim,
        noise_rank=low_rank, noise_learning_rate=1e-2, max_grad_norm=0.05,
    )  # fmt: skip
    return NoisePlayer(generator, config, ranks)


def answers(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Hidden states (2, TOKENS, HIDDEN) and labels of two answers."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    labels = torch.randint(0, VOCAB, (2, TOKENS), generator=draw)
    if step == 1 and rank == ranks - 1:
        labels.fill_(-100)
    return torch.randn(2, TOKENS, HIDDEN, generator=draw), labels


def cut(noise: NoisePlayer) -> bool:
    """Whether the generator is spread over the ranks at this moment."""
    return all(isinstance(p, DTensor) for p in noise.generator.parameters())


def play(noise: NoisePlayer, ranks: list[int], count: int) -> dict[str, Any]:
    """Three optimiser steps on the answers of ``ranks``, of ``count`` that play."""
    head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    norms, moments = [], []
    for step in range(STEPS):
        everyone = [answers(step, rank, count) for rank in range(count)]
        tokens = sum(int((labels != -100).sum()) for _, labels in everyone)
        for rank in ranks:
            hidden, labels = everyone[rank]
            noisy: NoisyReference = score_with_noise(
                noise.generator, hidden, head, labels, seed=step, mean_tokens=tokens / count
            )
            moments.append(cut(noise))
            free_gathered(noise.generator)  # as behind the reference's forward
            moments.append(cut(noise))
            loss = 0.1 * noisy.logps.sum() + noisy.weight * noisy.penalty
            (loss / len(ranks)).backward()
            moments.append(cut(noise))
        norms.append(noise.finish_gradient())
        policy = SimpleNamespace(param_groups=[{"lr": 1.0, "initial_lr": 1.0}])
        noise.on_optimizer_step(noise.config, None, None, optimizer=policy)
        noise.hidden = hidden.flatten(0, 1)
        sigma = noise.sigma_max()
        assert sigma is not None
        moments.append(cut(noise))
    return {"norms": norms, "state": noise.state(), "cut": moments, "sigma": sigma.item()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(((one[n] - other[n]).abs().max() / one[n].abs().max()).item() for n in one)


def main(ranks: int, out: Path) -> None:
    found = {}
    for optim, low_rank in product(OPTIMIZERS, (None, 3)):
        alone, together = player(optim, low_rank, 1), player(optim, low_rank, ranks)
        wanted = play(alone, list(range(ranks)), ranks)
        seen = play(together, [dist.get_rank()], ranks)
        again = player(optim, low_rank, ranks)
        rest = again.restore({**wanted["state"], "margin.queue": torch.ones(2)})
        again.generator.load_state_dict(
            {k.removeprefix("noise."): v for k, v in rest.items() if k.startswith("noise.")}
        )
        found[f"{optim} {low_rank}"] = {
            "state": apart(wanted["state"], seen["state"]),
            "restored": apart(wanted["state"], again.state()),
            "norms": [wanted["norms"], seen["norms"]],
            "cut": seen["cut"],
            "sigma": seen["sigma"],
        }
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))


if __name__ == "__main__":
    count, out = int(sys.argv[1]), Path(sys.argv[2])
    sys.exit(gloo_ranks(lambda: main(count, out), count))
