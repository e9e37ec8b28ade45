"""Products by either library against float64, when oneDNN is called, and what it may take of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.benchmarks.memory import peak_extra_bytes
from fastpo.kernels import products_torch
from fastpo.kernels.linear_logprobs_torch import linear_logprobs_reference
from fastpo.kernels.products_torch import add_product, multiply

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN"
)
SHAPES = [(1, 1, 1), (7, 33, 5), (130, 65, 257)]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float32 product goes to oneDNN, in parts of a few rows, columns and terms."""
    monkeypatch.setattr(products_torch, "LEAST_WORK", 0)
    monkeypatch.setattr(products_torch, "TERMS", 16)
    monkeypatch.setattr(products_torch, "CPU_PRODUCT_BYTES", 9000)
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN is asked for."""
    made: list[tuple[int, ...]] = []
    real = products_torch._onednn

    def recorded(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert products_torch._without_gaps(b)  # or it takes a thousand times as long
        made.append((*a.shape, len(b)))
        return real(a, b, bias)

    monkeypatch.setattr(products_torch, "_onednn", recorded)
    return made


def assert_rounded(
    got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, start: torch.Tensor
) -> None:
    """|error| ≤ K·2^-24·Σ|terms|, whatever the order of summation."""
    truth = a.double() @ b.double() + start.double()
    terms = a.double().abs() @ b.double().abs() + start.double().abs()
    assert ((got.double() - truth).abs() <= (a.shape[1] + 2) * 2**-24 * terms).all()


@pytest.mark.parametrize(("n", "inner", "cols"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_multiply_equals_float64(
    n: int, inner: int, cols: int, with_bias: bool, seed: int, onednn: None, calls: list
) -> None:
    a, b = torch.randn(n, inner), torch.randn(cols, inner)
    bias = torch.randn(cols) if with_bias else None
    start = torch.zeros(1) if bias is None else bias
    assert_rounded(multiply(a, b, bias), a, b.t(), start)
    wide = torch.full((n, cols + 3), torch.nan)
    got = multiply(a, b, bias, out=wide[:, 1 : cols + 1])
    assert got.data_ptr() == wide[:, 1:].data_ptr()
    assert_rounded(got, a, b.t(), start)
    assert wide[:, [0, cols + 1, cols + 2]].isnan().all()
    assert calls
    # rows that are columns of something, and a column of something
    assert_rounded(multiply(a.t().contiguous().t(), b, bias), a, b.t(), start)


@pytest.mark.parametrize(("n", "inner", "cols"), SHAPES)
@pytest.mark.parametrize("turned", [False, True])
def test_add_product_equals_float64(
    n: int, inner: int, cols: int, turned: bool, seed: int, onednn: None, calls: list
) -> None:
    a = torch.randn(inner, n).t() if turned else torch.randn(n, inner)
    b, total = torch.randn(inner, cols), torch.randn(n, cols)
    start = total.clone()
    add_product(total, a, b)
    assert_rounded(total, a, b, start)
    if n == 130:
        assert len(calls) == 17
        assert sum(shape[0] for shape in calls) == n
        assert max(shape[0] for shape in calls) * cols * 4 <= 9000


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_log_probs_and_gradients_by_onednn_equal_float64(
    backward: str, seed: int, onednn: None, calls: list
) -> None:
    hidden = torch.randn(70, 24, requires_grad=True)
    weight = torch.randn(301, 24, requires_grad=True)
    bias = torch.randn(301, requires_grad=True)
    labels = torch.randint(301, (70,))
    coefficient = torch.randn(70)
    leaves = [hidden, weight, bias]
    tol = 2**-14
    logps = fastpo.linear_logprobs(hidden, weight, labels, bias, backward=backward, tol=tol)
    truth = linear_logprobs_reference(hidden.double(), weight.double(), labels, bias.double())
    assert (logps - truth).abs().max() <= 1e-4
    got = torch.autograd.grad(logps, leaves, coefficient)
    expected = torch.autograd.grad(truth, leaves, coefficient.double())
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= (1e-3 if backward == "certified" else 1e-5) * b.norm()
    assert len(calls) > 3


def test_onednn_is_asked_for_float32_whatever_the_caller_allows(
    seed: int, onednn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting at each call: not every processor has products that would show it."""
    switch, asked = torch.backends.mkldnn.matmul, []
    real = products_torch._onednn
    monkeypatch.setattr(
        products_torch, "_onednn", lambda *a: (asked.append(switch.fp32_precision), real(*a))[1]
    )
    hidden, labels = torch.randn(9, 16, requires_grad=True), torch.randint(33, (9,))
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        fastpo.linear_logprobs(hidden, torch.randn(33, 16), labels).sum().backward()
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before
    assert len(asked) >= 3
    assert set(asked) == {"ieee"}


def test_only_what_gains_goes_to_onednn(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: True)
    side = round(products_torch.LEAST_WORK ** (1 / 3)) + 1
    large, small = torch.ones(side, side), torch.ones(4, 4)
    pieces = -(-side // products_torch.TERMS)
    for a in (small, large.double()):
        multiply(a, a)
        add_product(a.clone(), a, a)
    assert not calls
    multiply(large, large)
    add_product(large.clone(), large, large)
    assert len(calls) == pieces + 1
    assert sum(shape[1] for shape in calls) == 2 * side
    multiply(large.t(), large.t())
    made = len(calls)
    assert made == 2 * pieces + 1
    gaps = torch.ones(side, side + 1)[:, :side]
    for a, b in ((large, gaps), (gaps, large)):
        multiply(a, b)
        add_product(large.clone(), a, b)
    assert len(calls) == made
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: False)
    multiply(large, large)
    assert len(calls) == made


@pytest.mark.parametrize(
    ("vendor", "capability", "faster"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
    ],
)
def test_rule(vendor: str, capability: str, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"vendor_id : {vendor}\n")
    rule = products_torch.onednn_is_faster.__wrapped__
    assert rule() == (faster and torch.backends.mkl.is_available())


def test_memory_beside_the_result_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: True)
    a, b, out = torch.ones(3000, 500), torch.ones(1500, 500), torch.zeros(3000, 1500)
    whole = out.numel() * 4
    bound = products_torch.CPU_PRODUCT_BYTES * 5 // 4
    assert whole > 2 * bound  # or the test says nothing

    turned = b.t().contiguous()

    def twice() -> list[torch.Tensor]:
        multiply(a, b, out=out)
        add_product(out, a, turned)
        return []

    assert peak_extra_bytes(twice) <= bound


def test_logits_of_many_terms_are_as_accurate_as_those_of_mkl(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms of one sign, where a running sum loses most: summed up in one go oneDNN has twice the error."""
    a, b = torch.rand(256, 2048), torch.rand(256, 2048)
    truth = a.double() @ b.double().t()
    errors = {}
    for name, chosen in (("onednn", True), ("mkl", False)):
        monkeypatch.setattr(products_torch, "onednn_is_faster", lambda chosen=chosen: chosen)
        errors[name] = float((multiply(a, b) - truth).norm())
    monkeypatch.setattr(products_torch, "TERMS", 2048)
    monkeypatch.setattr(products_torch, "onednn_is_faster", lambda: True)
    in_one_go = float((multiply(a, b) - truth).norm())
    assert errors["onednn"] <= 0.7 * in_one_go
    if torch.backends.mkl.is_available():
        assert errors["onednn"] <= 1.2 * errors["mkl"]
