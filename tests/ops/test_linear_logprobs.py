"""The operation against a float64 oracle: values, gradients, statistics, hard data, and planted faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastpo
from fastpo.kernels import backends, chunking, linear_logprobs_torch
from fastpo.kernels.linear_logprobs_torch import linear_logprobs_reference
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.precision import full_precision
from fastpo.ops.linear_logprobs import score

# (N, H, V): more rows than columns and the reverse, odd, prime, and one of each extreme
SHAPES = [(37, 16, 101), (211, 33, 97), (64, 61, 2053), (1, 1, 1), (5, 128, 2), (300, 7, 131)]
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(logit_scale=0.3, temperature=0.7),
    LogitTransform(logit_scale=1.7, softcap=5.0, temperature=1.3),
]


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, *, bias: bool = True, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    n, width, vocab = shape
    hidden = torch.randn(n, width).to(dtype)
    weight = (torch.randn(vocab, width) * (3 / math.sqrt(width))).to(dtype)
    labels = torch.randint(vocab, (n,))
    labels[torch.rand(n) < ignored] = -100
    return hidden, weight, labels, torch.randn(vocab).to(dtype) if bias else None


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors
    ]


def oracle(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, list[Tensor | None]]:
    """Float64 log-probs of the given (rounded) inputs, and the float64 leaves that carry gradients."""
    h, w, b = leaves(hidden, weight, bias, dtype=torch.float64)
    return linear_logprobs_reference(h, w, labels, b, transform), [h, w, b]


def relative(value: Tensor, truth: Tensor) -> float:
    scale = truth.double().norm()
    error = (value.double() - truth.double()).norm()
    return float(error / scale) if scale > 0 else float(error)


def rounding(
    z: Tensor,
    transform: LogitTransform,
    hidden: Tensor,
    weight: Tensor,
    grad: Tensor,
    dtype: torch.dtype,
) -> list[float]:
    """‖error‖ of dH, dW and db that the rounding of the logits alone explains.

    Logits z (N, V) known to ε·max|z| make p wrong by that factor. Where a label has nearly all of the mass,
    1 − p is as small as this error and no relative bound can hold. Rows err independently of each other.
    """
    p = torch.softmax(z, -1) * transform.derivative(z) * grad.double().abs()[:, None]
    unit = 2 * torch.finfo(dtype).eps * max(1.0, float(z.abs().max()))
    parts = (
        p @ weight.double().abs(),
        ((p**2).t() @ hidden.double() ** 2).sqrt(),
        (p**2).sum(0).sqrt(),
    )
    return [unit * float(part.norm()) for part in parts]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles in both directions even for small problems."""
    monkeypatch.setattr(chunking, "CPU_BUDGET_BYTES", 96 * 1024)
    monkeypatch.setattr(chunking, "CPU_TILE_BYTES", 4 * 1024)
    monkeypatch.setattr(chunking, "ALIGNMENT", 1)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matches_float64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    transform: LogitTransform,
    seed: int,
    small_tiles: None,
) -> None:
    hidden, weight, labels, bias = draw(shape, dtype)
    truth, truth_leaves = oracle(hidden, weight, labels, bias, transform)
    inputs = leaves(hidden, weight, bias)
    logps, stats = fastpo.linear_logprobs(
        inputs[0],
        inputs[1],
        labels,
        inputs[2],
        backward="exact",
        return_stats=True,
        **transform._asdict(),
    )
    raw = hidden.double() @ weight.double().t() + bias.double()
    z = LogitTransform(*transform).apply_(raw.clone())
    peak = max(1.0, float(z.abs().max()))
    bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 1e-4 / peak) * peak
    assert float((logps.detach().double() - truth.detach()).abs().max()) <= bound
    assert float(logps.detach().max()) <= 0.0
    assert torch.equal(logps == 0, (labels == -100) | (truth.float() == 0))

    kept = labels != -100
    p = torch.softmax(z, -1)
    entropy = torch.where(kept, -(p * torch.log_softmax(z, -1)).sum(-1), 0.0)
    assert float((stats.entropy.double() - entropy).abs().max()) <= 10 * max(bound, 1e-6)
    assert torch.equal(stats.top1, kept & (z.argmax(-1) == labels))
    mean = torch.where(kept, z.mean(-1), 0.0)
    assert float((stats.logit_mean.double() - mean).abs().max()) <= 1e-5 * peak

    coefficient = torch.randn(shape[0]).to(logps.dtype)
    logps.backward(coefficient)
    truth.backward(coefficient.double())
    # bf16 and fp16: one rounding of the result, nothing more
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6}.get(dtype, 4e-3)
    noise = rounding(z, transform, hidden, weight, coefficient * kept, logps.dtype)
    for got, expected, least in zip(inputs, truth_leaves, noise, strict=True):
        assert got.grad.dtype == dtype
        error = (got.grad.double() - expected.grad).norm()
        assert float(error) <= tolerance * float(expected.grad.norm()) + least
    assert bool((inputs[0].grad[~kept] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_tiles_match_float64(dtype: torch.dtype, seed: int) -> None:
    """The tile plan of real calls, with a vocabulary that takes several tiles."""
    hidden, weight, labels, _ = draw((700, 40, 4111), dtype, bias=False)
    truth, truth_leaves = oracle(hidden, weight, labels, None, LogitTransform())
    inputs = leaves(hidden, weight)
    logps = fastpo.linear_logprobs(inputs[0], inputs[1], labels, backward="exact")
    assert float((logps.detach().double() - truth.detach()).abs().max()) <= 1e-4
    logps.sum().backward()
    truth.sum().backward()
    for got, expected in zip(inputs, truth_leaves[:2], strict=True):
        assert relative(got.grad, expected.grad) <= (5e-6 if dtype == torch.float32 else 4e-3)


def test_shapes_strides_and_leading_dimensions(seed: int) -> None:
    hidden = torch.randn(33, 5, 4, dtype=torch.float64).permute(2, 1, 0)  # (4, 5, 33), strided
    weight = torch.randn(33, 77, dtype=torch.float64).t()[::2]  # (39, 33), strided
    labels = torch.randint(39, (5, 4)).t()
    labels[1, 2] = -7
    h, w = leaves(hidden, weight)
    truth, (th, tw, _) = oracle(
        hidden, weight, labels.masked_fill(labels == -7, -100), None, LogitTransform()
    )
    logps = fastpo.linear_logprobs(h, w, labels, ignore_index=-7)
    assert logps.shape == (4, 5)
    torch.testing.assert_close(logps, truth)
    logps.sum().backward()
    truth.sum().backward()
    torch.testing.assert_close(h.grad, th.grad)
    torch.testing.assert_close(w.grad, tw.grad)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    hidden = torch.zeros(shape, requires_grad=True)
    weight = torch.ones(11, 8, requires_grad=True)
    logps, stats = fastpo.linear_logprobs(
        hidden, weight, torch.zeros(shape[:-1], dtype=torch.int64), return_stats=True
    )
    assert logps.shape == stats.entropy.shape == shape[:-1]
    logps.sum().backward()
    assert hidden.grad.shape == shape
    assert not weight.grad.any()


def test_all_rows_ignored(seed: int) -> None:
    hidden, weight, labels, bias = draw((9, 8, 21), torch.float32, ignored=2.0)
    h, w, b = leaves(hidden, weight, bias)
    logps, stats = fastpo.linear_logprobs(h, w, labels, b, return_stats=True)
    assert not logps.any()
    assert not stats.top1.any()
    logps.sum().backward()
    for leaf in (h, w, b):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_ignored_rows_are_not_computed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in an ignored row reaches nothing, and the backend sees the labelled rows alone."""
    hidden, weight, labels, _ = draw((40, 8, 21), torch.float32, bias=False)
    labels[0] = -100
    hidden[labels == -100] = torch.nan
    seen = []
    real = linear_logprobs_torch.forward

    def spy(hidden, weight, bias, labels, rows, transform, want_stats):  # type: ignore[no-untyped-def]
        seen.append(labels.numel())
        return real(hidden, weight, bias, labels, rows, transform, want_stats)

    monkeypatch.setattr(linear_logprobs_torch, "forward", spy)
    h, w = leaves(hidden, weight)
    logps = fastpo.linear_logprobs(h, w, labels)
    logps.sum().backward()
    assert seen == [int((labels != -100).sum())]
    assert bool(logps.isfinite().all() and h.grad.isfinite().all() and w.grad.isfinite().all())


# ---- hard data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["all_far_below_zero", "large", "uniform", "one_hot", "edge_labels", "masked_by_bias"]
)
def test_hard_data(kind: str, dtype: torch.dtype, seed: int, small_tiles: None) -> None:
    n, width, vocab = 48, 24, 301
    hidden, weight, labels, _ = draw((n, width, vocab), dtype, bias=False)
    bias = torch.zeros(vocab, dtype=dtype)
    if kind == "all_far_below_zero":
        bias -= 3e4
    elif kind == "large":
        hidden *= 100 / float((hidden.double() @ weight.double().t()).abs().max())
    elif kind == "uniform":
        weight = weight[:1].expand(vocab, width).clone()
    elif kind == "one_hot":
        hidden, weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        hidden[:, 0] = 1
        weight[17, 0] = 30_000
        labels[::2] = 17
    elif kind == "edge_labels":
        labels[0::2], labels[1::2] = 0, vocab - 1
    else:
        bias[5:50] = -torch.inf
        labels = labels.clamp(min=60)
    truth, truth_leaves = oracle(hidden, weight, labels, bias, LogitTransform())
    inputs = leaves(hidden, weight, bias)
    logps, stats = fastpo.linear_logprobs(
        inputs[0], inputs[1], labels, inputs[2], return_stats=True
    )
    peak = float(
        (hidden.double() @ weight.double().t() + bias.double()).nan_to_num(neginf=0.0).abs().max()
    )
    kept = labels != -100
    assert float(logps.detach().max()) <= 0.0
    assert float((logps.detach().double() - truth.detach()).abs().max()) <= 2e-6 * max(1.0, peak)
    assert bool(stats.entropy.isfinite().all())
    assert float(stats.entropy.min()) >= 0.0
    if kind == "uniform":
        torch.testing.assert_close(
            stats.entropy[kept].double(), torch.full_like(truth[kept], math.log(vocab))
        )
    logps.sum().backward()
    truth.sum().backward()
    for got, expected in zip(inputs, truth_leaves, strict=True):
        assert bool(got.grad.isfinite().all())
        # a probability's relative error is the logits' absolute one
        tolerance = max(2e-6 * peak, 5e-6) + (4e-3 if dtype == torch.bfloat16 else 0.0)
        assert float((got.grad.double() - expected.grad).norm()) <= tolerance * max(
            1.0, float(expected.grad.norm())
        )


def test_ties_count_for_the_lowest_id(small_tiles: None) -> None:
    weight = torch.zeros(200, 3)
    weight[[40, 41, 160]] = 1.0
    _, stats = fastpo.linear_logprobs(
        torch.ones(3, 3), weight, torch.tensor([40, 41, 160]), return_stats=True
    )
    assert stats.top1.tolist() == [True, False, False]


# ---- gradients: which, how often, of what order


def test_gradcheck(seed: int, small_tiles: None) -> None:
    hidden, weight, labels, bias = draw((7, 5, 13), torch.float64)
    for transform in TRANSFORMS:
        torch.autograd.gradcheck(
            lambda h, w, b, t=transform: fastpo.linear_logprobs(h, w, labels, b, **t._asdict()),
            tuple(leaves(hidden, weight, bias)),
        )


@pytest.mark.parametrize("shape", [(20, 6, 50), (50, 6, 20)])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_skip_their_product(
    frozen: str, shape: tuple[int, int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels, bias = draw(shape, torch.float32)
    named = dict(zip(("hidden", "weight", "bias"), leaves(hidden, weight, bias), strict=True))
    everything = fastpo.linear_logprobs(named["hidden"], named["weight"], labels, named["bias"])
    everything.sum().backward()
    expected = {name: leaf.grad.clone() for name, leaf in named.items()}
    needs = []
    real = linear_logprobs_torch.backward

    def spy(*args):  # type: ignore[no-untyped-def]
        *_, need_hidden, need_weight, need_bias, _ = args
        needs.append((need_hidden, need_weight, need_bias))
        result = real(*args)
        assert [g is not None for g in result] == list(needs[-1])
        return result

    monkeypatch.setattr(linear_logprobs_torch, "backward", spy)
    for leaf in named.values():
        leaf.grad = None
    named[frozen].requires_grad_(False)
    fastpo.linear_logprobs(named["hidden"], named["weight"], labels, named["bias"]).sum().backward()
    assert needs == [tuple(name != frozen for name in named)]
    for name, leaf in named.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, expected[name])


def test_second_backward_over_a_retained_graph(seed: int) -> None:
    hidden, weight, labels, _ = draw((20, 6, 50), torch.float64, bias=False)
    h, w = leaves(hidden, weight)
    logps = fastpo.linear_logprobs(h, w, labels)
    (first,) = torch.autograd.grad(logps.sum(), h, retain_graph=True)
    (second,) = torch.autograd.grad(2 * logps.sum(), h)
    torch.testing.assert_close(second, 2 * first)


def test_double_backward_is_refused(seed: int) -> None:
    hidden, weight, labels, _ = draw((20, 6, 50), torch.float64, bias=False)
    h, w = leaves(hidden, weight)
    (gradient,) = torch.autograd.grad(
        fastpo.linear_logprobs(h, w, labels).sum(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()


def test_statistics_carry_no_gradient(seed: int) -> None:
    hidden, weight, labels, _ = draw((20, 6, 50), torch.float32, bias=False)
    _, stats = fastpo.linear_logprobs(*leaves(hidden, weight), labels, return_stats=True)
    assert not any(values.requires_grad for values in stats)


# ---- torch.library, torch.compile, autocast, precision switches


@pytest.mark.parametrize("tol", [0.0, 2**-6])
@pytest.mark.parametrize("want_stats", [False, True])
def test_opcheck(want_stats: bool, tol: float, seed: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        hidden, weight, labels, bias = draw((12, 5, 30), dtype)
        h, w, b = leaves(hidden, weight, bias)
        torch.library.opcheck(
            torch.ops.fastpo.linear_logprobs,
            (h, w, labels, b, 1.1, 4.0, 0.9, -100, "auto", want_stats, tol, False),
        )


@pytest.mark.parametrize("tol", [0.0, 2**-6])
def test_opcheck_of_last_columns(tol: float, seed: int) -> None:
    hidden, weight, labels, bias = draw((12, 5, 30), torch.float32)
    h, b, last = leaves(hidden, bias, weight[:, 3:])
    torch.library.opcheck(
        torch.ops.fastpo.linear_logprobs,
        (h, weight, labels, b, 1.1, 4.0, 0.9, -100, "auto", False, tol, False, last),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(20, 6, 50), (300, 6, 50)], ids=["N < V", "N > V"])
@pytest.mark.parametrize(
    "options",
    [
        {"backward": "exact"},
        {"backward": "certified", "tol": 1e-3},
        {"backward": "certified", "tol": 1e-3, "low_memory": True},
    ],
    ids=str,
)
def test_gradient_goes_to_the_last_columns(
    options: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    hidden, weight, labels, bias = draw(shape, dtype)
    h, w, b, last = leaves(hidden, weight, bias, weight[:, 4:])
    logps = score(h, w, labels, b, None, **options)
    coefficients = torch.randn_like(logps)
    expected = torch.autograd.grad(logps, (h, w, b), coefficients)
    got = score(h, w, labels, b, last, **options)
    assert torch.equal(got, logps)
    got = torch.autograd.grad(got, (h, last, b, w), coefficients, allow_unused=True)
    assert got[3] is None
    whole = expected[1][:, 4:]
    assert got[1].shape == whole.shape
    assert (got[1] - whole).norm() <= 16 * torch.finfo(dtype).eps * whole.norm()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])


@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_compiles_whole_and_once_for_every_length(backward: str, seed: int) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        logps, stats = fastpo.linear_logprobs(h, w, labels, backward=backward, return_stats=True)
        return logps.sum() + stats.entropy.sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (16, 19, 23, 40, 57):
        hidden, weight, labels, _ = draw((n, 8, 31), torch.float32, bias=False)
        ours, plain = leaves(hidden, weight), leaves(hidden, weight)
        value = compiled(*ours, labels)
        expected = step(*plain, labels)
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        for a, b in zip(ours, plain, strict=True):
            assert bool(a.grad.any())
            torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count <= 2  # one for the first length, one for every other


def test_autocast_casts_like_a_linear_layer(seed: int) -> None:
    hidden, weight, labels, bias = draw((20, 8, 31), torch.float32)
    h, w, b = leaves(hidden, weight, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = fastpo.linear_logprobs(h, w, labels, b)
    rounded = fastpo.linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels, bias.bfloat16())
    torch.testing.assert_close(logps, rounded, rtol=0, atol=0)
    logps.sum().backward()
    assert {h.grad.dtype, w.grad.dtype, b.grad.dtype} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which leaves float64 alone
        assert (
            fastpo.linear_logprobs(hidden.double(), weight.double(), labels).dtype == torch.float64
        )


def test_float32_stays_float32_whatever_the_switches_say(seed: int) -> None:
    hidden, weight, labels, _ = draw((64, 256, 301), torch.float32, bias=False)
    expected = fastpo.linear_logprobs(hidden, weight, labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(
            fastpo.linear_logprobs(hidden, weight, labels), expected, rtol=0, atol=0
        )
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
@pytest.mark.parametrize("newer", [None, "tf32"])
def test_both_precision_switches_agree_inside_and_come_back(older: str, newer: str | None) -> None:
    """PyTorch raises on reading the setting where its older and its newer switch contradict each other."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = torch.get_float32_matmul_precision(), [s.fp32_precision for s in switches]
    try:
        torch.set_float32_matmul_precision(older)
        if newer is not None:
            switches[0].fp32_precision = newer
        given = [switch.fp32_precision for switch in switches]
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.allow_tf32 is False
            assert torch.get_float32_matmul_precision() == "highest"
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
        assert [switch.fp32_precision for switch in switches] == given
        for switch in switches:  # the older switch can be read again, whatever the mixture was
            switch.fp32_precision = "ieee"
        assert torch.get_float32_matmul_precision() == older
    finally:
        torch.set_float32_matmul_precision(before[0])
        for switch, value in zip(switches, before[1], strict=True):
            switch.fp32_precision = value


def test_auto_takes_pytorch_where_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that is too old for them."""
    triton_module = pytest.importorskip("fastpo.kernels.linear_logprobs_triton")
    monkeypatch.setattr(backends, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(
        triton_module, "supported", lambda *_: "compute capability 7.5 is below 8.0"
    )
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
    assert backends.linear_logprobs_module(hidden, weight, "auto") is linear_logprobs_torch
    with pytest.raises(ValueError, match="got 'triton', but compute capability"):
        backends.linear_logprobs_module(hidden, weight, "triton").forward(
            hidden, weight, None, torch.zeros(4).long(), None, LogitTransform(), False
        )


# ---- planted faults: each must be seen by the comparisons above


@pytest.mark.parametrize(
    "fault", ["zeroed gradient", "dropped tile", "unmasked tail", "shifted label"]
)
def test_a_planted_fault_is_seen(
    fault: str, seed: int, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_spans, real_pick = linear_logprobs_torch.spans, linear_logprobs_torch.pick_labels
    real_backward, real_slice = (
        linear_logprobs_torch.backward,
        linear_logprobs_torch.vocabulary_slice,
    )
    if fault == "zeroed gradient":
        monkeypatch.setattr(
            linear_logprobs_torch,
            "backward",
            lambda *a: [None if g is None else g * 0 for g in real_backward(*a)],
        )
    elif fault == "dropped tile":
        monkeypatch.setattr(
            linear_logprobs_torch,
            "spans",
            lambda n, step: list(real_spans(n, step))[: -1 if n == 101 else None],
        )
    elif fault == "unmasked tail":  # the last tile padded with zero rows, as an unmasked load would

        def padded(weight, bias, v, dtype):  # type: ignore[no-untyped-def]
            w, b = real_slice(weight, bias, v, dtype)
            if v.stop == weight.shape[0]:
                w = torch.cat([w, w.new_zeros(3, w.shape[1])])
                b = None if b is None else torch.cat([b, b.new_zeros(3)])
            return w, b

        monkeypatch.setattr(linear_logprobs_torch, "vocabulary_slice", padded)
    else:
        monkeypatch.setattr(
            linear_logprobs_torch,
            "pick_labels",
            lambda z, labels, v0, out: real_pick(z, labels - 1, v0, out),
        )
    with pytest.raises(AssertionError):
        test_matches_float64((37, 16, 101), torch.float32, LogitTransform(), seed, None)


# ---- bad input


def bad_calls() -> dict[str, tuple[type[Exception], str, dict[str, object]]]:
    h, w, y = torch.randn(4, 8), torch.randn(11, 8), torch.randint(11, (4,))
    return {
        "hidden dtype": (TypeError, "hidden: got dtype torch.int64", {"hidden": h.long()}),
        "hidden missing": (TypeError, "hidden: got NoneType, expected a tensor", {"hidden": None}),
        "labels a list": (TypeError, "labels: got list, expected a tensor", {"labels": [0, 1, 2, 3]}),
        "bias a number": (TypeError, "bias: got float, expected a tensor or None", {"bias": 0.0}),
        "weight dtype": (TypeError, "weight: got dtype torch.float64", {"weight": w.double()}),
        "weight not floating": (TypeError, "weight: got dtype torch.int64", {"weight": w.long()}),
        "weight width": (ValueError, r"weight: got shape \(11, 7\), expected \(V, 8\)", {"weight": w[:, :7]}),
        "no vocabulary": (ValueError, "with V ≥ 1", {"weight": w[:0]}),
        "labels shape": (ValueError, r"labels: got shape \(3,\), expected \(4,\)", {"labels": y[:3]}),
        "labels dtype": (TypeError, "labels: got dtype torch.int32", {"labels": y.int()}),
        "label too large": (ValueError, r"labels: 1 of 4 outside \[0, 11\).*is 11 at flat position 2",
                            {"labels": torch.tensor([0, 1, 11, 2])}),
        "label negative": (ValueError, "is -1 at flat position 0", {"labels": torch.tensor([-1, 1, 3, 2])}),
        "bias shape": (ValueError, r"bias: got shape \(8,\)", {"bias": torch.zeros(8)}),
        "bias dtype": (TypeError, "bias: got dtype", {"bias": torch.zeros(11).half()}),
        "device": (ValueError, "weight: got device meta", {"weight": w.to("meta")}),
        "softcap": (ValueError, "softcap: got 0", {"softcap": 0.0}),
        "temperature": (ValueError, "temperature: got -1", {"temperature": -1.0}),
        "scale": (ValueError, "logit_scale: got inf", {"logit_scale": math.inf}),
        "backward": (ValueError, "backward: got 'fast', expected one of auto, exact, certified",
                     {"backward": "fast"}),
        "tol": (ValueError, r"tol: got 1.0, expected a number in \[0, 1\)", {"tol": 1.0}),
        "negative tol": (ValueError, "tol: got -0.5", {"tol": -0.5}),
        "backend": (ValueError, "backend: got 'cuda'", {"backend": "cuda"}),
        "triton on cpu": (ValueError, "backend: got 'triton', but", {"backend": "triton", "hidden": h.double(),
                                                                     "weight": w.double()}),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_named(case: str) -> None:
    error, message, change = bad_calls()[case]
    arguments: dict[str, object] = {
        "hidden": torch.randn(4, 8),
        "weight": torch.randn(11, 8),
        "labels": torch.randint(11, (4,)),
    }
    with pytest.raises(error, match=message):
        fastpo.linear_logprobs(**(arguments | change))


def test_nan_in_hidden_stays_nan(seed: int) -> None:
    hidden, weight, labels, _ = draw((6, 8, 21), torch.float32, bias=False, ignored=0.0)
    hidden[2, 3] = torch.nan
    logps = fastpo.linear_logprobs(hidden, weight, labels)
    assert logps.isnan().tolist() == [False, False, True, False, False, False]
