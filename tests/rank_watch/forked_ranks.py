"""What three ranks do in tests/rank_watch/test_rank_watch.py: ``forked_ranks.py FOLDER`` runs all scenarios."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_scenarios

from fastpo import rank_watch
from fastpo.rank_watch import watch_ranks

RANKS = 3
GRACE = 1.0
PATIENCE = 25.0  # seconds that a scenario may take
PATIENCE_UNWATCHED = 8.0  # for what takes forever


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


def all_raise_alike(rank: int) -> None:
    """The kind of error that waits for news of a cause: that others met it too is none."""
    with watch_ranks():
        time.sleep(0.1 * rank)
        raise RuntimeError("no such operator")


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
        main_dies, other_dies, exits, raises, raises_and_stays, unwatched, all_raise, all_raise_alike, slow,
        forked_child_lives_on, leaves_first, inside_another, unreachable,
    )
}  # fmt: skip


def prepared(scenario: Callable[[int], None]) -> Callable[[int], None]:
    """With a process group, and the short grace."""

    def run(rank: int) -> None:
        rank_watch.GRACE = GRACE
        torch.set_num_threads(1)
        store = os.environ["SCENARIO_STORE"]
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
        scenario(rank)

    return run


if __name__ == "__main__":
    run_scenarios(
        {name: prepared(scenario) for name, scenario in SCENARIOS.items()},
        Path(sys.argv[1]),
        dict.fromkeys(SCENARIOS, RANKS),
        patience=lambda name: PATIENCE_UNWATCHED if name == "unwatched" else PATIENCE,
        may_stay={"raises_and_stays": 1},
        at_once=len(SCENARIOS),
    )
