"""One rank of ``test_fsdp_on_two_processes``: python fsdp_worker.py RANK STORE LAYOUT OUT.

Trains nothing: writes log-probs and full gradients of this rank's half of the batch, averaged over the ranks as
FSDP does, to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

from conftest import build, make_batch

from fastpo import fused_head


def main(rank: int, store: str, seed: int, layout: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(seed)
    model = build("phi")
    batches = [make_batch(), make_batch()]
    coefficients = torch.randn(2, *batches[0].labels.shape)
    batch = batches[rank]

    head = fused_head(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
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
    (logps * coefficients[rank]).sum().backward()
    result = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    torch.save({"logps": logps.detach(), "gradients": result}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5])
