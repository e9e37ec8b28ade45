"""One rank of tests/trainer/test_failures.py: trains by ``fastpo train``, and fails where it is told to.

    failing_rank.py RANK PLACE HOW fastpo-arguments…

RANK fails at PLACE (step, reference, evaluation, save, data) in the way HOW (kill, exit, raise, memory, stay): killed by a
signal, ``os._exit``, an exception, one of memory, or an exception after which the process goes on living.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from fastpo.cli import main
from fastpo.trainer import PreferenceTrainer, launch, reference


def fail(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "memory":
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    if how == "slow":
        time.sleep(4.0)
        return
    raise KeyError("a data row without an answer")


def fail_in(owner: Any, name: str, how: str, call: int = 1) -> None:
    """Make the given call of a function fail."""
    original, calls = getattr(owner, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            fail(how)
        return original(*args, **kwargs)

    setattr(owner, name, failing)


PLACES: dict[str, tuple[Any, str, int]] = {
    "data": (launch, "load_preferences", 1),
    "reference": (reference, "reference_logps", 2),
    "step": (PreferenceTrainer, "compute_loss", 3),
    "evaluation": (PreferenceTrainer, "prediction_step", 2),
    "save": (PreferenceTrainer, "_save_rng_state", 1),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, place, how, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        owner, name, call = PLACES[place]
        fail_in(owner, name, how, call)
    sys.exit(main(arguments))
