"""The Triton backend of linear_logprobs against float64, on CPU tensors.

Not collected by itself: test_linear_logprobs_triton.py runs it in a process of its own, with TRITON_INTERPRET=1
set before Triton is loaded. Tiles are 16 rows × 32 columns × 16 there, so small shapes have many tiles.
``bulk``: operands are fetched through tensor descriptors, as aligned matrices are on sm_90 and later.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import fastpo
from fastpo.kernels import linear_logprobs_backward_triton as backward_launcher
from fastpo.kernels import linear_logprobs_forward_triton as forward_launcher
from fastpo.kernels import linear_logprobs_triton, matmul_triton, tile_configs
from fastpo.kernels.linear_logprobs_torch import ForwardResult
from fastpo.kernels.logit_transform import LogitTransform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(large) = inf

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FLOAT32, BFLOAT16, FLOAT16]
# (dtype, bulk)
WAYS = [*((dtype, False) for dtype in DTYPES), (FLOAT32, True), (BFLOAT16, True)]
WAY_IDS = [str(dtype) + " bulk" * bulk for dtype, bulk in WAYS]
PLAIN = LogitTransform()
SCALED = LogitTransform(logit_scale=1.7, temperature=0.6)
NEGATIVE = LogitTransform(logit_scale=-0.7)
CAPPED = LogitTransform(logit_scale=0.8, softcap=4.0, temperature=1.3)


@dataclass(frozen=True)
class Problem:
    """Arguments of a call, with the rows that count and the coefficients of their log-probs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    rows: torch.Tensor | None
    grad: torch.Tensor
    transform: LogitTransform = PLAIN

    def forward(self, want_stats: bool = True, budget: int = 2**26) -> ForwardResult:
        target = tile_configs.target(self.hidden.device)
        return forward_launcher.launch_forward(
            self.hidden, self.weight, self.bias, self.labels, self.rows, self.transform, want_stats,
            target, budget,
        )  # fmt: skip

    def backward(
        self,
        lse: torch.Tensor,
        hidden: bool = True,
        weight: bool = True,
        bias: bool = True,
        budget: int = 2**26,
        last_columns: int | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        target = tile_configs.target(self.hidden.device)
        return backward_launcher.launch_backward(
            self.grad, self.hidden, self.weight, self.bias, self.labels, self.rows, lse, self.transform,
            hidden, weight, bias and self.bias is not None, target, budget, last_columns,
        )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The same in float64, with all logits at once."""

    logits: torch.Tensor
    logps: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    top1: torch.Tensor
    logit_mean: torch.Tensor
    gradients: tuple[torch.Tensor | None, ...]
    bias_terms: torch.Tensor  # (V,) Σ_i |dz_iv|: what rounding in the sum for db is relative to


def reference(p: Problem) -> Reference:
    hidden, weight = (t.double().detach().requires_grad_() for t in (p.hidden, p.weight))
    bias = None if p.bias is None else p.bias.double().requires_grad_()
    kept = hidden if p.rows is None else hidden[p.rows]
    product = torch.nn.functional.linear(kept, weight, bias)
    product.retain_grad()
    raw = product * p.transform.logit_scale
    if p.transform.softcap is not None:
        raw = p.transform.softcap * torch.tanh(raw / p.transform.softcap)
    z = raw / p.transform.temperature
    logp = torch.log_softmax(z, dim=1)
    logps = logp.gather(1, p.labels.unsqueeze(1)).squeeze(1)
    logps.backward(p.grad.double())
    probabilities = logp.exp()
    return Reference(
        logits=z.detach(),
        logps=logps.detach(),
        lse=torch.logsumexp(z, dim=1).detach(),
        entropy=-torch.where(probabilities > 0, probabilities * logp, 0.0).sum(dim=1).detach(),
        top1=z.argmax(dim=1) == p.labels,
        logit_mean=z.mean(dim=1).detach(),
        gradients=(hidden.grad, weight.grad, None if bias is None else bias.grad),
        bias_terms=product.grad.abs().sum(dim=0),
    )


def make_problem(
    seed: int,
    dtype: torch.dtype,
    transform: LogitTransform = PLAIN,
    *,
    bias: bool = True,
    gather: bool = True,
    bulk: bool = False,
    more_rows_than_columns: bool = False,
) -> Problem:
    """Odd and prime sizes drawn from ``seed``, but for a hidden size that ``bulk`` copies need; a few units."""
    draw = random.Random(seed)
    small, large = draw.choice([17, 19, 23, 29]), draw.choice([67, 89, 97, 101])
    n, vocab = (large, small) if more_rows_than_columns else (small, large)
    width = draw.choice([16, 48, 80] if bulk else [5, 31, 33, 37])
    total = n + draw.randrange(1, 9) if gather else n
    labels = torch.randint(vocab, (n,))
    labels[:2] = torch.tensor([0, vocab - 1])
    return Problem(
        hidden=torch.randn(total, width).to(dtype),
        weight=(torch.randn(vocab, width) * 2 / math.sqrt(width)).to(dtype),
        bias=torch.randn(vocab).to(dtype) if bias else None,
        labels=labels,
        rows=torch.randperm(total)[:n].sort().values if gather else None,
        grad=torch.randn(n),
        transform=transform,
    )


def nats(want: Reference) -> float:
    """What float32 arithmetic may cost: 2e-6·max(1, max|z|) nats."""
    return 2e-6 * max(1.0, want.logits[want.logits.isfinite()].abs().max().item())


def check_forward(p: Problem, got: ForwardResult, want: Reference) -> None:
    """float32: as ``nats`` has it; 16-bit inputs: 1e-4 nats."""
    bound = nats(want) if p.hidden.dtype == FLOAT32 else 1e-4
    assert got.logps.dtype == got.lse.dtype == torch.float32
    assert (got.logps <= 0).all()
    # lse and the mean are as large as the logits, so that float32 rounds them accordingly.
    wide = max(bound, nats(want))
    for name, atol in (("logps", bound), ("lse", wide), ("entropy", bound), ("logit_mean", wide)):
        value, expected = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(
            value.double(), expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert torch.equal(got.top1, want.top1)
    peak = want.logits.amax(dim=1)
    torch.testing.assert_close(got.peak.double(), peak, rtol=0, atol=wide)


def check_gradients(
    p: Problem, got: tuple[torch.Tensor | None, ...], want: Reference, floor: float = 0.0
) -> None:
    """Relative error in the norm: 4e-3 for 16-bit inputs, for float32 that of p; ``floor`` if all cancel."""
    wide = p.hidden.dtype == FLOAT32
    bound = nats(want) if wide else 4e-3
    names, inputs = ("hidden", "weight", "bias"), (p.hidden, p.weight, p.bias)
    for name, argument, value, expected in zip(names, inputs, got, want.gradients, strict=True):
        assert (value is None) == (expected is None), name
        if argument is None:
            continue
        assert value.dtype == argument.dtype
        assert value.shape == argument.shape
        error = value.double() - expected
        if name == "bias" and not wide:
            # Terms of either sign cancel here. Each was rounded once, and so was the sum: 2^-8 at most,
            # or the spacing of subnormal numbers.
            room = 2**-8 * (1.01 * want.bias_terms + expected.abs()) + floor
            info = torch.finfo(value.dtype)
            assert (error.abs() <= room + info.smallest_normal * info.eps).all()
        else:
            norms = error.norm().item(), expected.norm().item()
            assert norms[0] <= bound * norms[1] + floor, f"d{name}: error and norm {norms}"


@pytest.mark.parametrize(("dtype", "bulk"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("transform", [PLAIN, SCALED, CAPPED], ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_forward_equals_float64(
    seed: int, dtype: torch.dtype, transform: LogitTransform, bias: bool, bulk: bool
) -> None:
    p = make_problem(seed, dtype, transform, bias=bias, gather=seed % 2 == 0, bulk=bulk)
    check_forward(p, p.forward(), reference(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_problems_reach_both_ways_to_load(seed: int, dtype: torch.dtype) -> None:
    """What the parameter ``bulk`` here and below relies on."""
    for bulk in (False, True):
        p = make_problem(seed, dtype, bulk=bulk)
        target = tile_configs.target(p.hidden.device)
        for matrix in (p.hidden[p.rows], p.weight):
            assert tile_configs.bulk_copies(target, matrix) == bulk


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
def test_gathered_rows_go_through_in_parts_that_fit_the_budget(
    seed: int, bulk: bool, monkeypatch
) -> None:
    p = make_problem(seed, FLOAT32, SCALED, bulk=bulk)
    row_bytes = p.hidden.shape[1] * 4
    parts = []
    real = forward_launcher._launch_rows
    monkeypatch.setattr(
        forward_launcher, "_launch_rows", lambda h, *a: (parts.append(len(h)), real(h, *a))
    )
    got = p.forward(budget=7 * row_bytes)
    check_forward(p, got, reference(p))
    assert sum(parts) == len(p.labels)
    assert max(parts) == 7
    assert len(p.forward(budget=1).logps) == len(p.labels)  # a row at a time is the least


def test_without_statistics_only_log_probs_and_lse_come_back(seed: int) -> None:
    p = make_problem(seed, FLOAT32)
    plain, full = p.forward(want_stats=False), p.forward(want_stats=True)
    assert plain[2:] == (None,) * 4
    assert torch.equal(plain.logps, full.logps)
    assert torch.equal(plain.lse, full.lse)


@pytest.mark.parametrize(("dtype", "bulk"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("transform", [SCALED, CAPPED], ids=["scaled", "capped"])
@pytest.mark.parametrize("tall", [False, True], ids=["vocabulary cut", "rows cut"])
@pytest.mark.parametrize("budget", [2**26, 2048], ids=["one slice", "slices"])
def test_gradients_equal_float64(
    seed: int, dtype: torch.dtype, transform: LogitTransform, tall: bool, budget: int, bulk: bool
) -> None:
    p = make_problem(
        seed, dtype, transform, gather=seed % 2 == 0, bulk=bulk, more_rows_than_columns=tall
    )
    check_gradients(p, p.backward(p.forward(False).lse, budget=budget), reference(p))


def test_copy_of_gathered_rows_takes_no_room_beside_d_hidden(seed: int, monkeypatch) -> None:
    p = make_problem(seed, FLOAT32)
    lse = p.forward(False).lse
    rooms = []
    real = torch.index_select
    monkeypatch.setattr(
        torch, "index_select", lambda *a, out: (rooms.append(out), real(*a, out=out))[1]
    )
    d_hidden, _, _ = p.backward(lse, budget=2048)
    assert [room.data_ptr() for room in rooms] == [d_hidden.data_ptr()]
    assert rooms[0].shape == (len(p.rows), p.hidden.shape[1])


def test_small_budget_means_several_slices() -> None:
    """What the test above relies on: first, middle and last slice differ in what they read and write."""
    for n, vocab in ((17, 67), (67, 17)):
        for dtype in DTYPES:
            assert len(backward_launcher.plan_slices(n, vocab, (16, 32), dtype, 2048)) >= 3


@pytest.mark.parametrize("tiles", [((16, 16, 16), (64, 32, 32)), ((64, 32, 16), (16, 16, 32))])
@pytest.mark.parametrize("tall", [False, True], ids=["vocabulary cut", "rows cut"])
@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
def test_logits_and_products_may_have_different_tiles(
    seed: int, tiles: tuple, tall: bool, bulk: bool, monkeypatch
) -> None:
    logits, product = (tile_configs.TileConfig(*tile, 1, 1) for tile in tiles)
    choose = {"logits": logits, "matmul": product}
    monkeypatch.setattr(backward_launcher, "tile_config", lambda use, *_: choose[use])
    real = backward_launcher.matmul

    def checked(a: torch.Tensor, *args, **options) -> None:
        """Through pointers the products read ``a`` in whole tiles: past its end there must be zeros."""
        if bulk:
            return real(a, *args, **options)
        whole = a._base if a.stride() == a._base.stride() else a._base.t()
        m = math.ceil(a.shape[0] / product.rows) * product.rows
        k = math.ceil(a.shape[1] / product.depth) * product.depth
        read = whole[:m, :k].clone()
        assert read.shape == (m, k)
        read[: a.shape[0], : a.shape[1]] = 0.0
        assert not read.any()
        real(a, *args, **options)

    monkeypatch.setattr(backward_launcher, "matmul", checked)
    p = make_problem(seed, FLOAT32, bulk=bulk, more_rows_than_columns=tall)
    check_gradients(p, p.backward(p.forward(False).lse, budget=2048), reference(p))


@pytest.mark.parametrize(("dtype", "bulk"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("tall", [False, True], ids=["vocabulary cut", "rows cut"])
@pytest.mark.parametrize("columns", [3, 16])
def test_gradient_of_the_last_columns(
    seed: int, dtype: torch.dtype, bulk: bool, tall: bool, columns: int
) -> None:
    p = make_problem(seed, dtype, bulk=bulk, more_rows_than_columns=tall)
    columns = min(columns, p.weight.shape[1])
    want = reference(p)
    lse = want.lse.float()
    for budget in (2**26, 2048):  # one slice, several
        d_hidden, d_weight, d_bias = p.backward(lse, budget=budget, last_columns=columns)
        assert d_weight.shape == (len(p.weight), columns)
        last = want.gradients[1][:, -columns:]
        error = (d_weight.double() - last).norm() / last.norm()
        assert error <= (nats(want) if dtype == FLOAT32 else 4e-3)
        for got, whole in zip((d_hidden, d_bias), p.backward(lse, budget=budget)[::2], strict=True):
            # Bulk copies may be given up for columns that they cannot describe.
            close = 0.0 if dtype == FLOAT32 else 4e-3
            torch.testing.assert_close(got, whole, rtol=close or 1e-5, atol=1e-5)


@pytest.mark.parametrize("need", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("tall", [False, True], ids=["vocabulary cut", "rows cut"])
def test_what_is_frozen_gets_no_gradient(seed: int, need: str, tall: bool, monkeypatch) -> None:
    p = make_problem(seed, FLOAT32, more_rows_than_columns=tall)
    lse = p.forward(False).lse
    products = []
    real = backward_launcher.matmul
    monkeypatch.setattr(
        backward_launcher, "matmul", lambda *a, **k: (products.append(1), real(*a, **k))
    )
    want = dict(zip(("hidden", "weight", "bias"), p.backward(lse), strict=True))
    assert len(products) == 2
    products.clear()
    got = p.backward(lse, **{name: name == need for name in want})
    assert len(products) == (need != "bias")
    for name, value in zip(want, got, strict=True):
        assert torch.equal(value, want[name]) if name == need else value is None
    assert p.backward(lse, False, False, False) == (None, None, None)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_any_strides(seed: int, dtype: torch.dtype) -> None:
    p = make_problem(seed, dtype)
    (total, width), vocab = p.hidden.shape, p.weight.shape[0]
    hidden = torch.full((width, 2 * total), math.nan, dtype=dtype)[:, ::2].t()
    weight = torch.full((vocab + 3, 2 * width + 1), math.nan, dtype=dtype)[3:, 1::2]
    hidden.copy_(p.hidden)
    weight.copy_(p.weight)
    p = replace(p, grad=torch.tensor(0.7).expand(len(p.grad)))  # as the gradient of a sum comes
    want = reference(p)
    every_other = {
        name: torch.stack([getattr(p, name)] * 2, dim=1).flatten()[::2]
        for name in ("labels", "bias", "rows")
    }
    p = replace(p, hidden=hidden, weight=weight, **every_other)
    assert not p.hidden.is_contiguous()
    assert not p.weight.is_contiguous()
    got = p.forward()
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse, budget=2048), want)


def test_no_rows(seed: int) -> None:
    p = make_problem(seed, FLOAT32)
    nothing = torch.empty(0)
    for rows in (None, torch.empty(0, dtype=torch.int64)):
        hidden = p.hidden[:0] if rows is None else p.hidden
        empty = replace(p, hidden=hidden, labels=p.labels[:0], rows=rows, grad=nothing)
        assert [value.shape for value in empty.forward()] == [(0,)] * 6
        for gradient, like in zip(empty.backward(nothing), (hidden, p.weight, p.bias), strict=True):
            assert torch.equal(gradient, torch.zeros_like(like))


@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
@pytest.mark.parametrize(
    "transform", [PLAIN, NEGATIVE, CAPPED], ids=["plain", "negative", "capped"]
)
def test_what_lies_past_the_end_has_no_part_in_maximum_and_sum(
    seed: int, bulk: bool, transform: LogitTransform
) -> None:
    """All logits are far below the zeros that are read there: a single one would outweigh them all."""
    p = make_problem(seed, FLOAT32, transform, bias=False, bulk=bulk)
    sign = math.copysign(1.0, transform.logit_scale)
    size = 12.0 if transform.softcap is None else 3.0
    weight = -sign * (1 + torch.rand_like(p.weight)) * size / p.weight.shape[1]
    p = replace(p, hidden=1 + torch.rand_like(p.hidden), weight=weight)
    got, want = p.forward(), reference(p)
    assert want.logits.max() < -2
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse, budget=2048), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["hundred", "far below zero", "uniform", "one-hot", "forbidden tokens"]
)
def test_hard_logits(seed: int, dtype: torch.dtype, kind: str) -> None:
    p = make_problem(seed, dtype, bulk=seed % 2 == 0)
    vocab = p.weight.shape[0]
    hidden, weight, bias = p.hidden, p.weight, torch.zeros(vocab)
    floor = 0.0
    if kind == "hundred":
        hidden, weight = torch.randn_like(hidden), torch.randn_like(weight)
        largest = (hidden.double() @ weight.double().t()).abs().max()
        hidden = hidden * (100 / largest)
    elif kind == "far below zero":
        bias -= 1000.0
    elif kind == "uniform":
        weight = weight * 0
        floor = 1e-6  # dH is zero but for rounding
    elif kind == "one-hot":
        hidden, weight = hidden * 0, weight * 0
        bias[int(p.labels[2])] = 60.0
        floor = 1e-6
    else:
        bias[torch.randperm(vocab)[: vocab // 2]] = -math.inf
        bias[:32] = -math.inf  # a whole tile
        allowed = bias.isfinite().nonzero().squeeze(1)
        p = replace(p, labels=allowed[torch.randint(len(allowed), p.labels.shape)])
    p = replace(p, hidden=hidden.to(dtype), weight=weight.to(dtype), bias=bias.to(dtype))
    got, want = p.forward(), reference(p)
    assert got.logps.isfinite().all()
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse, budget=2048), want, floor)


@pytest.mark.parametrize("splits", [1, 3])
def test_of_equal_logits_the_lowest_id_is_the_argmax(splits: int, monkeypatch) -> None:
    monkeypatch.setattr(forward_launcher, "vocabulary_splits", lambda *_: splits)
    vocab = 67  # three tiles of 32 columns; 64 is the first of its tile
    pairs = [(5, 9), (3, 64), (3, 66), (40, 50)]
    cases = [(pair, label) for pair in pairs for label in pair] + [((40, 50), 41)]
    for winners, label in cases:
        bias = torch.zeros(vocab)
        bias[list(winners)] = 2.0
        p = Problem(
            torch.zeros(1, 4),
            torch.zeros(vocab, 4),
            bias,
            torch.tensor([label]),
            None,
            torch.ones(1),
        )
        assert p.forward().top1.item() == (label == winners[0])


def test_label_out_of_range_makes_its_row_nan_and_no_other(seed: int) -> None:
    p = make_problem(seed, FLOAT32, more_rows_than_columns=True)
    want = p.forward()
    labels = p.labels.clone()
    vocab = p.weight.shape[0]
    labels[[0, 3, 5]] = torch.tensor([-1, vocab, 2**40])
    got = replace(p, labels=labels).forward()
    bad = torch.zeros(len(labels), dtype=torch.bool)
    bad[[0, 3, 5]] = True
    assert torch.equal(got.logps.isnan(), bad)
    assert torch.equal(got.logps[~bad], want.logps[~bad])
    gradients = replace(p, labels=labels).backward(got.lse)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_in_hidden_reaches_its_log_prob(seed: int) -> None:
    p = make_problem(seed, FLOAT32, gather=False)
    p.hidden[1, 0] = math.nan
    assert p.forward().logps.isnan().tolist() == [i == 1 for i in range(len(p.labels))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_row_without_coefficient_adds_nothing(seed: int, bad: float) -> None:
    p = make_problem(seed, FLOAT32, CAPPED)
    p.grad[1] = 0.0
    lse = p.forward(False).lse
    lse[1] = bad
    check_gradients(p, p.backward(lse), reference(p))


@pytest.mark.parametrize("coefficient", [1e-9, 1e-6, 3e4, 1e6])
def test_float16_coefficients_of_any_size(seed: int, coefficient: float) -> None:
    """dz alone would underflow below 6e-8 or overflow above 65504; the gradients here do not."""
    p = make_problem(seed, FLOAT16, bias=False)
    size = 1 / coefficient
    # Logits stay as they are; dH gets the factor of weight, dW that of hidden.
    balanced = max(min(size, 1e3), 1e-3)
    wide = replace(
        p,
        hidden=(p.hidden.double() / balanced).half(),
        weight=(p.weight.double() * balanced).half(),
        grad=p.grad * coefficient,
    )
    lse = wide.forward(False).lse
    d_hidden, _, _ = wide.backward(lse, weight=False)
    want = reference(wide).gradients[0]
    assert (d_hidden.double() - want).norm() <= 4e-3 * want.norm() + 3e-8 * math.sqrt(want.numel())
    other = replace(
        p,
        hidden=(p.hidden.double() * balanced).half(),
        weight=(p.weight.double() / balanced).half(),
        grad=p.grad * coefficient,
    )
    _, d_weight, _ = other.backward(other.forward(False).lse, hidden=False)
    want = reference(other).gradients[1]
    assert (d_weight.double() - want).norm() <= 4e-3 * want.norm() + 3e-8 * math.sqrt(want.numel())


@pytest.mark.parametrize(("dtype", "bulk"), WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_matmul_scatters_and_adds(
    seed: int, dtype: torch.dtype, bulk: bool, transposed: bool
) -> None:
    m, k, width = 21, 45, 48 if bulk else 37
    padded = torch.zeros(32, 64, dtype=dtype)
    padded[:m, k:] = 1.0  # finite padding of the inner dimension must not count
    if transposed:
        padded = padded.t().contiguous().t()
    padded[:m, :k] = torch.randn(m, k)
    a, b = padded[:m, :k], torch.randn(k, width).to(dtype)
    if bulk:  # what lies outside is not read at all
        padded[:m, k:], padded[m:] = math.nan, math.nan
        b = torch.cat([b, torch.full_like(b, math.nan)])[:k]
    out_rows = torch.randperm(30)[:m]
    addend, alpha = torch.randn(m, width), torch.tensor(0.25)
    out = torch.full((30, width), math.nan, dtype=torch.float32)
    config = tile_configs.tile_config("matmul", tile_configs.target(torch.device("cpu")), b)
    matmul_triton.matmul(a, b, out, config, bulk, 4, alpha=alpha, out_rows=out_rows, addend=addend)
    want = matmul_triton.reference(a, b, addend) * 0.25
    torch.testing.assert_close(out[out_rows].double(), want, rtol=0, atol=1e-5)
    untouched = torch.ones(30, dtype=torch.bool)
    untouched[out_rows] = False
    assert out[untouched].isnan().all()


def test_operation_dispatches_here_and_agrees_with_the_torch_backend(seed: int) -> None:
    p = make_problem(seed, FLOAT32, CAPPED)
    labels = torch.full((p.hidden.shape[0],), -100)
    labels[p.rows] = p.labels
    results = {}
    for backend in ("triton", "torch"):
        hidden, weight, bias = (t.clone().requires_grad_() for t in (p.hidden, p.weight, p.bias))
        logps, stats = fastpo.linear_logprobs(
            hidden, weight, labels, bias,
            logit_scale=0.8, softcap=4.0, temperature=1.3, backend=backend, return_stats=True,
        )  # fmt: skip
        logps.cos().sum().backward()
        results[backend] = (logps, *stats, hidden.grad, weight.grad, bias.grad)
    for got, want in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(2, 4).to(dtype), torch.zeros(8, 4).to(dtype)
    assert str(dtype) in linear_logprobs_triton.supported(hidden, weight)
    with pytest.raises(ValueError, match=f"backend: got 'triton', but dtype {dtype}"):
        linear_logprobs_triton.forward(
            hidden, weight, None, torch.zeros(2, dtype=torch.int64), None, PLAIN, False
        )
    assert "weight has dtype" in linear_logprobs_triton.supported(torch.zeros(2, 4), weight)
    assert linear_logprobs_triton.supported(torch.zeros(2, 4), torch.zeros(8, 4)) is None


# Planted faults: the comparisons above must notice each of them.


class _Altered:
    """A kernel whose launches get other arguments."""

    def __init__(self, kernel, alter) -> None:
        self.kernel, self.alter = kernel, alter

    def __getitem__(self, grid):
        def launch(*args, **options):
            named = dict(zip(self.kernel.arg_names, args, strict=False))
            self.kernel[grid](**{**named, **self.alter(named)}, **options)

        return launch


def other_rows(operand: torch.Tensor | TensorDescriptor) -> torch.Tensor | TensorDescriptor:
    if isinstance(operand, TensorDescriptor):
        return replace(operand, base=operand.base.flip(0))
    return operand.flip(0)


def longer(operand: torch.Tensor | TensorDescriptor) -> torch.Tensor | TensorDescriptor:
    """A descriptor that does not end where the matrix does, as a pointer."""
    if isinstance(operand, TensorDescriptor):
        return replace(operand, shape=[size + 32 for size in operand.shape])
    return operand


FORWARD_FAULTS = {
    "dropped tile": lambda a: {"V": a["V"] - 32},
    "unmasked tail": lambda a: {"V": -(-a["V"] // 32) * 32, "weight": longer(a["weight"])},
    "shifted label": lambda a: {"labels": a["labels"] - 1},
    "ignored bias": lambda a: {"bias": a["bias"] * 0},
    "other rows": lambda a: {"hidden": other_rows(a["hidden"])},
}
BACKWARD_FAULTS = {
    **FORWARD_FAULTS,
    "dropped tile": lambda a: {"tiles": a["tiles"] - 1} if a["tiles"] > 1 else {"V": 0},
    "zero coefficient": lambda a: {"grad": a["grad"] * 0},
    "lse of the next row": lambda a: {"lse": a["lse"].roll(1)},
}
# dz past V is zeroed and the products end at V: either alone suffices, so the fault is in both.
PRODUCT_FAULTS = {
    "zero gradient": lambda a: {"alpha": a["alpha"] * 0 if a["alpha"] is not None else None},
    "unmasked tail": lambda a: {
        "K": -(-a["K"] // 32) * 32,
        "a": longer(a["a"]),
        "b": longer(a["b"]),
    },
    "dropped inner tile": lambda a: {"K": max(1, a["K"] - 16)},
    "missing partial sum": lambda a: {
        "addend": a["addend"] * 0 if a["addend"] is not None else None
    },
}


def faulty_problem(seed: int, bulk: bool) -> Problem:
    """A tail in the vocabulary, with something past it in memory that an unmasked kernel would read."""
    p = make_problem(seed, FLOAT32, SCALED, bulk=bulk)
    vocab = p.weight.shape[0]
    longer = torch.randn(vocab + 32, p.weight.shape[1])
    longer[:vocab] = p.weight
    bias = torch.randn(vocab + 32)
    p.labels[3] = 40  # not a label that a clamp or a shift leaves as it is
    return replace(p, weight=longer[:vocab], bias=bias[:vocab])


@pytest.mark.parametrize("fault", [None, *FORWARD_FAULTS])
@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
def test_forward_faults_are_noticed(seed: int, monkeypatch, fault: str | None, bulk: bool) -> None:
    p = faulty_problem(seed, bulk)
    alter = FORWARD_FAULTS.get(fault, lambda a: {})
    kernel = _Altered(forward_launcher._partials_kernel, alter)
    monkeypatch.setattr(forward_launcher, "_partials_kernel", kernel)
    if fault is None:
        return check_forward(p, p.forward(), reference(p))
    with pytest.raises(AssertionError):
        check_forward(p, p.forward(), reference(p))


@pytest.mark.parametrize("fault", [None, *dict.fromkeys([*BACKWARD_FAULTS, *PRODUCT_FAULTS])])
@pytest.mark.parametrize("bulk", [False, True], ids=["", "bulk"])
def test_backward_faults_are_noticed(seed: int, monkeypatch, fault: str | None, bulk: bool) -> None:
    p = faulty_problem(seed, bulk)
    lse = p.forward(False).lse
    for module, name, faults in (
        (backward_launcher, "_dlogits_kernel", BACKWARD_FAULTS),
        (matmul_triton, "_matmul_kernel", PRODUCT_FAULTS),
    ):
        kernel = _Altered(getattr(module, name), faults.get(fault, lambda a: {}))
        monkeypatch.setattr(module, name, kernel)
    if fault is None:
        return check_gradients(p, p.backward(lse, budget=2048), reference(p))
    with pytest.raises(AssertionError):
        check_gradients(p, p.backward(lse, budget=2048), reference(p))
