"""solve_margins: both solvers against independent ones, optimality, limits, symmetries, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpo
from fastpo.kernels import margins_torch
from fastpo.margins import _solve_margins


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def mirror_reference(gaps: list[float], gamma0: float, tau: float) -> list[float]:
    """The authors' 20 steps, one pair at a time."""
    n = len(gaps)
    p = [1 / n] * n
    for _ in range(20):
        gamma = [gamma0 * n * p_i for p_i in p]
        gradient = [
            tau * (1 + math.log(n * (p_i + 1e-10))) + gamma0 * sigmoid(y_i - g_i)
            for p_i, y_i, g_i in zip(p, gamma, gaps, strict=True)
        ]
        p = [p_i * math.exp(-min(0.5 / tau, 1) * d_i) for p_i, d_i in zip(p, gradient, strict=True)]
        p = [p_i / sum(p) for p_i in p]
    return [gamma0 * n * p_i for p_i in p]


def bisection_reference(gaps: np.ndarray, gamma0: float, tau: float) -> np.ndarray:
    """The minimiser by two nested bisections on q = γ/γ0 itself, without a Newton step."""
    n = len(gaps)

    def multiplier(q: np.ndarray) -> np.ndarray:
        return gamma0 / (1 + np.exp(-np.clip(gamma0 * q - gaps, -700, 700))) + tau * (1 + np.log(q))

    def shares(lam: float) -> np.ndarray:
        low, high = np.full(n, 1e-300), np.full(n, 2.0 * n)
        for _ in range(200):
            middle = np.where(low < 1e-3 * high, np.sqrt(low * high), (low + high) / 2)
            above = multiplier(middle) > lam
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return (low + high) / 2

    low, high = tau - 1e-9, tau + gamma0 + 1e-9
    for _ in range(100):
        lam = (low + high) / 2
        low, high = (low, lam) if shares(lam).sum() > n else (lam, high)
    return gamma0 * shares((low + high) / 2)


def objective(gamma: torch.Tensor, gaps: torch.Tensor, gamma0: float, tau: float) -> float:
    """As in the paper; Σ q log q is summed as Σ (q log q − q + 1), which does not cancel where q ≈ 1."""
    q = gamma / gamma0
    divergence = torch.where(
        (q - 1).abs() < 0.5, q * torch.log1p(q - 1) - (q - 1), torch.xlogy(q, q) - (q - 1)
    )
    return float(torch.nn.functional.softplus(gamma - gaps).mean() + tau * divergence.mean())


def rounding(gamma: torch.Tensor, gaps: torch.Tensor, gamma0: float, tau: float) -> float:
    """Of :func:`objective`: a few ulps of γ itself, and of the terms that cancel where q ≈ 1."""
    q = gamma / gamma0
    pairs = torch.nn.functional.softplus(gamma - gaps) + gamma
    divergence = torch.xlogy(q, q).abs() + (q - 1).abs()
    return 4 * torch.finfo(torch.float64).eps * float((pairs + tau * divergence).mean())


def multipliers(gamma: torch.Tensor, gaps: torch.Tensor, gamma0: float, tau: float) -> torch.Tensor:
    """γ0 σ(γ − g) + τ(1 + log q): one number for all pairs at the minimum."""
    return gamma0 * torch.sigmoid(gamma - gaps) + tau * (1 + torch.log(gamma / gamma0))


def assert_minimum(gamma, gaps, gamma0, tau, least=1e-290):
    """Mean, stationarity where q does not underflow, monotonicity, objective not above mirror's."""
    assert gamma.dtype == gaps.dtype == torch.float64
    assert abs(float(gamma.mean()) / gamma0 - 1) < 1e-12
    found = multipliers(gamma, gaps, gamma0, tau)[gamma > least * gamma0]
    assert float(found.max() - found.min()) < 1e-6
    steps = gamma[gaps.argsort()].diff()
    assert not (steps < -1e-12 * gamma0).any()
    mirror = fastpo.solve_margins(gaps, gamma0, tau, solver="mirror")
    ours, theirs = (objective(y, gaps, gamma0, tau) for y in (gamma, mirror))
    assert ours <= theirs + sum(rounding(y, gaps, gamma0, tau) for y in (gamma, mirror))


def random_gaps(n: int, scale: float) -> torch.Tensor:
    return torch.randn(n, dtype=torch.float64) * scale


class TestMirror:
    @pytest.mark.parametrize("tau", [0.3, 3.0, 10.0, 20.0])
    def test_equals_the_authors_recursion(self, tau, seed):
        for n, gamma0, scale in ((1, 1.0, 1.0), (7, 0.375, 2.0), (64, 4.0, 6.0), (40, 5.0, 0.1)):
            gaps = random_gaps(n, scale)
            expected = torch.tensor(
                mirror_reference(gaps.tolist(), gamma0, tau), dtype=torch.float64
            )
            found = fastpo.solve_margins(gaps, gamma0, tau, solver="mirror")
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    def test_more_steps_come_closer_to_the_minimum(self, seed):
        gaps = random_gaps(50, 3.0)
        exact = fastpo.solve_margins(gaps, 1.0, 3.0)
        distances = [
            float(
                (fastpo.solve_margins(gaps, 1.0, 3.0, solver="mirror", steps=steps) - exact).norm()
            )
            for steps in (1, 4, 20)
        ]
        assert distances[0] > 3 * distances[1] > 30 * distances[2]

    def test_large_targets_do_not_underflow(self, seed):
        gamma = fastpo.solve_margins(random_gaps(30, 1e4), 1e4, 1e-3, solver="mirror")
        assert torch.isfinite(gamma).all()
        assert abs(float(gamma.mean()) / 1e4 - 1) < 1e-12


class TestExact:
    @pytest.mark.parametrize("tau", [0.02, 0.3, 3.0, 20.0])
    def test_equals_nested_bisections(self, tau, seed):
        for n, gamma0, scale in ((2, 1.0, 1.0), (9, 0.375, 2.0), (33, 4.0, 6.0)):
            gaps = random_gaps(n, scale)
            expected = torch.from_numpy(bisection_reference(gaps.numpy(), gamma0, tau))
            found = fastpo.solve_margins(gaps, gamma0, tau)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * gamma0)

    @pytest.mark.parametrize("n", [1, 2, 17, 256, 100_000])
    def test_is_the_minimum(self, n, seed):
        for gamma0, tau, scale in ((0.5, 10.0, 3.0), (4.0, 0.3, 5.0), (1.0, 0.05, 1.0))[
            : 2 if n > 1000 else 3
        ]:
            gaps = random_gaps(n, scale)
            assert_minimum(fastpo.solve_margins(gaps, gamma0, tau), gaps, gamma0, tau)

    @pytest.mark.parametrize("n", [2, 17, 256, 100_000])
    def test_huge_gaps(self, n, seed):
        """±1e4, mixed with ordinary ones, and γ0 of their size."""
        ordinary = random_gaps(n, 2.0)
        sign = torch.randint(-1, 2, (n,))
        for gamma0, tau in ((1.0, 10.0), (4.0, 0.1), (1e4, 20.0))[: 1 if n > 1000 else 3]:
            gaps = ordinary + 1e4 * sign
            assert_minimum(fastpo.solve_margins(gaps, gamma0, tau), gaps, gamma0, tau)

    @settings(max_examples=120, deadline=None)
    @given(
        st.integers(0, 2**31),
        st.sampled_from([1, 2, 3, 17, 100]),
        st.floats(-3, 4),
        st.floats(-3, 6),
        st.sampled_from(["wide", "around γ0", "two groups", "ties"]),
    )
    def test_is_the_minimum_for_any_scale(self, draw, n, log_gamma0, log_tau, shape):
        generator = torch.Generator().manual_seed(draw)
        gamma0, tau = 10.0**log_gamma0, 10.0**log_tau
        noise = torch.randn(n, dtype=torch.float64, generator=generator)
        spread = 10 ** (6 * torch.rand((), dtype=torch.float64, generator=generator) - 2)
        gaps = {
            "wide": noise * spread,
            "around γ0": noise * spread.clamp(max=10) + gamma0,
            "two groups": torch.where(noise > 0, 1e4, -1e4) + noise,
            "ties": noise.round() * spread,
        }[shape].clamp(-1e4, 1e4)
        gamma = fastpo.solve_margins(gaps, gamma0, tau)
        assert_minimum(gamma, gaps, gamma0, tau)
        for value in gaps.unique()[:5]:  # equal gaps, equal targets
            same = gamma[gaps == value]
            assert float(same.max() - same.min()) <= 1e-12 * gamma0

    def test_fixed_iteration_counts_end_where_looking_does(self, seed, monkeypatch):
        """What a GPU runs, all iterations, equals what a CPU ends early."""
        cases = [
            (random_gaps(50, scale) + shift, gamma0, tau)
            for scale, shift, gamma0, tau in (
                (3.0, 0.0, 4.0, 10.0),
                (3.0, 0.0, 4.0, 0.01),
                (1e4, 0.0, 1e3, 1.0),
                (1.0, 1e3, 1e3, 1e-3),
            )
        ]
        early = [margins_torch.exact_margins(*case) for case in cases]
        monkeypatch.setattr(margins_torch, "SETTLED", -1.0)  # never
        for case, expected in zip(cases, early, strict=True):
            found = margins_torch.exact_margins(*case)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * case[1])


class TestBoth:
    @pytest.mark.parametrize("solver", ["exact", "mirror"])
    def test_limits_and_symmetries(self, solver, seed):
        gaps = random_gaps(40, 4.0)

        def solve(g, gamma0=2.0, tau=1.0):
            return fastpo.solve_margins(g, gamma0, tau, solver=solver)

        gamma = solve(gaps)
        assert float(gamma.std()) > 0.1
        torch.testing.assert_close(
            solve(gaps, tau=1e9), torch.full_like(gaps, 2.0), rtol=1e-8, atol=0
        )
        torch.testing.assert_close(
            solve(torch.full_like(gaps, 0.7)), torch.full_like(gaps, 2.0), rtol=1e-12, atol=0
        )
        order = torch.randperm(40)
        torch.testing.assert_close(solve(gaps[order]), gamma[order], rtol=1e-11, atol=0)
        # A set counts by its shape, not by its size; the authors' 1e-10 beside p knows the size a little.
        rounding = 1e-11 if solver == "exact" else 1e-7
        torch.testing.assert_close(solve(gaps.repeat(3)), gamma.repeat(3), rtol=rounding, atol=0)
        assert torch.equal(solve(gaps, gamma0=0.0), torch.zeros_like(gaps))
        assert solve(gaps[:1]).item() == pytest.approx(2.0, rel=1e-14)
        assert (gamma[gaps.argsort()].diff() >= -1e-12).all()

    @pytest.mark.parametrize("solver", ["exact", "mirror"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_dtype_of_the_gaps_and_float64_inside(self, solver, dtype, seed):
        gaps = random_gaps(20, 3.0).to(dtype)
        gamma = fastpo.solve_margins(gaps, 1.0, 0.5, solver=solver)
        wide = fastpo.solve_margins(gaps.double(), 1.0, 0.5, solver=solver)
        assert gamma.dtype == dtype
        assert torch.equal(gamma, wide.to(dtype))
        empty = fastpo.solve_margins(gaps[:0], 1.0, 0.5, solver=solver)
        assert empty.shape == (0,)
        assert empty.dtype == dtype

    def test_no_gradient_flows(self, seed):
        gaps = random_gaps(5, 1.0).requires_grad_()
        assert not fastpo.solve_margins(gaps, 1.0, 1.0).requires_grad

    def test_registered_operation(self, seed):
        gaps = random_gaps(6, 1.0)
        for solver in ("exact", "mirror"):
            torch.library.opcheck(_solve_margins, (gaps, 1.0, 0.5, solver, 20, True))

        @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
        def loss(g):
            return torch.nn.functional.softplus(fastpo.solve_margins(g, 1.0, 0.5) - g).mean()

        for n in (6, 11):
            gaps = random_gaps(n, 1.0)
            expected = torch.nn.functional.softplus(fastpo.solve_margins(gaps, 1.0, 0.5) - gaps)
            torch.testing.assert_close(loss(gaps), expected.mean())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gaps": [1.0]}, TypeError, "gaps: got list"),
        ({"gaps": torch.tensor([1, 2])}, TypeError, "gaps: got torch.int64"),
        ({"gaps": torch.zeros(2, 2)}, ValueError, r"gaps: got shape \(2, 2\)"),
        ({"gaps": torch.tensor([0.0, math.nan])}, ValueError, "gaps: got nan at position 1"),
        ({"gaps": torch.tensor([-math.inf, 0.0])}, ValueError, "gaps: got -inf at position 0"),
        ({"gamma0": -0.1}, ValueError, "gamma0: got -0.1"),
        ({"gamma0": math.inf}, ValueError, "gamma0: got inf"),
        ({"tau": 0.0}, ValueError, "tau: got 0.0"),
        ({"tau": math.nan}, ValueError, "tau: got nan"),
        ({"solver": "newton"}, ValueError, "solver: got 'newton', expected one of exact, mirror"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"steps": 2.0}, TypeError, "steps: got float"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"gaps": torch.zeros(3), "gamma0": 1.0, "tau": 1.0, **change}
    with pytest.raises(error, match=message):
        fastpo.solve_margins(**arguments)
