"""Ranks of tests/rank_watch/test_rank_watch.py: forked from one process, since importing torch takes longest.

    forked_ranks.py FOLDER SCENARIO…

runs the scenarios after each other and writes FOLDER/results.json: scenario → for each rank its exit status
(minus a signal's number; None: it had to be killed), what it wrote on stderr, and when it ended, in seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fastpo import rank_watch
from fastpo.rank_watch import watch_ranks

RANKS = 3
GRACE = 1.0
PATIENCE = 8.0  # seconds that a scenario may take
PATIENCE_UNWATCHED = 3.0  # for what takes forever


def meet() -> None:
    dist.all_reduce(torch.ones(1))


def die(rank: int, dying: int) -> None:
    with watch_ranks():
        meet()
        if rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)
        meet()


def main_dies(rank: int) -> None:
    die(rank, 0)


def other_dies(rank: int) -> None:
    die(rank, 1)


def exits(rank: int) -> None:
    with watch_ranks():
        if rank == 2:
            os._exit(0)
        meet()


def raises(rank: int) -> None:
    with watch_ranks():
        meet()
        if rank == 2:
            raise ValueError("row 7\nhas no answer")
        meet()


def raises_and_stays(rank: int) -> None:
    """As under NCCL, the others hear nothing from the communication."""
    try:
        with watch_ranks():
            if rank == 1:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            meet()
    except torch.OutOfMemoryError:
        time.sleep(60)


def unwatched(rank: int) -> None:
    """What the one before shows without a watch: nobody ends."""
    if rank == 1:
        time.sleep(60)
    meet()


def all_raise(rank: int) -> None:
    with contextlib.suppress(FloatingPointError), watch_ranks():
        time.sleep(0.1 * rank)
        raise FloatingPointError("the loss is nan")
    time.sleep(1.5 * GRACE)
    meet()


def slow(rank: int) -> None:
    """A process that stands still for long, and one that keeps Python's lock, are no dead ones."""
    with watch_ranks():
        if rank == 1:
            stopped = os.getpid()
            if os.fork() == 0:
                time.sleep(1.5 * GRACE)
                os.kill(stopped, signal.SIGCONT)
                os._exit(0)
            os.kill(stopped, signal.SIGSTOP)
        if rank == 0:
            began = time.monotonic()
            while time.monotonic() - began < 1.5 * GRACE:
                pow(3, 400_000)
        meet()


def forked_child_lives_on(rank: int) -> None:
    """A worker of a data loader has the files of the process that forked it, and may outlive it."""
    with watch_ranks():
        meet()
        if rank == 1:
            if os.fork() == 0:
                time.sleep(PATIENCE)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)


def leaves_first(rank: int) -> None:
    with watch_ranks():
        meet()
        time.sleep(1.5 * GRACE * (rank > 0))


def inside_another(rank: int) -> None:
    """Only the outer one ends: the inner one's exception is caught, and nobody is ended."""
    with watch_ranks():
        with contextlib.suppress(ValueError), watch_ranks():
            if rank == 1:
                raise ValueError
        time.sleep(1.5 * GRACE)
        meet()


def unreachable(rank: int) -> None:
    if rank == 1:

        def refused(*args: object, **options: object) -> None:
            raise ConnectionRefusedError(111, "Connection refused")

        rank_watch.socket.create_connection = refused  # type: ignore[assignment]
    with watch_ranks():
        meet()


SCENARIOS: dict[str, Callable[[int], None]] = {
    f.__name__: f
    for f in (
        main_dies, other_dies, exits, raises, raises_and_stays, unwatched, all_raise, slow,
        forked_child_lives_on, leaves_first, inside_another, unreachable,
    )
}  # fmt: skip


def run_rank(scenario: str, rank: int, folder: Path) -> None:
    """In a child: never returns."""
    status = 1
    try:
        with (folder / f"{scenario}-{rank}.err").open("w") as file:
            os.dup2(file.fileno(), 2)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{scenario}-{rank}.json")
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        rank_watch.GRACE = GRACE
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{scenario}", rank=rank, world_size=RANKS
        )
        SCENARIOS[scenario](rank)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(scenario: str, folder: Path) -> list[tuple[int | None, str, float]]:
    began = time.monotonic()
    patience = PATIENCE_UNWATCHED if scenario == "unwatched" else PATIENCE
    ranks = {}
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            run_rank(scenario, rank, folder)
        ranks[child] = rank
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < RANKS and time.monotonic() - began < patience:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in ranks:
            ended[ranks[child]] = os.waitstatus_to_exitcode(status), time.monotonic() - began
        time.sleep(0.02)
        if scenario == "raises_and_stays" and len(ended) == RANKS - 1:
            break
    for child, rank in ranks.items():
        if rank not in ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return [
        (*ended.get(rank, (None, patience)), (folder / f"{scenario}-{rank}.err").read_text())
        for rank in range(RANKS)
    ]  # type: ignore[return-value]


if __name__ == "__main__":
    where, *names = sys.argv[1:]
    results = {name: run(name, Path(where)) for name in names}
    Path(where, "results.json").write_text(json.dumps(results))
