"""One rank of test_across_ranks.py: γ of its share of the gaps, and the state it ends with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fastpo


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    job = torch.load(folder / "job.pt")
    results = {}
    for name, options in job["margins"].items():
        margin = fastpo.DynamicMargin(**options)
        gammas = [margin(shares[rank], job["gamma0"]) for shares in job["train"]]
        margin.eval()
        gammas += [margin(shares[rank], job["gamma0"]) for shares in job["evaluate"]]
        results[name] = {"gammas": gammas, "state": margin.state_dict()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
