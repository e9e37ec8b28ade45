"""Starts a program of this directory as the ranks of a gloo process group on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def start_ranks(
    program: str, *arguments: str | Path, world: int, **variables: str | Path
) -> list[subprocess.Popen[str]]:
    """One process per rank, each told of the group by the variables that a launcher sets.

    Args:
        program: a file of this directory.
        arguments: of the program.
        world: number of ranks.
        variables: further ones of the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")])),
        **{name: str(value) for name, value in variables.items()},
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Wait for all of them; what they printed is shown if any has failed."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
