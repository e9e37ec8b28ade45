"""Rivals against dense float64: log-probs, margins and gradients of the installed ones; others say why not."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastpo.benchmarks import reference, rivals, workloads
from fastpo.benchmarks.loss_rivals import loss_rivals
from fastpo.benchmarks.problem import LOSSES, Problem
from fastpo.benchmarks.rivals import Absent, Rival, token_rivals

LENGTH = 8
# Relative L2 error of log-probs, of gradients, and error of a margin in nats. The certified backward may leave
# out 2^-10 of every row's probability; bf16 rivals round their logits, PyTorch's also its log-probs.
FLOAT32 = (1e-6, 1e-5, 1e-4)
CERTIFIED = (1e-6, 2e-3, 1e-4)
BFLOAT16 = (1e-2, 2e-2, 0.5)
CPU_TOKENS = ["fastpo-certified", "fastpo-exact", "eager", "torch-chunked", "trl"]
CUDA_TOKENS = ["cce-exact", "cce-filtered", "liger-ce", "liger-ce-sm90", "quack"]


def dense_truth(hidden, weight, labels, coefficients):
    """Log-probs and gradients from all logits, in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logps = (hidden @ weight.T).log_softmax(-1)
    logps = logps.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == -100, 0.0)
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), coefficients.double())


def make_problem(seed, *, dtype=torch.float32, ignored=0.0, **options) -> Problem:
    workload = workloads.flat(64, 16, 97, seed=seed, dtype=dtype, ignored=ignored)
    with torch.no_grad():  # logits of deviation 3: some rows have a small nucleus
        workload.weight.mul_(3)
    return Problem.build(workload, LENGTH, **options)


def compare(rival: Rival, problem: Problem, tolerances: tuple[float, float, float]) -> None:
    try:
        attempt = rival.prepare(problem)
    except Absent as absence:
        pytest.skip(str(absence))
    outcome = attempt(problem, True)
    truth = problem.truth(ones=rival.sums_only)
    logps, gradient, nats = tolerances
    if outcome.logps is not None:
        assert outcome.logps.shape == problem.labels.shape
        assert bool((outcome.logps[problem.labels == -100] == 0).all())
        assert reference.relative_error(outcome.logps, truth.logps) <= logps
        forward = attempt(problem, False)
        assert reference.relative_error(forward.logps.detach(), truth.logps) <= logps
        assert forward.gradients == ()
    if not rival.sums_only:
        expected = reference.margins(truth.logps, problem.length)
        assert float((outcome.margins - expected).abs().max()) <= nats
    expected = (truth.hidden_grad, truth.weight_grad)[: len(problem.leaves)]
    for got, want in zip(outcome.gradients, expected, strict=True):
        assert reference.relative_error(got, want) <= gradient


def named(found: list[Rival], name: str) -> Rival:
    (rival,) = (r for r in found if r.name == name)
    return rival


@pytest.mark.parametrize("ones", [False, True])
def test_the_reference_is_the_dense_one(ones, seed):
    problem = make_problem(seed, ignored=0.3)
    coefficients = torch.ones(64) if ones else problem.coefficients
    expected = dense_truth(problem.hidden, problem.weight, problem.labels, coefficients)
    for got, want in zip(problem.truth(ones=ones), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    found = reference.token_logps(problem.hidden, problem.weight, problem.labels)
    torch.testing.assert_close(found, expected[0], rtol=1e-12, atol=1e-12)


def test_the_reference_works_in_chunks(seed, monkeypatch):
    problem = make_problem(seed, ignored=0.3)
    whole = problem.truth()
    monkeypatch.setitem(reference.CHUNK_BYTES, "cpu", 8 * 97 * 7)
    for got, want in zip(problem.truth(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_coefficients_are_those_of_pairs(seed):
    """One number per pair, its opposite on the rejected answer."""
    problem = make_problem(seed)
    by_answer = problem.answers(problem.coefficients)
    assert by_answer.shape == (8, LENGTH)
    assert bool((by_answer == by_answer[:, :1]).all())
    torch.testing.assert_close(by_answer[:4], -by_answer[4:])
    assert bool((by_answer[:4] > 0).all())
    with pytest.raises(ValueError, match="length: got 24 for 64 tokens"):
        Problem.build(problem.workload, 24)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("name", [*CPU_TOKENS, *CUDA_TOKENS])
def test_token_rivals_in_float32(name, ignored, seed):
    tolerances = CERTIFIED if name == "fastpo-certified" else FLOAT32
    compare(named(token_rivals(), name), make_problem(seed, ignored=ignored), tolerances)


@pytest.mark.parametrize("name", [*CPU_TOKENS, "fastpo-low-memory", *CUDA_TOKENS])
def test_token_rivals_in_bfloat16(name, seed):
    problem = make_problem(seed, dtype=torch.bfloat16, ignored=0.3)
    compare(named(token_rivals(), name), problem, BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_token_rival(dtype, seed):
    tolerances = FLOAT32 if dtype == torch.float32 else BFLOAT16
    problem = make_problem(seed, dtype=dtype, ignored=0.3)
    compare(named(token_rivals(), "cce-compiled"), problem, tolerances)


def test_frozen_head(seed):
    compare(named(token_rivals(), "eager"), make_problem(seed, frozen_head=True), FLOAT32)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["fastpo-certified", "fastpo-exact", "eager", "liger-loss"])
def test_loss_rivals(name, loss, seed):
    tolerances = CERTIFIED if name == "fastpo-certified" else FLOAT32
    compare(named(loss_rivals(), name), make_problem(seed, loss=loss), tolerances)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_loss_rival(loss, seed):
    problem = make_problem(seed, loss=loss)
    compare(named(loss_rivals(), "liger-loss-compiled"), problem, FLOAT32)


@pytest.mark.parametrize("name", ["trl", "cce-compiled"])
def test_a_package_that_is_not_there(name, seed, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(Absent, match=r"is not installed$"):
        named(token_rivals(), name).prepare(make_problem(seed))


def test_a_package_that_cannot_be_imported(seed, monkeypatch):
    def fail(module):
        raise OSError("libcuda.so.1 is\nmissing")

    monkeypatch.setattr(importlib, "import_module", fail)
    expected = "cannot be imported: OSError: libcuda.so.1 is missing$"
    with pytest.raises(Absent, match=expected):
        named(loss_rivals(), "liger-loss").prepare(make_problem(seed, loss="simpo"))


def test_what_needs_another_device_or_dtype(seed):
    for name in CUDA_TOKENS:
        with pytest.raises(Absent, match="needs a CUDA device"):
            named(token_rivals(), name).prepare(make_problem(seed))
    with pytest.raises(Absent, match="low precision"):
        named(token_rivals(), "fastpo-low-memory").prepare(make_problem(seed))


def test_logits_that_do_not_fit(seed, monkeypatch):
    monkeypatch.setattr(rivals.os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes
    for name in ("eager", "cce-compiled"):
        with pytest.raises(Absent, match="its logits need"):
            named(token_rivals(), name).prepare(make_problem(seed))
    named(token_rivals(), "fastpo-exact").prepare(make_problem(seed))
