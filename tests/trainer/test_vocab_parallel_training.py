"""A model whose head is spread over ranks, beside other pairs or tokens on further ranks, against one process.

γ-SimPO over three optimiser steps of two micro-steps: losses, all gradients, weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import finish, start

EXACT = 1e-5
RUNS = {
    2: ["vocabulary"],
    4: ["vocabulary", "data × vocabulary", "data × sequence", "vocabulary × sequence"],
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks: int, tmp_path: Path) -> None:
    finish([start("grid_ranks_worker.py", str(ranks), tmp_path / "found.json")])
    everyone = json.loads((tmp_path / "found.json").read_text())
    assert len(everyone) == ranks
    for found in everyone:
        for name in RUNS[ranks]:
            seen = found.pop(name)
            for what in ("losses", "gradients", "weights"):
                assert seen[what] <= EXACT, (name, what)
            assert seen["smallest gradient"] > 1e-4, name
        # What is left has an all-reduce of one parameter missing.
        assert len(found) == (0 if ranks == 2 else 3)
        for name, seen in found.items():
            assert seen["gradients"] > 1000 * EXACT, name
            assert seen["weights"] > 1000 * EXACT, name
