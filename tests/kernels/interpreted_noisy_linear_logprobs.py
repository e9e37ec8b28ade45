"""The Triton backend of noisy_linear_logprobs, and its draws, against float64, on CPU tensors.

Not collected by itself: test_noisy_linear_logprobs_triton.py runs it in a process of its own, with
TRITON_INTERPRET=1 set before Triton is loaded. Tiles are 16 rows × 32 columns × 16 there.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from interpreted_linear_logprobs import (
    BFLOAT16,
    CAPPED,
    FLOAT16,
    FLOAT32,
    PLAIN,
    SCALED,
    _Altered,
    longer,
    other_rows,
)

from fastpo.kernels import noisy_linear_logprobs_backward_triton as backward_launcher
from fastpo.kernels import noisy_linear_logprobs_forward_triton as forward_launcher
from fastpo.kernels import (
    noisy_linear_logprobs_triton,
    noisy_logits_triton,
    philox_torch,
    philox_triton,
    tile_configs,
)
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.noise import Needed, Noise, NoisyForward, NoisyGradients

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(large) = inf

ALL = Needed(*[True] * len(Needed._fields))
GENERATOR = Needed(False, False, False, True, True, True)
SMALL = 6000  # bytes, with which a backward has a slice for every tile of columns


# The draw.


@triton.jit
def _words_kernel(tokens, out, key0, key1, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    rows, groups = tl.arange(0, ROWS), tl.arange(0, GROUPS)
    words = philox_triton.philox_words(groups[None, :], tl.load(tokens + rows)[:, None], key0, key1)
    at = rows[:, None] * GROUPS + groups[None, :]
    for k in tl.static_range(4):
        tl.store(out + k * ROWS * GROUPS + at, words[k].to(tl.int32, bitcast=True))


@triton.jit
def _columns_kernel(tokens, columns, out, key0, key1, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    token, column = tl.load(tokens + rows)[:, None], tl.load(columns + cols)[None, :]
    drawn = philox_triton.draw_columns(token, column, key0, key1)
    tl.store(out + rows[:, None] * COLS + cols[None, :], drawn)


def any_seed(seed: int) -> int:
    """Of 64 bits, the highest set."""
    return random.Random(seed).randrange(2**63, 2**64)


def any_tokens(n: int) -> torch.Tensor:
    """Small, negative, above 2³² and near 2⁶³."""
    tokens = torch.randint(2**62, (n,)) * torch.randint(-2, 2, (n,))
    tokens[: n // 2] = torch.arange(n // 2) + 2**32 - 2
    return tokens


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest, relative where |want| > 1."""
    return float(((got - want).abs() / want.abs().clamp(min=1.0)).max())


@pytest.mark.parametrize("top", [False, True], ids=["small seed", "seed ≥ 2⁶³"])
def test_million_draws_are_those_of_philox_torch(seed: int, top: bool, monkeypatch) -> None:
    key = any_seed(seed) if top else 1
    tokens, groups = any_tokens(512), 512
    out = torch.empty(4, 512, groups, dtype=torch.int32)
    _words_kernel[(1,)](tokens, out, *philox_triton.key_words(key), ROWS=512, GROUPS=groups)
    counter = philox_torch._counter(tokens[:, None], torch.arange(groups))
    for got, want in zip(out, philox_torch.philox(counter, key), strict=True):
        assert torch.equal(got.long() % 2**32, want.expand_as(got))
    monkeypatch.setattr(philox_triton, "TILE_ROWS", 512)
    monkeypatch.setattr(philox_triton, "TILE_COLS", 2048)
    got = philox_triton.normal_tile(key, tokens, 2, 2 + 4 * groups)
    assert got.numel() >= 10**6
    assert deviation(got, philox_torch.normal_tile(key, tokens, 2, 2 + 4 * groups)) <= 1e-6


def test_draws_of_gathered_columns(seed: int) -> None:
    key, tokens = any_seed(seed), any_tokens(16)
    columns = torch.randint(2**18, (64,), dtype=torch.int32)
    out = torch.empty(16, 64)
    _columns_kernel[(1,)](tokens, columns, out, *philox_triton.key_words(key), ROWS=16, COLS=64)
    assert deviation(out, philox_torch.normals(key, tokens[:, None], columns.long())) <= 1e-6


def test_edges_of_the_transform() -> None:
    """Words of the largest and the smallest radius, and of angles around the eighths of a circle."""
    edges = [0, 1, 2**31, 2**32 - 1, 2**32 - 2**8, 2**32 - 2**7 - 1]
    quarters = [k * 2**29 + d for k in range(8) for d in (-129, -1, 0, 1, 300)]
    x = torch.tensor([word % 2**32 for word in edges + quarters])
    grid = torch.cartesian_prod(x, x)
    out = torch.empty(2, len(grid))
    words = grid.to(torch.int32).t().contiguous()  # the low 32 bits
    _pairs_kernel[(1,)](words, out, len(grid), SIZE=triton.next_power_of_2(len(grid)))
    for got, want in zip(out, philox_torch.normal_pair(grid[:, 0], grid[:, 1]), strict=True):
        assert deviation(got, want) <= 1e-6


@triton.jit
def _pairs_kernel(words, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(words + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    y = tl.load(words + n + at, mask=at < n, other=0).to(tl.uint32, bitcast=True)
    cosine, sine = philox_triton.normal_pair(x, y)
    tl.store(out + at, cosine, mask=at < n)
    tl.store(out + n + at, sine, mask=at < n)


# The log-probs.


@dataclass(frozen=True)
class Problem:
    """Arguments of a call, with the rows that count and the coefficients of their log-probs."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    rows: torch.Tensor
    grad: torch.Tensor
    noise: Noise
    transform: LogitTransform = PLAIN

    def forward(self, want_clean: bool = True, budget: int = 2**26) -> NoisyForward:
        return forward_launcher.launch_forward(
            self.hidden, self.weight, self.bias, self.labels, self.rows, self.transform, self.noise,
            want_clean, tile_configs.target(self.hidden.device), budget,
        )  # fmt: skip

    def backward(
        self, lse: torch.Tensor, needed: Needed = ALL, budget: int = SMALL
    ) -> NoisyGradients:
        return backward_launcher.launch_backward(
            self.grad, self.hidden, self.weight, self.bias, self.labels, self.rows, lse, self.transform,
            self.noise, needed, tile_configs.target(self.hidden.device), budget,
        )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """The same in float64, with all logits at once and the draws of philox_torch."""

    logps: torch.Tensor
    lse: torch.Tensor
    clean_logps: torch.Tensor
    largest: float  # |z̃|
    sigma: float  # largest |σ|
    gradients: NoisyGradients
    dz: torch.Tensor  # (n, V) gradient of h·Wᵀ + b
    d_sigma: torch.Tensor  # (n, V)


def inputs_of(p: Problem) -> dict[str, torch.Tensor | None]:
    """By the names of ``Needed``."""
    tensors = (p.hidden, p.weight, p.bias, p.noise.weight, p.noise.projection, p.noise.bias)
    return dict(zip(Needed._fields, tensors, strict=True))


def reference(p: Problem) -> Reference:
    x = {
        name: None if t is None else t.double().detach().requires_grad_()
        for name, t in inputs_of(p).items()
    }
    kept = x["hidden"][p.rows]
    product = torch.nn.functional.linear(kept, x["weight"], x["bias"])
    raw = product * p.transform.logit_scale
    if p.transform.softcap is not None:
        raw = p.transform.softcap * torch.tanh(raw / p.transform.softcap)
    z = raw / p.transform.temperature
    of_noise = kept if x["noise_projection"] is None else kept @ x["noise_projection"].t()
    sigma = torch.nn.functional.linear(of_noise, x["noise_weight"], x["noise_bias"])
    columns = torch.arange(z.shape[1])
    noisy = (
        z + sigma * philox_torch.normals(p.noise.seed, p.noise.tokens[:, None], columns).double()
    )
    at_label = p.labels.unsqueeze(1)
    logps = torch.log_softmax(noisy, dim=1).gather(1, at_label).squeeze(1)
    product.retain_grad()
    sigma.retain_grad()
    (logps @ p.grad.double()).backward()
    return Reference(
        logps=logps.detach(),
        lse=torch.logsumexp(noisy, dim=1).detach(),
        clean_logps=torch.log_softmax(z, dim=1).gather(1, at_label).squeeze(1).detach(),
        largest=noisy.detach()[noisy.isfinite()].abs().max().item(),
        sigma=sigma.detach().abs().max().item(),
        gradients=NoisyGradients(**{name: None if t is None else t.grad for name, t in x.items()}),
        dz=product.grad,
        d_sigma=sigma.grad,
    )


def make_problem(
    seed: int,
    dtype: torch.dtype,
    generator: torch.dtype = FLOAT32,
    rank: int | None = None,
    transform: LogitTransform = PLAIN,
    *,
    biases: bool = True,
    bulk: bool = False,
    n: int | None = None,
    vocab: int | None = None,
) -> Problem:
    """Odd and prime sizes drawn from ``seed``, but for inner sizes that ``bulk`` copies need; σ of about 1."""
    draw = random.Random(seed)
    n = n or draw.choice([7, 11, 13])
    vocab = vocab or draw.choice([67, 71, 89])
    width = draw.choice([16, 48] if bulk else [5, 19, 33])
    labels = torch.randint(vocab, (n,))
    labels[:2] = torch.tensor([0, vocab - 1])
    inner = rank or width
    noise = Noise(
        weight=(torch.randn(vocab, inner) / math.sqrt(inner)).to(generator),
        projection=None
        if rank is None
        else (torch.randn(rank, width) / math.sqrt(width)).to(generator),
        bias=torch.randn(vocab).to(generator) if biases else None,
        seed=any_seed(seed),
        tokens=any_tokens(n),
    )
    return Problem(
        hidden=torch.randn(n + 5, width).to(dtype),
        weight=(torch.randn(vocab, width) * 2 / math.sqrt(width)).to(dtype),
        bias=torch.randn(vocab).to(dtype) if biases else None,
        labels=labels,
        rows=torch.randperm(n + 5)[:n],
        grad=torch.randn(n),
        noise=noise,
        transform=transform,
    )


def nats(want: Reference) -> float:
    """What float32 arithmetic may cost: 2e-6·max(1, max|z̃|) nats, and what ε may be off."""
    return 2e-6 * max(1.0, want.largest) + 1e-6 * want.sigma


def check_forward(p: Problem, got: NoisyForward, want: Reference) -> None:
    """float32: as ``nats`` has it; 16-bit inputs: 1e-4 nats."""
    bound = nats(want) if p.hidden.dtype == FLOAT32 else 1e-4
    for name, value in got._asdict().items():
        if value is None:  # clean_logps, where they are not wanted
            continue
        assert value.dtype == FLOAT32
        torch.testing.assert_close(
            value.double(),
            getattr(want, name),
            rtol=0,
            atol=bound,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert (got.logps <= 0).all()


def rounded_terms(p: Problem, dz: torch.Tensor, d_sigma: torch.Tensor) -> dict[str, float]:
    """Of each gradient the root of the sum of its terms' squares.

    That is what independent relative roundings of the terms cost, per 2^-9 at most, however much the terms
    themselves cancel. dX of a low rank, a sum itself, is rounded once more.
    """
    x = {name: None if t is None else t.double() for name, t in inputs_of(p).items()}
    h = x["hidden"][p.rows]
    u, a = x["noise_weight"], x["noise_projection"]
    dz, d_sigma = dz.double().square(), d_sigma.double().square()

    def lengths(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.square().sum(dim=1)

    squares = {
        "weight": dz.sum(dim=1) @ lengths(h),
        "bias": dz.sum(),
        "noise_bias": d_sigma.sum(),
        "hidden": (dz @ lengths(x["weight"])).sum(),
    }
    if a is None:
        squares["noise_weight"] = d_sigma.sum(dim=1) @ lengths(h)
        squares["hidden"] += (d_sigma @ lengths(u)).sum()
    else:
        squares["noise_weight"] = d_sigma.sum(dim=1) @ lengths(h @ a.t())
        squares["hidden"] += (d_sigma @ (u.square() @ lengths(a))).sum()
        squares["noise_projection"] = (d_sigma @ lengths(u)) @ lengths(h)
    return {name: float(square.sqrt()) for name, square in squares.items()}


def check_gradients(p: Problem, got: NoisyGradients, want: Reference, needed: Needed = ALL) -> None:
    """Relative error in the norm; with 16-bit hidden states three roundings of the terms and one of the sum."""
    terms = rounded_terms(p, want.dz, want.d_sigma)
    for name, tensor in inputs_of(p).items():
        value, expected = getattr(got, name), getattr(want.gradients, name)
        if tensor is None or not getattr(needed, name):
            assert value is None, name
            continue
        assert value.dtype == tensor.dtype, name
        assert value.shape == tensor.shape, name
        error, norm = (value.double() - expected).norm().item(), expected.norm().item()
        wide = p.hidden.dtype == FLOAT32
        bound = nats(want) * norm if wide else 2**-9 * (3 * terms[name] + norm)
        assert error <= bound, f"{name}: error {error}, norm {norm}, of the terms {terms[name]}"


@pytest.mark.parametrize(
    ("dtype", "generator", "rank", "transform", "bulk"),
    [
        (FLOAT32, FLOAT32, None, CAPPED, False),
        (FLOAT32, FLOAT32, None, SCALED, True),
        (FLOAT32, FLOAT32, 16, CAPPED, True),
        (FLOAT32, FLOAT32, 5, PLAIN, True),  # a generator that bulk copies cannot take
        (BFLOAT16, FLOAT32, None, CAPPED, True),
        (BFLOAT16, FLOAT32, None, PLAIN, False),
        (BFLOAT16, BFLOAT16, None, SCALED, True),
        (BFLOAT16, FLOAT32, 5, SCALED, True),
        (BFLOAT16, BFLOAT16, 3, CAPPED, False),
        (FLOAT16, FLOAT32, 20, PLAIN, False),
    ],
)  # fmt: skip
def test_log_probs_and_all_gradients_equal_float64(
    seed: int, dtype, generator, rank: int | None, transform: LogitTransform, bulk: bool
) -> None:
    p = make_problem(seed, dtype, generator, rank, transform, bulk=bulk)
    target = tile_configs.target(p.hidden.device)
    assert tile_configs.bulk_copies(target, p.hidden, p.weight) == bulk
    got, want = p.forward(), reference(p)
    check_forward(p, got, want)
    assert (want.logps - want.clean_logps).abs().max() > 0.01
    check_gradients(p, p.backward(got.lse), want)


def test_several_blocks_of_rows_in_one_slice_without_biases(seed: int) -> None:
    p = make_problem(seed, FLOAT32, rank=3, biases=False, n=19)
    got, want = p.forward(), reference(p)
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse, budget=2**26), want)


@pytest.mark.parametrize("rank", [None, 16], ids=["split", "low rank"])
def test_rows_in_parts_and_slices_of_the_generator(
    seed: int, rank: int | None, monkeypatch
) -> None:
    """A forward whose budget holds neither all rows nor the parts of all of U."""
    p = make_problem(seed, BFLOAT16, rank=rank, transform=SCALED, bulk=True, n=7)
    rows, slices = [], []
    launch, plan = forward_launcher._launch_rows, forward_launcher.plan_columns
    monkeypatch.setattr(
        forward_launcher, "_launch_rows", lambda *a: (rows.append(len(a[3])), launch(*a))
    )
    monkeypatch.setattr(
        forward_launcher, "plan_columns", lambda *a: (slices.append(plan(*a)), slices[-1])[1]
    )
    row_bytes = 2 * p.hidden.shape[1] + (0 if rank is None else 4 * rank + 2 * 3 * rank)
    check_forward(p, p.forward(budget=2 * 5 * row_bytes), reference(p))
    assert rows == [5, 2]
    assert all(len(columns) == 3 for columns, _ in slices)


def test_backward_with_a_small_budget_has_several_slices(seed: int, monkeypatch) -> None:
    """What the tests above rely on."""
    slices = []
    plan = backward_launcher.plan_columns
    monkeypatch.setattr(
        backward_launcher, "plan_columns", lambda *a: (slices.append(plan(*a)), slices[-1])[1]
    )
    p = make_problem(seed, FLOAT32, n=7)
    p.backward(torch.full((7,), 5.0))
    assert len(slices[0][0]) == 3


@pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "low rank"])
def test_only_what_is_wanted_is_made(seed: int, rank: int | None, monkeypatch) -> None:
    p = make_problem(seed, FLOAT32, rank=rank, transform=CAPPED, n=5, vocab=37)
    lse = p.forward(False).lse
    full = p.backward(lse)
    products, written = [], []
    matmul, kernel = backward_launcher.matmul, backward_launcher._noisy_gradients_kernel
    monkeypatch.setattr(
        backward_launcher, "matmul", lambda *a, **k: (products.append(1), matmul(*a, **k))
    )

    def look(a: dict) -> dict:
        written.append([a["d_sigma"] is not None, a["dz"] is not None])
        return {}

    monkeypatch.setattr(backward_launcher, "_noisy_gradients_kernel", _Altered(kernel, look))
    # (products of a slice, dσ is written, dz is written)
    expected = {
        "hidden": (2, True, True),
        "weight": (1, False, True),
        "bias": (0, False, True),
        "noise_weight": (1, True, False),
        "noise_projection": (1, True, False),
        "noise_bias": (0, True, False),
    }
    for name, (count, sigma, model) in expected.items():
        products.clear()
        written.clear()
        got = p.backward(lse, Needed(*(field == name for field in Needed._fields)), budget=2**26)
        for field, value in got._asdict().items():
            if field != name or (rank is None and name == "noise_projection"):
                assert value is None, field
            else:
                want = getattr(full, field)
                torch.testing.assert_close(value, want, rtol=0, atol=2e-6 * want.norm().item())
        if rank is not None or name != "noise_projection":
            assert (len(products), *written[0]) == (count, sigma, model), name
    products.clear()
    written.clear()
    p.backward(lse, GENERATOR, budget=2**26)
    assert len(products) == (1 if rank is None else 2)
    assert written == [[True, False]]


def test_any_strides(seed: int) -> None:
    p = make_problem(seed, FLOAT32, rank=4)
    want = reference(p)

    def far_apart(matrix: torch.Tensor) -> torch.Tensor:
        out = torch.full((matrix.shape[1], 2 * matrix.shape[0]), math.nan)[:, ::2].t()
        return out.copy_(matrix)

    def every_other(vector: torch.Tensor) -> torch.Tensor:
        return torch.stack([vector] * 2, dim=1).flatten()[::2]

    noise = Noise(
        far_apart(p.noise.weight), far_apart(p.noise.projection), every_other(p.noise.bias), p.noise.seed,
        every_other(p.noise.tokens),
    )  # fmt: skip
    p = replace(
        p, hidden=far_apart(p.hidden), weight=far_apart(p.weight), bias=every_other(p.bias),
        labels=every_other(p.labels), rows=every_other(p.rows), grad=every_other(p.grad), noise=noise,
    )  # fmt: skip
    got = p.forward()
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse), want)


def test_split_generator_in_any_layout(seed: int) -> None:
    """Its parts are what the kernels read, whatever lies where."""
    p = make_problem(seed, BFLOAT16, bulk=True)
    rows, width = p.noise.weight.shape
    strided = torch.empty(width, rows + 1).t()[1:].copy_(p.noise.weight)
    p = replace(p, noise=p.noise._replace(weight=strided))
    check_forward(p, p.forward(), reference(p))


def test_no_rows(seed: int) -> None:
    p = make_problem(seed, BFLOAT16, rank=3)
    nothing = torch.empty(0, dtype=torch.int64)
    p = replace(p, labels=nothing, rows=nothing, grad=nothing.float())
    p = replace(p, noise=p.noise._replace(tokens=nothing))
    assert [value.shape for value in p.forward()] == [(0,)] * 3
    for name, gradient in p.backward(nothing.float())._asdict().items():
        assert torch.equal(gradient, torch.zeros_like(inputs_of(p)[name]))


@pytest.mark.parametrize("bulk", [False, True])
def test_forbidden_tokens_and_what_lies_past_the_end(seed: int, bulk: bool) -> None:
    """A bias of −∞, on a whole tile too; the rest so low that a zero from past the end would outweigh it."""
    p = make_problem(seed, FLOAT32, bulk=bulk, n=11)
    bias = p.bias - 300.0
    forbidden = torch.rand(len(bias)) < 0.3
    forbidden[32:64] = True
    forbidden[p.labels] = False
    bias[forbidden] = -math.inf
    p = replace(p, bias=bias)
    got, want = p.forward(), reference(p)
    check_forward(p, got, want)
    check_gradients(p, p.backward(got.lse), want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_without_coefficient_adds_nothing(seed: int, bad: float) -> None:
    p = make_problem(seed, FLOAT32, transform=CAPPED)
    p.grad[1] = 0.0
    lse = p.forward(False).lse
    lse[1] = bad
    check_gradients(p, p.backward(lse), reference(p))


def test_label_out_of_range_makes_its_row_nan_and_no_other(seed: int) -> None:
    p = make_problem(seed, FLOAT32)
    want = p.forward()
    labels = p.labels.clone()
    labels[[0, 3, 5]] = torch.tensor([-1, len(p.weight), 2**40])
    got = replace(p, labels=labels).forward()
    bad = torch.zeros(len(labels), dtype=torch.bool)
    bad[[0, 3, 5]] = True
    for name in ("logps", "clean_logps"):
        assert torch.equal(getattr(got, name).isnan(), bad)
        assert torch.equal(getattr(got, name)[~bad], getattr(want, name)[~bad])


def test_parts_of_many_columns(seed: int, monkeypatch) -> None:
    """Two programs for a row of X and of U."""
    monkeypatch.setattr(noisy_logits_triton, "PARTS_COLS", 16)
    p = make_problem(seed, BFLOAT16, rank=20)
    check_forward(p, p.forward(), reference(p))


def test_unaligned_generator_in_the_backward_alone(seed: int) -> None:
    p = make_problem(seed, FLOAT32, rank=5, bulk=True)
    want = reference(p)
    check_gradients(p, p.backward(want.lse.float()), want)


def largest_noise_fits(p: Problem, gradients) -> None:
    """float16's dσ where a label has nearly the largest ε, and a coefficient just below a power of two."""
    tokens = torch.arange(200_000)
    epsilon = philox_torch.normals(p.noise.seed, tokens, torch.tensor(5))
    token = tokens[int(epsilon.abs().argmax())].expand(len(p.labels))
    noise = p.noise._replace(tokens=token, weight=0.01 * p.noise.weight, bias=0 * p.noise.bias)
    labels, grad = torch.full_like(p.labels, 5), torch.full_like(p.grad, 1.99)
    p = replace(p, labels=labels, grad=grad, noise=noise)
    assert epsilon.abs().max() > 4.01
    got, want = gradients(p), reference(p)
    for name in ("noise_weight", "noise_bias"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want.gradients, name), rtol=0.01, atol=0.01
        )


def test_float16_at_the_largest_noise(seed: int) -> None:
    largest_noise_fits(
        make_problem(seed, FLOAT16, n=3), lambda p: p.backward(reference(p).lse.float())
    )


@pytest.mark.parametrize("coefficient", [1e-9, 1e6])
def test_float16_coefficients_of_any_size(seed: int, coefficient: float) -> None:
    """dσ alone would underflow below 6e-8 or overflow above 65504; the generator's gradient does not."""
    p = make_problem(seed, FLOAT16)
    p = replace(p, grad=p.grad * coefficient)
    needed = Needed(False, False, False, True, False, True)
    check_gradients(p, p.backward(p.forward(False).lse, needed), reference(p), needed)


def test_module_is_the_backend(seed: int) -> None:
    p = make_problem(seed, BFLOAT16)
    arguments = p.hidden, p.weight, p.bias, p.labels, p.rows
    got = noisy_linear_logprobs_triton.forward(*arguments, p.transform, p.noise, True)
    want = reference(p)
    check_forward(p, got, want)
    grad = torch.tensor(0.7).expand(len(p.grad))  # as the gradient of a sum comes
    gradients = noisy_linear_logprobs_triton.backward(
        grad, *arguments, got.lse, p.transform, p.noise, GENERATOR
    )
    check_gradients(p, gradients, reference(replace(p, grad=grad)), GENERATOR)
    assert "float64" in noisy_linear_logprobs_triton.supported(p.hidden.double(), p.weight)


# Planted faults: the comparisons above must notice each of them.


@triton.jit
def swapped_lanes(token, first, key0, key1, ROWS: tl.constexpr, COLS: tl.constexpr):
    drawn = philox_triton.draw_tile(token, first, key0, key1, ROWS, COLS)
    left, right = drawn.reshape(ROWS, COLS // 2, 2).split()
    return tl.join(right, left).reshape(ROWS, COLS)


@triton.jit
def swapped_pairs(token, first, key0, key1, ROWS: tl.constexpr, COLS: tl.constexpr):
    drawn = philox_triton.draw_tile(token, first, key0, key1, ROWS, COLS)
    left, right = drawn.reshape(ROWS, COLS // 4, 2, 2).permute(0, 1, 3, 2).split()
    return tl.join(right, left).permute(0, 1, 3, 2).reshape(ROWS, COLS)


def past_the_end(operand):
    """With 32 rows of zeros or entries of 100 more, which an unmasked kernel would read as likely tokens."""
    if not isinstance(operand, torch.Tensor):
        return longer(operand)
    more = torch.cat(
        [operand, operand.new_full((32, *operand.shape[1:]), 100.0 * (operand.dim() == 1))]
    )
    return more[: len(operand)]


def without_low_part(a: dict) -> dict:
    parts = a["noise_weight"].clone()
    parts[:, a["low_part"] :] = 0.0
    return {"noise_weight": parts}


SHARED_FAULTS = {
    "wrong counter": lambda a: {"tokens": a["tokens"] + 2**32},
    "wrong seed": lambda a: {"key1": a["key1"] ^ 1},
    "σ without bias": lambda a: {"noise_bias": a["noise_bias"] * 0},
    "σ of other rows": lambda a: {"x": other_rows(a["x"])},
    "low part of U missing": without_low_part,
    "unmasked tail": lambda a: (
        {"V": -(-a["V"] // 32) * 32}
        | {name: past_the_end(a[name]) for name in ("weight", "bias", "noise_weight", "noise_bias")}
    ),
    "shifted label": lambda a: {"labels": a["labels"] - 1},
}
BACKWARD_FAULTS = {
    "lse of the next row": lambda a: {"lse": a["lse"].roll(1)},
    "missing slope": lambda a: {"factor": 1.0},
    "zero coefficient": lambda a: {"grad": a["grad"] * 0},
}
DRAWS = {"swapped lanes": swapped_lanes, "swapped pairs": swapped_pairs}


@pytest.mark.parametrize("fault", [None, *DRAWS, *SHARED_FAULTS])
def test_forward_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    p = faulty_problem(seed)
    want = reference(p)
    plant(monkeypatch, forward_launcher, "_noisy_partials_kernel", fault)
    if fault is None:
        return check_forward(p, p.forward(False), want)
    with pytest.raises(AssertionError):
        check_forward(p, p.forward(False), want)


@pytest.mark.parametrize(
    "fault", [None, "swapped lanes", "wrong counter", "σ without bias", *BACKWARD_FAULTS]
)
def test_backward_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    p = faulty_problem(seed)
    lse, want = p.forward(False).lse, reference(p)
    plant(monkeypatch, backward_launcher, "_noisy_gradients_kernel", fault)
    if fault is None:
        return check_gradients(p, p.backward(lse, budget=2**26), want)
    with pytest.raises(AssertionError):
        check_gradients(p, p.backward(lse, budget=2**26), want)


def faulty_problem(seed: int) -> Problem:
    """A tail in the vocabulary, with something past it in memory that an unmasked kernel would read."""
    p = make_problem(seed, BFLOAT16, transform=SCALED, n=11)
    p.labels[3] = 40  # not a label that a clamp or a shift leaves as it is
    return p


def plant(monkeypatch, launcher, kernel: str, fault: str | None) -> None:
    if fault in DRAWS:
        monkeypatch.setattr(launcher, "draw_tile", DRAWS[fault])
    else:
        alter = {**SHARED_FAULTS, **BACKWARD_FAULTS}.get(fault, lambda a: {})
        monkeypatch.setattr(launcher, kernel, _Altered(getattr(launcher, kernel), alter))
