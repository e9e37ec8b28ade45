"""Fixtures shared by all tests: a fresh, printed, repeatable seed and quiet thread settings."""

from __future__ import annotations

import os
import random

import pytest

SESSION_SEED = int(os.environ.get("FASTPO_SEED") or random.SystemRandom().randrange(2**31))
os.environ["FASTPO_SEED"] = str(SESSION_SEED)  # workers and subprocesses use it too


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = SESSION_SEED


def pytest_report_header() -> str:
    return f"fastpo seed: {SESSION_SEED} (FASTPO_SEED={SESSION_SEED} repeats it)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of this run and this test alone; PyTorch's generator is seeded with it."""
    import torch

    value = random.Random(f"{SESSION_SEED}/{request.node.nodeid}").randrange(2**31)
    torch.manual_seed(value)
    print(f"seed {value} (session {SESSION_SEED})")
    return value
