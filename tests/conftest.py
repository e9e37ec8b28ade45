"""Fixtures shared by all tests: printed, repeatable seeds.

The gate takes the same seeds every time, so that it judges the change and not the draw. ``make fuzz`` takes
fresh ones (FASTPO_SEED=random): it looks for inputs on which a test or the code fails.
"""

from __future__ import annotations

import os
import random

import pytest

_GIVEN = os.environ.get("FASTPO_SEED") or "0"
SESSION_SEED = random.SystemRandom().randrange(2**31) if _GIVEN == "random" else int(_GIVEN)
os.environ["FASTPO_SEED"] = str(SESSION_SEED)  # workers and subprocesses use it too


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = SESSION_SEED
    if _GIVEN != "random":
        _forget_constants()


def _forget_constants() -> None:
    """Hypothesis also draws numbers that stand in the modules loaded so far: what a test gets would depend on
    which tests its worker has run before.
    """
    from hypothesis.internal.conjecture import providers

    if hasattr(providers, "_get_local_constants"):  # not in all versions
        providers._get_local_constants = lambda: providers._local_constants


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
