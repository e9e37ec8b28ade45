"""Starts the ranks of gloo process groups on this machine."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = str(Path(__file__).resolve().parents[2])


def start(
    program: str, *arguments: str | Path, **variables: str | int | Path
) -> subprocess.Popen[str]:
    """A program of this directory in a process of its own, without a GPU and with one thread.

    Args:
        program: its file name.
        arguments: of the program.
        variables: further ones of its environment.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
        **{name: str(value) for name, value in variables.items()},
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its forks are ended with it
    )


def start_ranks(
    program: str, *arguments: str | Path, world: int, **variables: str | int | Path
) -> list[subprocess.Popen[str]]:
    """The same as the ranks of a group, each told of it by the variables that a launcher sets."""
    group = launcher_variables(world)
    return [
        start(program, *arguments, **variables, **group, RANK=rank, LOCAL_RANK=rank)
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all of them; what they printed is shown if any fails. None outlives a test that is stopped."""
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)


def launcher_variables(world: int) -> dict[str, str]:
    return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """A port that no one listens on, and that no connection is given while the ranks are still importing."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20_000, 32_000)  # below the range of the ports that systems hand out
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def fork_ranks(work: Callable[[], None], world: int) -> list[int]:
    """Do ``work`` in ``world`` forks of this process, which must not have threads, as the ranks of a group.

    Forks need not import anything again. Once one of them has failed the others, which may be waiting for it,
    are ended.

    Returns:
        How each has ended: 0, or 1 after an exception, or minus the signal that killed it.
    """
    group = launcher_variables(world)
    ranks: dict[int, int] = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks[child] = rank
    codes = [0] * world
    running = set(ranks)
    while running:
        child, status = os.wait()
        running.discard(child)
        codes[ranks[child]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[child]]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def gloo_ranks(work: Callable[[], None], world: int) -> int:
    """Do ``work`` as :func:`fork_ranks`, in a default process group of one thread each; an exit status."""

    def grouped() -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        work()
        dist.destroy_process_group()

    return int(any(fork_ranks(grouped, world)))
