"""One rank of test_across_ranks.py: the losses of its share of the pairs, and their gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastpo.losses import PreferenceLoss


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    job = torch.load(folder / "job.pt")
    results = {}
    for name, options in job["losses"].items():
        loss_fn = PreferenceLoss(name, group=dist.group.WORLD, **options)
        steps = []
        for pairs in job["steps"]:
            mine = {k: v.chunk(world)[rank].clone() for k, v in pairs.items()}
            logps = [mine[k].requires_grad_() for k in ("chosen_logps", "rejected_logps")]
            out = loss_fn.from_sequence_logps(**mine)
            grads = torch.autograd.grad(out.loss, logps, materialize_grads=True)
            steps.append({"loss": out.loss.detach(), "grads": grads})
        results[name] = steps
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
