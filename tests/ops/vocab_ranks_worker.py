"""The ranks of test_vocab_parallel.py: calls with a shard of the vocabulary, and what comes of them.

Started once, it makes its ranks by forking, so that they share what it has imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import start_processes

import fastpo
from benchmarks.memory import peak_extra_bytes
from fastpo.kernels import chunking, nucleus
from fastpo.ops import linear_logprobs as operation
from fastpo.ops import vocab_parallel

NAMES = ("hidden", "weight", "bias")


def shard_of(whole: torch.Tensor | None, sizes: list[int], rank: int) -> torch.Tensor | None:
    return None if whole is None else whole.split(sizes)[rank].clone()


def leaves(case: dict, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """This rank's arguments, of which all but the case's frozen ones require a gradient."""
    tensors = {name: case[name] for name in NAMES}
    if case.get("dtensor"):
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for name in NAMES[1:]:
            if tensors[name] is not None:
                tensors[name] = distribute_tensor(tensors[name], mesh, [Shard(0)])
    elif group is not None:
        for name in NAMES[1:]:
            tensors[name] = shard_of(tensors[name], case["sizes"], rank)
    return {
        name: None if t is None else t.detach().clone().requires_grad_(name not in case["frozen"])
        for name, t in tensors.items()
    }


def call(case: dict, rank: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Log-probs, statistics and gradients of the case; ``group`` None: in one process, with the whole head."""
    given = leaves(case, rank, group)
    options = {**case["options"], "return_stats": True}
    if group is not None and not case.get("dtensor"):
        options["vocab_group"] = group

    def step(hidden: Any, weight: Any, bias: Any) -> Any:
        return fastpo.linear_logprobs(hidden, weight, case["labels"], bias, **options)

    if case.get("compiled"):
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    logps, stats = step(*(given[name] for name in NAMES))
    found: dict[str, Any] = {"logps": logps.detach(), "stats": stats._asdict()}
    if case.get(
        "per_row"
    ):  # d log-prob / d raw product of every row: what the bias gets from that row alone
        bias = given["bias"]
        rows = [torch.autograd.grad(logp, bias, retain_graph=True)[0] for logp in logps]
        found["dz"] = torch.stack(rows)
    logps.backward(case["grad"].to(logps.dtype))
    for name in NAMES:
        gradient = None if given[name] is None else given[name].grad
        if case.get("dtensor") and name != "hidden" and gradient is not None:
            assert type(gradient).__name__ == "DTensor"
            assert gradient.placements == given[name].placements
            gradient = gradient.to_local()
        found[name] = gradient
    return found


# ---- faults to plant, each of which the comparisons must notice


def no_sum_of_dh() -> tuple[Any, str, Any]:
    return operation, "sum_over_shards", lambda gradient, group: gradient


def dh_summed_twice() -> tuple[Any, str, Any]:
    real = vocab_parallel.sum_over_shards
    return operation, "sum_over_shards", lambda gradient, group: real(real(gradient, group), group)


def changed_shard(change: Callable[[Any], Any]) -> tuple[Any, str, Any]:
    real = vocab_parallel.agree

    def agree(*args: Any) -> Any:
        shard, order, count = real(*args)
        return change(shard), order, count

    return operation, "agree", agree


def wrong_offset() -> tuple[Any, str, Any]:
    return changed_shard(lambda s: s._replace(first=s.first + (s.first > 0)))


def lse_of_the_shard() -> tuple[Any, str, Any]:
    return vocab_parallel.Shard, "lse", lambda self, own: own.clone()


def whole_tolerance_for_every_shard() -> tuple[Any, str, Any]:
    real = vocab_parallel.Shard.allowance

    def allowance(self: Any, tol: float, lse: torch.Tensor) -> Any:
        given = real(self, tol, lse)
        return given._replace(of_rows=lambda places, own: given.of_rows(places, own) * 4)

    return vocab_parallel.Shard, "allowance", allowance


def ties_to_the_highest() -> tuple[Any, str, Any]:
    real = vocab_parallel.Shard.join

    def join(self: Any, own: Any, labels: torch.Tensor, lse: torch.Tensor) -> Any:
        here = (labels >= self.first) & (labels < self.first + self.size)
        tied = own._replace(peak=torch.where(here, own.peak, own.peak - 1e-9))
        return real(self, tied, labels, lse)

    return vocab_parallel.Shard, "join", join


FAULTS = {
    fault.__name__: fault
    for fault in (
        no_sum_of_dh, dh_summed_twice, wrong_offset, lse_of_the_shard,
        whole_tolerance_for_every_shard, ties_to_the_highest,
    )
}  # fmt: skip


def with_fault(name: str | None, run: Callable[[], Any]) -> Any:
    if name is None:
        return run()
    owner, attribute, planted = FAULTS[name]()
    real = getattr(owner, attribute)
    setattr(owner, attribute, planted)
    try:
        return run()
    finally:
        setattr(owner, attribute, real)


# ---- calls that must be refused on every rank


def refusals(rank: int, world: int, alone: dist.ProcessGroup) -> dict[str, str]:
    """What each bad call raises here: type and message."""
    group = dist.group.WORLD
    hidden, labels = torch.ones(4, 3), torch.tensor([0, 3, -100, 2 * world - 1])
    weight = torch.ones(2, 3)
    last = rank == world - 1
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    whole = torch.ones(2 * world, 3)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    other = torch.where(torch.arange(4)[:, None] == 1, 2.0, hidden) if last else hidden
    calls: dict[str, dict[str, Any]] = {
        "label too large": {"labels": labels.masked_fill(labels >= 0, 2 * world)},
        "label negative": {"labels": torch.tensor([0, 1, -1, 2])},
        "a rank without rows": {"weight": weight[:0] if last else weight},
        "labels differ": {"labels": labels.flip(0) if last else labels},
        "number of labels differs": {"labels": labels.clone().fill_(1) if last else labels},
        "rows differ": {"hidden": hidden[:3], "labels": labels[:3]} if last else {},
        "options differ": {"temperature": 2.0 if last else 1.0},
        "hidden differs": {"hidden": other, "check": True},
        "only one rank checks": {"check": last},
        "no group": {"vocab_group": "tensor parallel"},
        "triton": {"backend": "triton"},
        "shape of a shard": {"weight": torch.ones(2, 4)},
        "replicated": {"weight": distribute_tensor(whole, mesh, [Replicate()]), "vocab_group": None},
        "by columns": {"weight": distribute_tensor(whole, mesh, [Shard(1)]), "vocab_group": None},
        "plain bias": {"weight": sharded, "bias": torch.ones(2), "vocab_group": None},
        "plain weight": {"bias": distribute_tensor(whole[:, 0], mesh, [Shard(0)]), "vocab_group": None},
        "hidden a DTensor": {"hidden": distribute_tensor(hidden, mesh, [Replicate()])},
        "another group": {"weight": sharded, "vocab_group": alone},
    }  # fmt: skip
    found = {}
    for name, change in calls.items():
        arguments = {"hidden": hidden, "weight": weight, "labels": labels, "vocab_group": group}
        arguments |= change
        os.environ["FASTPO_CHECK"] = "1" if arguments.pop("check", False) else "0"
        found[name] = outcome(lambda a=arguments: fastpo.linear_logprobs(**a))
    os.environ["FASTPO_CHECK"] = "1"
    for backward in ("exact", "certified"):
        logps = fastpo.linear_logprobs(
            hidden, weight.clone().requires_grad_(), labels, backward=backward, vocab_group=group
        )
        weighted = logps * torch.tensor(
            [1.0, 1.0, 1.0 + last, 1.0 + last]
        )  # the third has no label
        found[f"gradients differ, {backward}"] = outcome(weighted.sum().backward)
    os.environ["FASTPO_CHECK"] = "0"
    noisy = {"noise_weight": whole, "seed": 1}
    for name, change in {
        "noise: group": {"weight": whole, "vocab_group": group},
        "noise: DTensor": {"weight": sharded},
    }.items():
        arguments = {"hidden": hidden, "labels": labels, **noisy, **change}
        found[name] = outcome(lambda a=arguments: fastpo.noisy_linear_logprobs(**a))
    return found


def outcome(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# ---- memory


def memory(job: dict, rank: int, backward: str) -> int:
    """Most bytes of a step beyond its results, with a budget that this rank's logits do not fit into."""
    torch.manual_seed(0)
    hidden = torch.randn(job["rows"], job["width"]).requires_grad_()
    weight = torch.randn(job["vocab"], job["width"]).requires_grad_()
    labels = torch.randint(job["vocab"] * dist.get_world_size(), (job["rows"],))

    def step() -> list[torch.Tensor]:
        logps = fastpo.linear_logprobs(
            hidden, weight, labels, backward=backward, vocab_group=dist.group.WORLD
        )
        return list(torch.autograd.grad(logps.sum(), (hidden, weight)))

    return peak_extra_bytes(step)


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    job = torch.load(folder / "job.pt", weights_only=False)
    # Blocks of eight rows; many tiles, chunks and windows even for small problems.
    nucleus.BLOCK_ROWS["cpu"] = 8
    chunking.CPU_BUDGET_BYTES, chunking.CPU_TILE_BYTES = job["budget"], 4096
    chunking.ALIGNMENT = 1
    alone = [dist.new_group([k]) for k in range(world)]
    halves = [dist.new_group(list(range(k, world, 2))) for k in range(2)]
    results: dict[str, Any] = {"cases": {}}
    for name, case in job["cases"].items():
        os.environ["FASTPO_CHECK"] = "1" if case.get("check") else "0"
        groups = {"all": dist.group.WORLD, "alone": alone[rank], "halves": halves[rank % 2]}
        group = groups[case.get("group", "all")]
        place = dist.get_rank(group)
        results["cases"][name] = with_fault(
            case.get("fault"), lambda c=case, p=place, g=group: call(c, p, g)
        )
    os.environ["FASTPO_CHECK"] = "0"
    if job.get("refusals"):
        results["refusals"] = refusals(rank, world, alone[rank])
    if "opcheck" in job:
        name, size = dist.group.WORLD.group_name, 9
        inputs = [t.requires_grad_() for t in (torch.ones(5, 3), torch.ones(size, 3))]
        arguments = (*inputs, torch.arange(5) * 3, None, 1.1, 4.0, 0.9, -100, "auto", True)
        results["opcheck"] = {
            tol: torch.library.opcheck(
                torch.ops.fastpo.linear_logprobs, (*arguments, tol, False, None, name)
            )
            for tol in job["opcheck"]
        }
    if "memory" in job:
        chunking.CPU_BUDGET_BYTES, chunking.CPU_TILE_BYTES = job["memory"]["budget"], 2**20
        results["memory"] = {b: memory(job["memory"], rank, b) for b in ("exact", "certified")}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    start_processes(main, (world, folder), nprocs=world, start_method="fork")
