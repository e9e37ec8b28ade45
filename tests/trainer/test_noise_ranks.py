"""DNPO's generator cut over ranks: steps, norms and saved state as of one process, and when it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import finish, start

from fastpo.trainer.noise import OPTIMIZERS


def test_three_ranks_equal_one(tmp_path: Path) -> None:
    """One of them without a token in a step, where FSDP2 still expects its share of every gradient."""
    finish([start("noise_ranks_worker.py", "3", tmp_path / "found.json")])
    everyone = json.loads((tmp_path / "found.json").read_text())
    assert len(everyone) == 3
    for found in everyone:
        assert len(found) == 2 * len(OPTIMIZERS)
        for name, seen in found.items():
            assert seen["state"] < 1e-5, name
            assert seen["restored"] == 0, name
            wanted, norms = seen["norms"]
            assert norms == pytest.approx(wanted, rel=1e-5), name
            assert min(norms) > 0.05, name  # each is clipped
            # Whole from the log-probs on; cut behind the forward, the backward and the line of a log.
            assert seen["cut"] == [False, True, True, True] * 3, name
            assert seen["sigma"] > 0, name
