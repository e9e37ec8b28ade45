"""Both ranks of test_differing_ranks.py, forked from one process: what DynamicMargin says where they differ."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastpo

GAMMA0 = 1.5


def make(**changed: Any) -> fastpo.DynamicMargin:
    options = {"tau": 0.5, "queue_size": 24, "sample_size": 16, "seed": 3}
    return fastpo.DynamicMargin(**(options | changed))


def setting(**changed: Any) -> Callable[[int], None]:
    def case(rank: int) -> None:
        make(**(changed if rank else {}))(torch.randn(4), GAMMA0)

    return case


def target(rank: int) -> None:
    make()(torch.randn(4), GAMMA0 + rank)


def mode(rank: int) -> None:
    make().train(rank == 0)(torch.randn(4), GAMMA0)


def extra_call(rank: int) -> None:
    """One rank went on alone."""
    margin = make()
    margin(torch.randn(4), GAMMA0)
    if rank:
        margin.push(torch.randn(2))
    margin(torch.randn(4), GAMMA0)


def other_checkpoint(rank: int) -> None:
    """Two checkpoints of the same step of two runs: all counters agree, the queues do not."""
    state = make().state_dict()
    state["queue"] = torch.arange(24.0, dtype=torch.float64) + rank
    state["_extra_state"] = torch.tensor([24, 6, 3])
    margin = make()
    margin.load_state_dict(state)
    margin(torch.randn(4), GAMMA0)


def one_resumed(rank: int) -> None:
    margin = make()
    if rank:
        state = make().state_dict()
        state["queue"] = torch.ones(24, dtype=torch.float64)
        margin.load_state_dict(state)
    margin(torch.randn(4), GAMMA0)


def same(rank: int) -> None:
    """The same checkpoint on both; different numbers of gaps, which is no difference."""
    state = make().state_dict()
    state["queue"] = torch.arange(24.0, dtype=torch.float64)
    state["_extra_state"] = torch.tensor([24, 6, 3])
    margin = make()
    margin.load_state_dict(state)
    for pairs in (4 + rank, 2):
        margin(torch.randn(pairs), GAMMA0)
    margin.eval()(torch.randn(1), GAMMA0)


CASES: dict[str, Callable[[int], None]] = {
    "tau": setting(tau=0.7),
    "scope": setting(scope="batch"),
    "solver": setting(solver="mirror"),
    "queue_size": setting(queue_size=32),
    "sample_size": setting(sample_size=15),
    "seed": setting(seed=4),
    "target": target,
    "mode": mode,
    "extra_call": extra_call,
    "other_checkpoint": other_checkpoint,
    "one_resumed": one_resumed,
    "same": same,
}


def main(folder: Path) -> None:
    rank = 0 if (child := os.fork()) else 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said: dict[str, str | None] = {}
    for name, case in CASES.items():
        try:
            case(rank)
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
