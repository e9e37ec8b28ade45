"""One of two ranks of ``test_fsdp_on_two_processes``: python fsdp_worker.py RANK STORE SEED OUT.

In each layout, writes the log-probs of this rank's batch and the gradients, which FSDP averages over the
ranks. PYTHONPATH leads to this folder and to fastpo.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from conftest import build, make_batch
from torch.distributed.fsdp import fully_shard

from fastpo import fused_head

LAYOUTS = ("root only", "head apart", "layers and head apart")


def main(rank: int, store: str, seed: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    results = {}
    for layout in LAYOUTS:
        torch.manual_seed(seed)
        model = build("phi")
        batch = [make_batch(), make_batch()][rank]
        coefficients = torch.randn(2, *batch.labels.shape)[rank]
        head = fused_head(model)
        if layout == "layers and head apart":
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
        if layout != "root only":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with head:
            logps = model(
                batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).log_probs
        (logps * coefficients).sum().backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        results[layout] = (logps.detach(), gradients)
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
