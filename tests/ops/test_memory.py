"""Memory, from the allocator's own events: bounded by the chunk budget, not by N×V."""

from __future__ import annotations

import pytest
import torch

import fastpo
from benchmarks.memory import MIB, draw, eager_step, fastpo_step, peak_extra_bytes
from fastpo.kernels import chunking


def test_an_eighth_of_eager_at_most(seed: int) -> None:
    inputs = draw(8192, 32000, 16)
    ours = peak_extra_bytes(lambda: fastpo_step(*inputs))
    plain = peak_extra_bytes(lambda: eager_step(*inputs))
    assert plain >= 2 * 8192 * 32000 * 4  # the measure sees the logits and their gradient
    assert ours <= plain / 8


def small_budget(monkeypatch: pytest.MonkeyPatch) -> int:
    """A budget that even a small problem's logits do not fit into."""
    monkeypatch.setattr(chunking, "CPU_BUDGET_BYTES", 10 * MIB)
    monkeypatch.setattr(chunking, "CPU_TILE_BYTES", MIB)
    return 10 * MIB


@pytest.mark.parametrize("shape", [(4096, 2063, 32), (512, 40_009, 32), (3000, 3000, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_and_one_wide_accumulator_bound_it(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, vocab, width = shape
    hidden, weight, labels = draw(n, vocab, width)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    bound = small_budget(monkeypatch) + 100 * n
    if dtype != torch.float32:
        bound += 4 * min(n, vocab) * width
    assert peak_extra_bytes(lambda: fastpo_step(hidden, weight, labels)) <= bound
    assert peak_extra_bytes(lambda: eager_step(hidden, weight, labels)) > 2 * bound


@pytest.mark.parametrize("stats", [False, True])
def test_a_tile_goes_before_the_next_one_comes(
    stats: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exact forward holds one tile of logits, with statistics its exponentials beside it."""
    inputs = draw(2048, 5003, 16)
    small_budget(monkeypatch)
    tile = chunking.plan_tile(2048, 5003, 16, torch.device("cpu"), torch.float32)
    assert tile.rows < 2048  # there are tiles side by side and one after another
    assert tile.cols < 5003

    def forward() -> list[torch.Tensor]:
        with torch.no_grad():
            found = fastpo.linear_logprobs(*inputs, backward="exact", return_stats=stats)
        return [found[0] if isinstance(found, tuple) else found]

    held = (2 if stats else 1) * 4 * tile.rows * tile.cols
    assert held <= peak_extra_bytes(forward) <= held + 100 * 2048


def test_a_slice_of_sums_goes_before_the_next_one_comes(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certified backward with noise, gradients in 16 bits: a slice has three eighths of the budget."""
    hidden, weight, labels = draw(512, 40_009, 32)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    noise = (1e-3 * torch.randn(40_009, 32)).bfloat16().requires_grad_()
    budget = small_budget(monkeypatch)
    plan = chunking.plan_certified_backward(
        40_009, 64, 64, torch.device("cpu"), torch.float32, tiles=3
    )
    assert plan.slice_cols < 40_009 / 2
    logps = fastpo.noisy_linear_logprobs(
        hidden, weight, labels, noise, seed=0, backward="certified"
    )
    leaves = (hidden, weight, noise)
    peak = peak_extra_bytes(lambda: list(torch.autograd.grad(logps.sum(), leaves)))
    assert budget / 8 < peak < 2 * (3 * budget / 8)


def test_flat_in_the_sequence_length(seed: int) -> None:
    """Unlabelled tokens add their share of the gradient and a few bytes of bookkeeping, no more."""
    few, many = draw(512, 5003, 64), draw(512, 5003, 64, tokens=16_384)
    short, long = (peak_extra_bytes(lambda inputs=i: fastpo_step(*inputs)) for i in (few, many))
    assert long - short <= 100 * (16_384 - 512)


def test_tile_plan_stays_within_its_budget(seed: int) -> None:
    for n in (1, 7, 500, 8192, 10**6):
        for vocab in (2, 97, 32_000, 256_000):
            for width in (8, 320, 4096, 16_384):
                for device in ("cpu", "cuda"):
                    tile = chunking.plan_tile(n, vocab, width, torch.device(device), torch.float32)
                    rows, cols = tile
                    assert 1 <= rows <= n
                    assert 1 <= cols <= vocab
                    used = 4 * (2 * rows * cols + 2 * (rows + cols) * width)
                    assert used <= chunking.budget_bytes(torch.device(device))
                    # and it is put to use: no confetti
                    assert rows * cols >= min(n, 128) * min(vocab, 128)


@pytest.mark.slow
def test_two_answers_of_16k_tokens_over_150k_entries(seed: int) -> None:
    """The layer's peak beyond inputs and gradients; its logits and their gradient would be 40 GB."""
    hidden, weight, labels = draw(2 * 16_384, 151_936, 64)
    loss = fastpo.PreferenceLoss("simpo", beta=2.0, backward="certified")

    def step() -> list[torch.Tensor]:
        hidden.grad = weight.grad = None
        loss(hidden.view(2, 16_384, 64), weight, labels.view(2, 16_384)).loss.backward()
        return [hidden.grad, weight.grad]

    assert 8 * MIB < peak_extra_bytes(step) <= 200e6
