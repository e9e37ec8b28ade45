"""Real runs on two gloo processes that share sequences: python measured_parts.py RUNS OUT, both JSON files.

RUNS is a list of {settings, pairs, length, prompt}; OUT gets the bytes of each, on the process that held least:
a thread of gloo's that is not scheduled in time holds on to what it has sent.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured_runs import measured_bytes, write_weights
from ranks import fork_ranks
from torch import distributed as dist

from fastpo.head import sequence_attention

WORLD = 2


class Exchange(torch.autograd.Function):
    """fastpo's own exchange, by way of memory of numpy's.

    Gloo's threads hold what they sent until they run again, sometimes long after, which PyTorch's allocator
    would count.
    """

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return exchanged(grad, ctx.group), None


def exchanged(parts: torch.Tensor, group: Any) -> torch.Tensor:
    sent = torch.from_numpy(parts.numpy(force=True).copy())
    got = torch.from_numpy(np.empty_like(sent.numpy()))
    dist.all_to_all_single(got, sent, group=group)
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    return received.copy_(got)


def main(runs: Path, out: Path) -> int:
    torch.set_num_threads(1)
    sequence_attention._Exchange = Exchange
    jobs = json.loads(runs.read_text())
    for run in jobs:
        write_weights(run["settings"]["model_name_or_path"])  # by one process, for all

    def work() -> None:
        rank, found = int(os.environ["RANK"]), []
        for number, run in enumerate(jobs):
            settings = run.pop("settings")
            settings |= {"output_dir": f"{out}-{number}", "ddp_backend": "gloo"}
            here = torch.tensor(measured_bytes(settings, **run))
            dist.all_reduce(here, dist.ReduceOp.MIN)
            found.append(int(here))
        if rank == 0:
            out.write_text(json.dumps(found))

    return int(any(fork_ranks(work, WORLD)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
