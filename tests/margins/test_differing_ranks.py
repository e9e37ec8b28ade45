"""Ranks whose γ would be solved differently: DynamicMargin raises on all of them and says what differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpo

PLANTED = {
    "tau": "tau, expected the same on all: got 0.5 on rank 0, 0.7 on rank 1",
    "scope": "scope, expected the same on all: got queue on rank 0, batch on rank 1",
    "solver": "solver, expected the same on all: got exact on rank 0, mirror on rank 1",
    "queue_size": "queue_size, expected the same on all: got 24 on rank 0, 32 on rank 1",
    "sample_size": "sample_size, expected the same on all: got 16 on rank 0, 15 on rank 1",
    "seed": "seed, expected the same on all: got 3 on rank 0, 4 on rank 1",
    "target": "gamma0, expected the same on all: got 1.5 on rank 0, 2.5 on rank 1",
    "mode": "training mode, expected the same on all: got 1 on rank 0, 0 on rank 1",
    "extra_call": "the number of gaps queued, expected the same on all: got 8 on rank 0, 10 on rank 1",
    "other_checkpoint": "the queue that was loaded",
    "one_resumed": "the queue that was loaded",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fastpo.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("differing_ranks.py")
    subprocess.run([sys.executable, script, folder], env=environment, check=True, timeout=120)
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", PLANTED)
def test_what_differs_is_named_on_all_ranks(case: str, said: list[dict[str, str | None]]) -> None:
    assert said[0][case] == said[1][case]
    assert PLANTED[case] in (said[0][case] or "")


def test_ranks_that_agree_are_left_alone(said: list[dict[str, str | None]]) -> None:
    assert [each["same"] for each in said] == [None, None]
