"""Scenarios of several ranks each, all forked from one process, since importing torch takes longest."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

Scenario = Callable[[int], None]  # of a rank
Ended = tuple[int | None, float, str]


def run_scenarios(
    scenarios: Mapping[str, Scenario],
    folder: Path,
    ranks: Mapping[str, int],
    *,
    patience: Callable[[str], float],
    may_stay: Mapping[str, int],
    at_once: int,
) -> None:
    """Run them and write ``folder/results.json``: scenario → of each rank its :data:`Ended`.

    That is its exit status (minus a signal's number; None: it had to be killed), after how many seconds, and
    what it wrote on stderr. ``ranks``: how many a scenario has. ``patience``: of a scenario, in seconds.
    ``may_stay``: scenario → a rank that is not waited for. ``at_once``: how many run at the same time.
    """
    waiting = dict(scenarios)
    going: list[_Running] = []
    results: dict[str, list[Ended]] = {}
    while waiting or going:
        while waiting and len(going) < at_once:
            name = next(iter(waiting))
            going.append(_Running(name, waiting.pop(name), folder, ranks[name]))
        for running in going:
            if not running.look(patience(running.name), may_stay.get(running.name)):
                results[running.name] = running.results()
        going = [running for running in going if running.running]
        time.sleep(0.05)
    (folder / "results.json").write_text(json.dumps(results))


class _Running:
    """The processes of a scenario, and how they ended."""

    def __init__(self, name: str, scenario: Scenario, folder: Path, ranks: int) -> None:
        self.name = name
        self.folder = folder
        self.began = time.monotonic()
        self.running: dict[int, int] = {}
        self.ended: list[tuple[int | None, float]] = [(None, 0.0)] * ranks
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                _run_rank(name, scenario, rank, ranks, folder)
            self.running[rank] = child

    def look(self, patience: float, may_stay: int | None) -> bool:
        """Whether it is still going on."""
        seconds = time.monotonic() - self.began
        for rank, child in tuple(self.running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                self.ended[rank] = (os.waitstatus_to_exitcode(status), seconds)
                del self.running[rank]
        if seconds > patience or tuple(self.running) == (may_stay,):
            for rank, child in self.running.items():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                self.ended[rank] = (None, seconds)
            self.running = {}
        return bool(self.running)

    def results(self) -> list[Ended]:
        return [
            (*ended, (self.folder / f"{self.name}-{rank}.err").read_text(errors="replace"))
            for rank, ended in enumerate(self.ended)
        ]


def _run_rank(name: str, scenario: Scenario, rank: int, ranks: int, folder: Path) -> None:
    """In a child: never returns. The launcher's variables are set, the process group is the scenario's."""
    status = 1
    try:
        with (folder / f"{name}-{rank}.err").open("w") as file:
            os.dup2(file.fileno(), 2)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            SCENARIO_STORE=f"file://{folder}/{name}.store",
            TORCHELASTIC_ERROR_FILE=str(folder / f"{name}-{rank}.json"),
        )
        scenario(rank)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
