"""Random pairs, and a tiny model with a preference data set, for the tests of the losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def make_pairs(seed: int) -> Callable[..., dict[str, Tensor]]:
    """A function that draws the arguments of a loss for n pairs: log-prob sums of 1–40 tokens, and lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int = 7, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        lengths = torch.randint(1, 40, (2, n), generator=generator)
        policy = -lengths * (0.2 + 2 * torch.rand(2, n, generator=generator, dtype=torch.float64))
        reference = (
            policy + torch.randn(2, n, generator=generator, dtype=torch.float64) * lengths.sqrt()
        )
        reference = reference.clamp(max=-0.1)
        return {
            "chosen_logps": policy[0].to(dtype),
            "rejected_logps": policy[1].to(dtype),
            "ref_chosen_logps": reference[0].to(dtype),
            "ref_rejected_logps": reference[1].to(dtype),
            "chosen_lengths": lengths[0],
            "rejected_lengths": lengths[1],
        }

    return draw
