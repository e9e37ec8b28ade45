"""pytest-benchmark: the operation alone, on a small shape, for following its speed from change to change.

``make bench-suites``, or ``pytest benchmarks/suites -m bench`` with ``--benchmark-autosave`` and
``--benchmark-compare``. The comparison with other libraries on shapes that matter is ``fastpo bench``.
"""

from __future__ import annotations

import functools

import pytest
import torch

import fastpo
from fastpo.benchmarks import workloads
from fastpo.benchmarks.problem import Problem
from fastpo.benchmarks.rivals import eager_logprobs, fastpo_logprobs, of_tokens
from fastpo.benchmarks.timing import product

pytestmark = pytest.mark.bench
N, WIDTH, VOCAB, LENGTH = 256, 320, 8000, 64
BACKWARDS = ("certified", "exact")


@pytest.fixture(scope="module", params=["lm", "flat"])
def problem(request: pytest.FixtureRequest) -> Problem:
    """States of a language model at mean entropy 1.6 nats, and random ones."""
    if request.param == "flat":
        return Problem.build(workloads.flat(N, WIDTH, VOCAB), LENGTH)
    return Problem.build(workloads.lm(N, WIDTH, VOCAB, entropy=1.6), LENGTH)


def test_product(benchmark, problem):
    """G, the unit."""
    benchmark(product(problem.hidden, problem.weight))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_forward(benchmark, problem, backward):
    benchmark(functools.partial(of_tokens(fastpo_logprobs(backward)), problem, False))


@pytest.mark.parametrize("backward", BACKWARDS)
def test_forward_and_backward(benchmark, problem, backward):
    benchmark(functools.partial(of_tokens(fastpo_logprobs(backward)), problem, True))


def test_eager_forward_and_backward(benchmark, problem):
    benchmark(functools.partial(of_tokens(eager_logprobs), problem, True))


@pytest.mark.parametrize("pairs", [256, 4096])
def test_solve_margins(benchmark, pairs):
    gaps = torch.randn(pairs, generator=torch.Generator().manual_seed(0))
    benchmark(lambda: fastpo.solve_margins(gaps, 1.0, 10.0))
