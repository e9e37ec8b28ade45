"""The certified backward: its promise against a float64 oracle, hard data, memory, and planted faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpo
from fastpo.kernels import certified_torch, chunking, linear_logprobs_torch, nucleus
from fastpo.kernels.logit_transform import LogitTransform

HEIGHT = 8
SLACK = 1e-3
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(logit_scale=0.4, temperature=0.7),
    LogitTransform(logit_scale=1.7, softcap=8.0, temperature=1.3),
]
# Of one rounding, to the nearest, in each dtype.
ROUNDING = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


@pytest.fixture
def low_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight rows, windows of two, groups of four, chunks that fit neither, slices of 32 columns."""
    monkeypatch.setitem(nucleus.BLOCK_ROWS, "cpu", HEIGHT)
    forward, backward = chunking.plan_certified_forward, chunking.plan_certified_backward

    def few_rows(n: int, *args: Any) -> chunking.CertifiedForwardPlan:
        forward(n, *args)
        return chunking.CertifiedForwardPlan(5, 3, max(1, min(n, 2 * HEIGHT)), 11)

    def few_columns(*args: Any) -> chunking.CertifiedPlan:
        backward(*args)
        return chunking.CertifiedPlan(4 * HEIGHT, 7, 32)

    monkeypatch.setattr(certified_torch, "plan_certified_forward", few_rows)
    monkeypatch.setattr(certified_torch, "plan_certified_backward", few_columns)


def patch_tiles(monkeypatch: pytest.MonkeyPatch, dlogits_tile: Any) -> None:
    for module in (certified_torch, linear_logprobs_torch):
        monkeypatch.setattr(module, "dlogits_tile", dlogits_tile)


def logits64(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """z (N, V) and dz/du of the given (rounded) inputs, in float64."""
    raw = hidden.double() @ weight.double().t()
    if bias is not None:
        raw += bias.double()
    z = LogitTransform(*transform).apply_(raw)
    return z, torch.as_tensor(transform.derivative(z), dtype=torch.float64).expand_as(z)


def dlogits(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor,
    transform: LogitTransform,
    tol: float,
) -> tuple[Tensor, fastpo.TokenStats]:
    """d log-prob / d raw product of every row: the gradient that the bias gets from that row alone."""
    b = bias.clone().requires_grad_()
    logps, stats = fastpo.linear_logprobs(
        hidden, weight, labels, b, backward="certified", tol=tol, return_stats=True,
        **transform._asdict(),
    )  # fmt: skip
    rows = [torch.autograd.grad(logp, b, retain_graph=True)[0] for logp in logps]
    return torch.stack(rows).double(), stats


def touched(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor,
    transform: LogitTransform,
    tol: float,
) -> Tensor:
    """(N, V): the columns that the backward looks at for each row, read off what the forward hands it."""
    outputs = torch.ops.fastpo.linear_logprobs(
        hidden, weight, labels, bias, *transform, -100, "auto", False, tol, False
    )
    order, count, columns, counts = outputs[2], int(outputs[3]), outputs[7], outputs[8]
    seen = torch.zeros(hidden.shape[0], weight.shape[0], dtype=torch.bool)
    of_blocks = nucleus.column_mask(columns, weight.shape[0])
    of_blocks |= (counts == weight.shape[0])[:, None]
    seen[order[:count]] = of_blocks.repeat_interleave(HEIGHT, dim=0)[:count]
    return seen


def hard_rows(kind: str, n: int, vocab: int) -> Tensor:
    """Logits (n, vocab) of one kind, to be made by a head that is the identity."""
    if kind == "flat":
        return torch.randn(n, vocab) * 0.1
    if kind == "peaked":
        return torch.randn(n, vocab) * 6
    if kind == "flat and peaked":
        return torch.randn(n, vocab) * torch.where(torch.arange(n) % 3 == 0, 0.2, 8.0)[:, None]
    if kind == "uniform":  # everything ties
        return torch.zeros(n, vocab)
    if kind == "ties at the threshold":  # a few likely entries, and many of one small size
        z = torch.full((n, vocab), -7.0)
        z[:, : vocab // 8] = torch.randn(n, vocab // 8)
        return z[:, torch.randperm(vocab)]
    if kind == "one entry":
        z = torch.full((n, vocab), -80.0)
        z[torch.arange(n), torch.randint(vocab, (n,))] = 30.0
        return z
    assert (
        kind == "powers"
    )  # p_v ∝ rank^-s, s from row to row: nuclei of all sizes, straddling blocks
    rank = torch.stack([torch.randperm(vocab) for _ in range(n)]) + 1.0
    return -torch.linspace(0.8, 3.0, n)[:, None] * rank.log()


KINDS = [
    "flat", "peaked", "flat and peaked", "uniform", "ties at the threshold", "one entry", "powers",
]  # fmt: skip


def check_promise(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor,
    transform: LogitTransform,
    tol: float,
) -> None:
    """For every row: dropped mass ≤ tol, and the gradient exact where it is not dropped."""
    dz, stats = dlogits(hidden, weight, labels, bias, transform, tol)
    z, slope = logits64(hidden, weight, bias, transform)
    kept = labels != -100
    p = torch.softmax(z, dim=1)
    hot = torch.zeros_like(p).scatter_(1, torch.where(kept, labels, 0)[:, None], 1.0)
    truth = torch.where(kept[:, None], (hot - p) * slope, 0.0)
    error = (dz - truth).abs().sum(1)
    rounding = 4 * ROUNDING[hidden.dtype] * truth.abs().sum(1)
    # float32 logits of this size, hence probabilities
    accumulated = 1e-6 * z.abs().amax(1).clamp(min=1.0) if hidden.dtype != torch.float64 else 1e-13
    steepest = slope.abs().amax(1)
    bound = tol * (1 + SLACK) * steepest + rounding + accumulated * steepest
    assert bool((error <= bound).all())

    looked_at = touched(hidden, weight, labels, bias, transform, tol)
    assert bool(looked_at[hot.bool() & kept[:, None]].all())  # every label
    dropped = (p * ~looked_at * kept[:, None]).sum(1)
    assert not dz[~looked_at].any()
    assert float(dropped.max()) <= tol * (1 + SLACK) + 1e-7
    assert float(stats.dropped_mass_max) <= tol
    # Of what it promises to have at most, the forward speaks the truth: unions only add columns.
    assert float(dropped.max()) <= float(stats.dropped_mass_max) * (1 + SLACK) + 1e-6
    assert 0.0 < float(stats.active_fraction) <= 1.0


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 37),
    vocab=st.integers(2, 300),
    width=st.integers(1, 24),
    exponent=st.integers(4, 14),
    spread=st.floats(0.05, 12.0),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    transform=st.sampled_from(TRANSFORMS),
    draw=st.integers(0, 2**31),
)
def test_the_promise_holds(
    n: int,
    vocab: int,
    width: int,
    exponent: int,
    spread: float,
    dtype: torch.dtype,
    transform: LogitTransform,
    draw: int,
    low_blocks: None,
) -> None:
    torch.manual_seed(draw)
    hidden = (torch.randn(n, width) * torch.rand(n, 1) * 2).to(dtype)
    weight = (torch.randn(vocab, width) * (spread / math.sqrt(width))).to(dtype)
    labels = torch.where(torch.rand(n) < 0.2, -100, torch.randint(vocab, (n,)))
    labels[0] = 0
    check_promise(hidden, weight, labels, torch.randn(vocab).to(dtype), transform, 2.0**-exponent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_data(kind: str, dtype: torch.dtype, seed: int, low_blocks: None) -> None:
    z = hard_rows(kind, 45, 97)
    labels = torch.randint(97, (45,))
    for tol in (2**-4, 2**-10):
        check_promise(
            z.to(dtype), torch.eye(97).to(dtype), labels, torch.zeros(97).to(dtype),
            LogitTransform(), tol,
        )  # fmt: skip


def test_forbidden_tokens(seed: int, low_blocks: None) -> None:
    """A bias of −inf takes a token out of every nucleus; its probability and its gradient are 0."""
    hidden, weight, bias = torch.randn(20, 9), torch.randn(60, 9), torch.zeros(60)
    bias[torch.randperm(60)[:30]] = -torch.inf
    labels = torch.randint(60, (20,))
    labels[bias[labels] == -torch.inf] = int(bias.argmax())
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    logps = fastpo.linear_logprobs(h, w, labels, bias, backward="certified", tol=2**-8)
    d_hidden, d_weight = torch.autograd.grad(logps.sum(), (h, w))
    assert bool(logps.isfinite().all() and d_hidden.isfinite().all() and d_weight.isfinite().all())
    assert not d_weight[bias == -torch.inf].any()


# ---- what a gradient is made of


def gradients(
    inputs: list[Tensor], labels: Tensor, coefficient: Tensor, **options: Any
) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    logps = fastpo.linear_logprobs(leaves[0], leaves[1], labels, leaves[2], **options)
    return list(torch.autograd.grad((logps * coefficient).sum(), leaves))


def oracle(
    inputs: list[Tensor], labels: Tensor, coefficient: Tensor, tol: float, transform: LogitTransform
) -> list[Tensor]:
    """Float64 gradients with each row cut to the columns that the operation says it keeps."""
    hidden, weight, bias = inputs
    cut, _ = dlogits(hidden, weight, labels, bias, transform, tol)
    z, slope = logits64(hidden, weight, bias, transform)
    p = torch.softmax(z, dim=1)
    kept = labels != -100
    hot = torch.zeros_like(p).scatter_(1, torch.where(kept, labels, 0)[:, None], 1.0)
    dz = (
        torch.where((cut != 0) & kept[:, None], (hot - p) * slope, 0.0)
        * coefficient.double()[:, None]
    )
    return [dz @ weight.double(), dz.t() @ hidden.double(), dz.sum(0)]


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(45, 11, 97), (150, 24, 70), (9, 5, 1031), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_memory", [False, True])
def test_gradients_match_float64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    transform: LogitTransform,
    low_memory: bool,
    seed: int,
    low_blocks: None,
) -> None:
    """n ≤ V and n > V, one sweep and two: the products of the cut dz, to one rounding of the result."""
    n, width, vocab = shape
    inputs = [
        torch.randn(n, width) * torch.rand(n, 1) * 3,
        torch.randn(vocab, width) * (4 / math.sqrt(width)),
        torch.randn(vocab),
    ]
    inputs = [t.to(dtype) for t in inputs]
    labels = torch.where(torch.rand(n) < 0.3, -100, torch.randint(vocab, (n,)))
    labels[0] = vocab - 1
    coefficient = torch.randn(n)
    options = {"backward": "certified", "tol": 2**-6, **transform._asdict()}
    got = gradients(inputs, labels, coefficient, low_memory=low_memory, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for value, truth in zip(
        got, oracle(inputs, labels, coefficient, 2**-6, transform), strict=True
    ):
        assert value.dtype == dtype
        assert relative(value, truth) <= tolerance
    assert not got[0][labels == -100].any()


def draw(n: int = 60, width: int = 12, vocab: int = 211) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of all entropies, their labels, and coefficients."""
    hidden = torch.randn(n, width) * torch.linspace(0.1, 4.0, n)[:, None]
    weight = torch.randn(vocab, width)
    return [hidden, weight, torch.zeros(vocab)], torch.randint(vocab, (n,)), torch.randn(n)


def test_frozen_inputs_change_nothing_else(seed: int, low_blocks: None) -> None:
    inputs, labels, coefficient = draw()
    everything = gradients(inputs, labels, coefficient, backward="certified", tol=2**-6)
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        logps = fastpo.linear_logprobs(
            leaves[0], leaves[1], labels, leaves[2], backward="certified", tol=2**-6
        )
        (alone,) = torch.autograd.grad((logps * coefficient).sum(), leaves[wanted])
        torch.testing.assert_close(alone, everything[wanted])


def test_auto_is_certified_for_low_precision_alone(seed: int, low_blocks: None) -> None:
    inputs, labels, coefficient = draw()
    for dtype, backward in ((torch.float32, "exact"), (torch.bfloat16, "certified")):
        typed = [t.to(dtype) for t in inputs]
        auto = gradients(typed, labels, coefficient, tol=0.25)
        same = gradients(typed, labels, coefficient, tol=0.25, backward=backward)
        other = "exact" if backward == "certified" else "certified"
        different = gradients(typed, labels, coefficient, tol=0.25, backward=other)
        assert all(torch.equal(a, b) for a, b in zip(auto, same, strict=True))
        assert not torch.equal(auto[0], different[0])


def test_no_tolerance_is_exact(seed: int, low_blocks: None) -> None:
    inputs, labels, coefficient = draw()
    exact = gradients(inputs, labels, coefficient, backward="exact")
    none = gradients(inputs, labels, coefficient, backward="certified", tol=0.0)
    assert all(torch.equal(a, b) for a, b in zip(exact, none, strict=True))


def test_pieces_hold_little_that_no_block_needs(
    seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nuclei that steepness alone tells apart are nested: ordered blocks and columns make them compact."""
    rank = torch.randperm(97) + 1.0
    steepness = torch.linspace(1.2, 4.0, 4 * HEIGHT)[torch.randperm(4 * HEIGHT)]
    hidden = (-steepness[:, None] * rank.log()).requires_grad_()
    weight, labels, tol = torch.eye(97), hidden.argmax(dim=1), 2**-6
    made = []
    real = certified_torch.dlogits_tile
    patch_tiles(monkeypatch, lambda h, w, *a: (made.append(len(h) * len(w)), real(h, w, *a))[1])
    fastpo.linear_logprobs(hidden, weight, labels, backward="certified", tol=tol).sum().backward()
    needed = int(touched(hidden, weight, labels, torch.zeros(97), LogitTransform(), tol).sum())
    assert needed <= sum(made) <= 1.25 * needed < hidden.numel()


def test_gradients_are_contiguous_for_any_strides(seed: int, low_blocks: None) -> None:
    """As the operator declares them to the compiler."""
    inputs, labels, coefficient = draw()
    turned = [t.detach().t().contiguous().t().requires_grad_() for t in inputs[:2]]
    assert not any(t.is_contiguous() for t in turned)
    logps = fastpo.linear_logprobs(*turned, labels, backward="certified", tol=2**-6)
    got = torch.autograd.grad(logps @ coefficient.to(logps), turned)
    assert all(g.is_contiguous() for g in got)


def test_repeats_bit_for_bit(seed: int, low_blocks: None) -> None:
    inputs, labels, coefficient = draw()
    first, second = (
        gradients(inputs, labels, coefficient, backward="certified", tol=2**-6) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_without_a_coefficient_cost_nothing(
    seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, labels, coefficient = draw()
    seen = []
    real = certified_torch.dlogits_tile
    patch_tiles(monkeypatch, lambda h, *a: (seen.append(len(h)), real(h, *a))[1])
    coefficient[5:] = 0.0
    got = gradients(inputs, labels, coefficient, backward="certified", tol=2**-6)
    assert 0 < max(seen) <= 5
    truth = oracle(inputs, labels, coefficient, 2**-6, LogitTransform())
    assert relative(got[1], truth[1]) <= 1e-5
    seen.clear()
    gradients(inputs, labels, coefficient * 0, backward="certified", tol=2**-6)
    assert not seen


def test_statistics_of_the_call(seed: int, low_blocks: None) -> None:
    """Peaked rows touch a few columns; flat ones all of them; without a gradient nothing is decided."""
    vocab = 320
    z = torch.cat([hard_rows("one entry", 16, vocab), hard_rows("flat", 16, vocab)])
    labels = torch.full((32,), 3)
    hidden, weight = z.requires_grad_(), torch.eye(vocab)
    options = {"backward": "certified", "tol": 2**-8, "return_stats": True}
    _, stats = fastpo.linear_logprobs(hidden, weight, labels, **options)
    assert int(stats.dense_rows) == 16
    assert 0.5 < float(stats.active_fraction) <= 0.5 + 0.5 * (2 * HEIGHT + 1) / vocab
    assert float(stats.dropped_mass_max) <= 2**-8
    assert all(not s.requires_grad and s.dim() == 0 for s in stats[3:])
    with torch.no_grad():
        _, stats = fastpo.linear_logprobs(hidden, weight, labels, **options)
    assert [float(s) for s in stats[3:]] == [0.0, 1.0, 32.0]
    _, stats = fastpo.linear_logprobs(hidden[:0], weight, labels[:0], **options)
    assert [float(s) for s in stats[3:]] == [0.0, 0.0, 0.0]


def test_values_are_those_of_the_exact_operation(seed: int, low_blocks: None) -> None:
    for transform in TRANSFORMS:
        inputs, labels, _ = draw()
        labels[::4] = -100
        inputs[0].requires_grad_()
        exact, certified = (
            fastpo.linear_logprobs(
                *inputs[:2], labels, inputs[2], backward=backward, return_stats=True,
                **transform._asdict(),
            )
            for backward in ("exact", "certified")
        )  # fmt: skip
        torch.testing.assert_close(certified[0], exact[0], rtol=1e-5, atol=1e-5)
        for a, b in zip(certified[1][:3], exact[1][:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_nuclei_are_nearly_the_smallest(seed: int) -> None:
    """On smooth distributions the thresholds found leave nuclei at most a quarter too large."""
    z = hard_rows("powers", 64, 5000).double()
    for tol in (2**-4, 2**-10, 2**-14):
        e = (z - z.amax(1, keepdim=True)).exp()
        total = e.sum(1, keepdim=True)
        threshold, tail = certified_torch.nucleus_thresholds(e, total, tol, torch.empty_like(e))
        rising = e.sort(dim=1).values
        smallest = 5000 - (rising.cumsum(1) <= tol * total).sum(1)
        sizes = (e >= threshold).sum(1)
        assert bool((sizes >= smallest).all())
        assert float(sizes.sum() / smallest.sum()) <= 1.25
        measured = torch.where(e < threshold, e, 0.0).sum(1, keepdim=True)
        assert bool((measured <= tail * (1 + 1e-9)).all())
        assert bool((tail <= tol * total).all())


@pytest.mark.parametrize("part", ["step", "frozen head", "forward"])
@pytest.mark.parametrize(
    ("n", "vocab", "width", "dtype", "low_memory"),
    [
        (700, 40_009, 64, torch.bfloat16, False),
        (6000, 2063, 64, torch.bfloat16, False),
        (2048, 16_001, 256, torch.bfloat16, True),
        (1500, 32_000, 64, torch.float32, False),
        (3000, 10_007, 8, torch.float32, False),
    ],
)
def test_extra_memory_is_bounded(
    n: int, vocab: int, width: int, dtype: torch.dtype, low_memory: bool, part: str, seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from benchmarks.memory import MIB, eager_step, peak_extra_bytes

    hidden = (torch.randn(n, width) * torch.rand(n, 1)).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(part != "frozen head")
    labels = torch.randint(vocab, (n,))

    def step() -> list[Tensor]:
        logps = fastpo.linear_logprobs(
            hidden, weight, labels, backward="certified", low_memory=low_memory
        )
        if part == "forward":
            return [logps]
        wanted = [t for t in (hidden, weight) if t.requires_grad]
        return list(torch.autograd.grad(logps.sum(), wanted))

    budget = 20 * MIB
    monkeypatch.setattr(chunking, "CPU_BUDGET_BYTES", budget)
    monkeypatch.setattr(chunking, "CPU_TILE_BYTES", MIB)
    wide = 0
    if part == "step" and dtype == torch.bfloat16 and not low_memory:
        wide = 4 * min(n, vocab) * width
    saved = n * (100 + vocab / 8 / nucleus.BLOCK_ROWS["cpu"])
    assert peak_extra_bytes(step) <= budget + wide + saved
    if part == "step":
        plain = peak_extra_bytes(lambda: eager_step(hidden, weight, labels))
        assert plain > 1.5 * (budget + wide + saved)


# ---- planted faults: each must be seen


def left_out(real: Any, *args: Any) -> Any:
    order, columns, counts = real(*args)
    for block in range(len(columns)):
        for word in range(columns.shape[1]):
            if columns[block, word] != 0:
                lowest = columns[block, word] & -columns[block, word]
                columns[block, word] ^= lowest
    counts = torch.where(counts == args[3], counts - 1, counts)
    return order, columns, counts


def wrong_block(real: Any, *args: Any) -> Any:
    order, columns, counts = real(*args)
    order[[0, -1]] = order[[-1, 0]]  # the row with the smallest nucleus for that with the largest
    return order, columns, counts


@pytest.mark.parametrize(
    "fault", ["column left out", "wrong block", "scaled up", "search too bold"]
)
def test_a_planted_fault_is_seen(
    fault: str, seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault in ("column left out", "wrong block"):
        plant = left_out if fault == "column left out" else wrong_block
        real = certified_torch.gather_blocks
        monkeypatch.setattr(certified_torch, "gather_blocks", lambda *a: plant(real, *a))
    elif fault == "scaled up":  # the kept probabilities made to sum to one
        real_tile = certified_torch.dlogits_tile

        def renormalised(h, w, b, column, inside, lse, *rest):  # type: ignore[no-untyped-def]
            kept = torch.logsumexp(h @ w.t() + b, dim=1)
            return real_tile(h, w, b, column, inside, torch.minimum(lse, kept), *rest)

        patch_tiles(monkeypatch, renormalised)
        monkeypatch.setattr(
            certified_torch,
            "plan_certified_backward",
            lambda *a: chunking.CertifiedPlan(HEIGHT, 999, 32),
        )
    else:
        real_search = certified_torch.nucleus_thresholds

        def bold(e, total, tol, free):  # type: ignore[no-untyped-def]
            threshold, tail = real_search(e, total, tol, free)
            return (threshold * 10.0).clamp(max=1.0), tail

        monkeypatch.setattr(certified_torch, "nucleus_thresholds", bold)
    z = torch.cat([hard_rows("powers", 9, 97), hard_rows("one entry", 3, 97)])
    z = z[torch.randperm(12)]
    likely = int(z[0].argmax())  # it becomes the lowest column, the one that is left out
    z[:, [0, likely]] = z[:, [likely, 0]]
    with pytest.raises(AssertionError):
        check_promise(
            z, torch.eye(97), torch.randint(97, (12,)), torch.zeros(97), LogitTransform(), 2**-5
        )


def test_the_check_of_everything_names_the_row(
    seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPO_CHECK", "1")
    inputs, labels, coefficient = draw()
    gradients(inputs, labels, coefficient, backward="certified", tol=2**-6)
    real = certified_torch.gather_blocks
    monkeypatch.setattr(certified_torch, "gather_blocks", lambda *a: wrong_block(real, *a))
    with pytest.raises(RuntimeError, match=r"certified backward: row \d+ loses .* of its probab"):
        gradients(inputs, labels, coefficient, backward="certified", tol=2**-6)
