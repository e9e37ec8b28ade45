"""DynamicMargin: which gaps γ is solved over, the queue, evaluation, state, and its place in the loss."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpo
from fastpo import DynamicMargin, solve_margins


class QueueReference:
    """A list of all gaps ever seen; what is drawn is left to the module, and only looked at."""

    def __init__(self, queue_size: int, sample_size: int):
        self.gaps: list[float] = []
        self.queue_size, self.sample_size = queue_size, sample_size

    def queued(self) -> list[float]:
        return self.gaps[-self.queue_size :]

    def draws(self, batch: int) -> int:
        return max(0, min(len(self.queued()), self.sample_size - batch))

    def newest(self, batch: int) -> list[float]:
        return self.queued()[len(self.queued()) - self.draws(batch) :]


def gaps_of(n: int) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64) * 3


def test_batch_scope_is_solve_margins(seed):
    margin = DynamicMargin(0.7, scope="batch", sample_size=2)
    for solver in ("exact", "mirror"):
        margin.solver = solver
        for n in (1, 3, 50):
            gaps = gaps_of(n)
            expected = solve_margins(gaps, 1.3, 0.7, solver=solver)
            assert torch.equal(margin(gaps, 1.3), expected)
    assert margin.queued == 0


@pytest.mark.parametrize(("queue_size", "sample_size"), [(20, 12), (7, 100), (1, 3), (50, 4)])
def test_queue_scope_draws_earlier_gaps_and_joins_them(queue_size, sample_size, seed):
    margin = DynamicMargin(0.7, queue_size=queue_size, sample_size=sample_size)
    reference = QueueReference(queue_size, sample_size)
    for step in range(12):
        gaps = gaps_of((3, 5, 30)[step % 3])
        twin = DynamicMargin(0.7, queue_size=queue_size, sample_size=sample_size)
        twin.load_state_dict(margin.state_dict())
        drawn = twin.context(len(gaps))  # the same draw as the one below
        assert len(drawn) == reference.draws(len(gaps))
        assert len(drawn.unique()) == len(drawn)
        assert set(drawn.tolist()) <= set(reference.queued())
        gamma = margin(gaps, 2.0)
        expected = solve_margins(torch.cat([gaps, drawn]), 2.0, 0.7)
        assert torch.equal(gamma, expected[: len(gaps)])
        assert float(expected.mean()) == pytest.approx(2.0, rel=1e-12)
        reference.gaps += gaps.tolist()
        in_order = margin.queue.roll(-(margin.queued % queue_size))[-len(reference.queued()) :]
        assert in_order.tolist() == reference.queued()


def test_draws_are_random_uniform_and_repeatable(seed):
    margins = [DynamicMargin(1.0, queue_size=40, sample_size=10, seed=s) for s in (0, 0, 1)]
    everything = torch.arange(40, dtype=torch.float64)
    for margin in margins:
        margin.push(everything)
    counts = torch.zeros(40)
    differ = 0
    for _ in range(400):
        first, same, other = (margin.context(2) for margin in margins)
        assert torch.equal(first, same)
        differ += set(first.tolist()) != set(other.tolist())
        counts[first.long()] += 1
    assert differ > 390
    assert counts.min() > 40  # expected 80, standard deviation 8
    assert counts.max() < 120


def test_evaluation_takes_the_newest_and_changes_nothing(seed):
    margin = DynamicMargin(0.5, queue_size=20, sample_size=12)
    reference = QueueReference(20, 12)
    for _ in range(7):
        gaps = gaps_of(4)
        margin(gaps, 1.0)
        reference.gaps += gaps.tolist()
    margin.eval()
    before = {k: v.clone() for k, v in margin.state_dict().items()}
    for n in (1, 5, 12, 30):
        gaps = gaps_of(n)
        newest = torch.tensor(reference.newest(n), dtype=torch.float64)
        expected = solve_margins(torch.cat([gaps, newest]), 1.0, 0.5)[:n]
        torch.testing.assert_close(margin(gaps, 1.0), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(margin(gaps, 1.0), expected, rtol=1e-12, atol=0)
    for key, value in margin.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_saved_state_continues_exactly(seed, tmp_path):
    options = {"queue_size": 30, "sample_size": 12, "seed": 5}
    margin = DynamicMargin(0.5, **options)
    for _ in range(9):
        margin(gaps_of(4), 1.0)
    save_file(margin.state_dict(), tmp_path / "margin.safetensors")
    resumed = DynamicMargin(0.5, **{**options, "seed": 0})  # the state's seed wins
    resumed.load_state_dict(load_file(tmp_path / "margin.safetensors"))
    fresh = DynamicMargin(0.5, **options)
    differ = False
    for _ in range(10):
        gaps = gaps_of(4)
        gamma = margin(gaps, 1.0)
        assert torch.equal(resumed(gaps, 1.0), gamma)
        differ |= not torch.equal(fresh(gaps, 1.0), gamma)
    assert differ
    for key, value in margin.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)


def test_another_queue_size_is_refused():
    saved = DynamicMargin(1.0, queue_size=30).state_dict()
    with pytest.raises(ValueError, match="queue_size: got 20, expected 30"):
        DynamicMargin(1.0, queue_size=20).load_state_dict(saved)
    with pytest.raises(ValueError, match="queue_size: got 0, expected 30"):
        DynamicMargin(1.0, scope="batch").load_state_dict(saved)


def test_dtype_and_detachment(seed):
    margin = DynamicMargin(0.5)
    margin.to(torch.bfloat16)  # a cast of the loss must not round the queue for good
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gaps = gaps_of(6).to(dtype).requires_grad_()
        gamma = margin(gaps, 1.0)
        assert gamma.dtype == dtype
        assert not gamma.requires_grad
        assert margin.queue.dtype == torch.float64
        newest = margin.queue[margin.queued - 6 : margin.queued]
        assert torch.equal(newest, gaps.detach().double())


def test_a_gap_that_is_not_finite_shows_and_is_not_remembered(seed, monkeypatch):
    margin = DynamicMargin(0.5)
    for bad in (math.nan, math.inf, -math.inf):
        gaps = gaps_of(4)
        gaps[2] = bad
        assert margin(gaps, 1.0).isnan().all()
        assert torch.isfinite(margin(gaps_of(4), 1.0)).all()
    monkeypatch.setenv("FASTPO_CHECK", "1")
    with pytest.raises(ValueError, match="gaps: got nan"):
        margin(torch.tensor([math.nan]), 1.0)


def test_in_the_loss(seed):
    """γ reaches the loss, its state the loss's state_dict, and train()/eval() the margin."""
    torch.manual_seed(seed)
    loss_fn = fastpo.PreferenceLoss("simpo", beta=2.0, simpo_gamma=1.0, margin=DynamicMargin(0.5))
    logps = -torch.rand(2, 6, dtype=torch.float64) * 9
    lengths = torch.arange(1, 7)

    def step():
        return loss_fn.from_sequence_logps(
            logps[0], logps[1], chosen_lengths=lengths, rejected_lengths=lengths
        )

    out = step()
    gaps = 2.0 * (logps[0] - logps[1]) / lengths
    gamma = solve_margins(gaps, 1.0, 0.5)
    torch.testing.assert_close(out.gamma, gamma, rtol=1e-12, atol=0)
    expected = torch.nn.functional.softplus(gamma - gaps)
    torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=0)
    assert {"margin.queue", "margin._extra_state"} <= set(loss_fn.state_dict())
    loss_fn.eval()
    step()
    assert loss_fn.margin.queued == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": -1.0}, ValueError, "tau: got -1.0"),
        ({"scope": "rank"}, ValueError, "scope: got 'rank', expected one of batch, queue"),
        ({"solver": "newton"}, ValueError, "solver: got 'newton'"),
        ({"queue_size": 0}, ValueError, "queue_size: got 0"),
        ({"sample_size": 0}, ValueError, "sample_size: got 0"),
        ({"sample_size": 2.5}, TypeError, "sample_size: got float"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        DynamicMargin(**{"tau": 1.0, **change})


def test_bad_gaps():
    margin = DynamicMargin(1.0)
    with pytest.raises(ValueError, match=r"gaps: got shape \(2, 2\)"):
        margin(torch.zeros(2, 2), 1.0)
    with pytest.raises(ValueError, match="gamma0: got -1"):
        margin(torch.zeros(2), -1.0)
