"""Real runs on two gloo processes that share sequences: python measured_parts.py RUNS OUT, both JSON files.

RUNS is a list of {settings, pairs, length, prompt}; OUT gets the bytes of each on the process that held most.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from measured_runs import measured_bytes, write_weights
from ranks import fork_ranks
from torch import distributed as dist

WORLD = 2


def main(runs: Path, out: Path) -> int:
    torch.set_num_threads(1)
    jobs = json.loads(runs.read_text())
    for run in jobs:
        write_weights(run["settings"]["model_name_or_path"])  # by one process, for all

    def work() -> None:
        rank, found = int(os.environ["RANK"]), []
        for number, run in enumerate(jobs):
            settings = run.pop("settings")
            settings |= {"output_dir": f"{out}-{number}", "ddp_backend": "gloo"}
            here = torch.tensor(measured_bytes(settings, **run))
            dist.all_reduce(here, dist.ReduceOp.MAX)
            found.append(int(here))
        if rank == 0:
            out.write_text(json.dumps(found))

    return int(any(fork_ranks(work, WORLD)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
