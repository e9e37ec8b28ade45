"""DynamicMargin on two gloo processes against one process that has all pairs, in rank order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import fastpo

WORLD, GAMMA0 = 2, 1.5
MARGINS = {
    "batch": {"tau": 0.5, "scope": "batch"},
    "queue": {"tau": 0.5, "queue_size": 24, "sample_size": 16, "seed": 3},
}


def single_process(options, train, evaluate):
    margin = fastpo.DynamicMargin(**options)
    gammas = [margin(torch.cat(shares), GAMMA0) for shares in train]
    margin.eval()
    gammas += [margin(torch.cat(shares), GAMMA0) for shares in evaluate]
    return gammas, margin.state_dict()


def test_two_ranks_equal_one(seed, tmp_path):
    train = [tuple(torch.randn(4) * 3 + rank for rank in range(WORLD)) for _ in range(6)]
    # Evaluation ends with batches that are not alike, down to a rank with none.
    evaluate = [tuple(torch.randn(n) for n in sizes) for sizes in ((4, 4), (3, 1), (2, 0))]
    job = {"margins": MARGINS, "train": train, "evaluate": evaluate, "gamma0": GAMMA0}
    torch.save(job, tmp_path / "job.pt")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fastpo.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    worker = Path(__file__).with_name("ranks_worker.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), str(WORLD), str(tmp_path)], env=environment
        )
        for rank in range(WORLD)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(WORLD)]
    for name, options in MARGINS.items():
        gammas, state = single_process(options, train, evaluate)
        shares = zip(*(result[name]["gammas"] for result in results), strict=True)
        for expected, found, sizes in zip(gammas, shares, train + evaluate, strict=True):
            assert [len(gamma) for gamma in found] == [len(gaps) for gaps in sizes]
            assert torch.equal(torch.cat(found), expected), name
        for result in results:
            for key, value in state.items():
                assert torch.equal(result[name]["state"][key], value), (name, key)
