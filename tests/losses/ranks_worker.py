"""One rank of test_across_ranks.py: the losses of its share of the pairs, and their gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastpo.losses import PreferenceLoss


def under_noise(job: dict, rank: int, world: int) -> dict:
    """Loss and gradients of DNPO; ``job`` has chosen answers, then as many rejected ones, and a reference."""
    group = dist.group.WORLD if world > 1 else None
    pairs = len(job["labels"]) // 2
    mine = [*torch.arange(pairs).chunk(world)[rank].tolist()]
    mine += [pairs + k for k in mine]
    share = {k: job[k][mine] for k in ("hidden", "labels", "ref_hidden", "token_index")}
    generator = job["generator"]
    loss_fn = PreferenceLoss("spin", beta=0.3, noise=generator, noise_alpha=0.4, group=group)
    hidden, weight = share["hidden"].requires_grad_(), job["weight"].requires_grad_()
    out = loss_fn(
        hidden, weight, share["labels"], ref_hidden=share["ref_hidden"], ref_weight=job["weight"].detach(),
        noise_seed=5, token_index=share["token_index"],
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss, [weight, *generator.parameters()])
    return {"loss": out.loss.detach(), "grads": grads}


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    job = torch.load(folder / "job.pt", weights_only=False)
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
    if "under noise" in job:
        results["under noise"] = under_noise(job["under noise"], rank, world)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
