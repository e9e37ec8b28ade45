"""Two gloo processes with half the pairs each against one process with all of them.

What data-parallel training makes of the ranks' losses is their mean, and of their gradients the mean as well:
both must be those of the single process, for every loss, whether its pairs see each other or not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker
import torch

import fastpo
from fastpo.losses import LOSSES, PreferenceLoss

WORLD, PAIRS, STEPS = 2, 8, 2
OPTIONS = {name: {"beta": 0.3} for name in LOSSES if name != "sigmoid"}
OPTIONS["exo_pair"]["label_smoothing"] = 0.01
OPTIONS["aot"]["label_smoothing"] = 0.1


def single_process(name, steps):
    loss_fn = PreferenceLoss(name, **OPTIONS[name])
    for pairs in steps:
        pairs = {k: v.clone() for k, v in pairs.items()}
        logps = [pairs[k].requires_grad_() for k in ("chosen_logps", "rejected_logps")]
        loss = loss_fn.from_sequence_logps(**pairs).loss
        yield loss.detach(), torch.autograd.grad(loss, logps, materialize_grads=True)


def run_ranks(job, folder):
    """What ``ranks_worker`` finds on every rank."""
    torch.save(job, folder / "job.pt")
    root = Path(fastpo.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    worker = Path(ranks_worker.__file__)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(WORLD), str(folder)], env=environment
        )
        for rank in range(WORLD)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


def test_two_ranks_equal_one(make_pairs, tmp_path):
    steps = []
    for _ in range(STEPS):
        pairs = make_pairs(PAIRS)
        for values in pairs.values():
            values[: PAIRS // WORLD] *= (
                3  # the ranks' means, token counts and sorted orders all differ
            )
        pairs["chosen_logps"][: PAIRS // WORLD] *= 0.7
        steps.append(pairs)
    results = run_ranks({"steps": steps, "losses": OPTIONS}, tmp_path)
    for name in OPTIONS:
        for step, (loss, grads) in enumerate(single_process(name, steps)):
            shares = [result[name][step] for result in results]
            mean_loss = sum(share["loss"] for share in shares) / WORLD
            torch.testing.assert_close(mean_loss, loss, msg=lambda m, n=name: f"{n}: {m}")
            for i, grad in enumerate(grads):
                averaged = torch.cat([share["grads"][i] for share in shares]) / WORLD
                torch.testing.assert_close(averaged, grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rank", [None, 2], ids=["full rank", "low rank"])
def test_two_ranks_equal_one_under_noise(rank, seed, tmp_path):
    """The penalty too is one mean over all tokens, of which one rank has far fewer."""
    width, vocab, tokens = 6, 11, 9

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    labels = torch.randint(vocab, (2 * PAIRS, tokens))
    rejected = labels[PAIRS:]
    rejected[: PAIRS // WORLD, 2:] = -100
    generator = fastpo.NoiseGenerator(width, vocab, rank=rank, init_std=0.7, dtype=torch.float64)
    job = {
        "hidden": draw(2 * PAIRS, tokens, width),
        "weight": draw(vocab, width),
        "labels": labels,
        "ref_hidden": draw(2 * PAIRS, tokens, width),
        "token_index": torch.arange(labels.numel()).view(labels.shape),
        "generator": generator,
    }
    job["ref_hidden"][PAIRS : PAIRS + PAIRS // WORLD] *= 3
    shares = [
        r["under noise"]
        for r in run_ranks({"steps": [], "losses": {}, "under noise": job}, tmp_path)
    ]
    whole = ranks_worker.under_noise(job, 0, 1)
    mean_loss = sum(share["loss"] for share in shares) / WORLD
    torch.testing.assert_close(mean_loss, whole["loss"])
    for grads, expected in zip(
        zip(*(s["grads"] for s in shares), strict=True), whole["grads"], strict=True
    ):
        assert expected.any()
        torch.testing.assert_close(sum(grads) / WORLD, expected)
