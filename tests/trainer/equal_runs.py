"""Two runs that must not differ."""

from __future__ import annotations

import pytest
import torch

from fastpo.trainer import PreferenceTrainer


def assert_equal_runs(one: PreferenceTrainer, other: PreferenceTrainer) -> None:
    for name in ("loss", "grad_norm", "rewards/margins"):
        values = [[e[name] for e in r.state.log_history if name in e] for r in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-6), name
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(
            parameter, other.model.get_parameter(name), rtol=0, atol=1e-6, msg=name
        )
