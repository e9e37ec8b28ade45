"""The certified backward of the noisy log-probs: its promise, its gradients, planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from noisy_problems import CAPPED, NAMES, PLAIN, SEED, draw, noisy_logits, relative, run
from torch import Tensor

import fastpo
from fastpo.kernels import certified_noisy_torch, certified_torch, chunking, nucleus
from fastpo.kernels.logit_transform import LogitTransform

HEIGHT = 8


@pytest.fixture
def low_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of eight rows, windows of two, groups of two, chunks that fit neither, slices of 32 columns."""
    monkeypatch.setitem(nucleus.BLOCK_ROWS, "cpu", HEIGHT)
    monkeypatch.setattr(
        certified_torch,
        "plan_certified_forward",
        lambda n, *_: chunking.CertifiedForwardPlan(5, 3, max(1, min(n, 2 * HEIGHT)), 11),
    )
    monkeypatch.setattr(
        certified_noisy_torch,
        "plan_certified_backward",
        lambda *_: chunking.CertifiedPlan(2 * HEIGHT, 7, 32),
    )
    monkeypatch.setattr(
        certified_noisy_torch, "plan_noisy_tile", lambda *_: chunking.Tile(rows=5, cols=11)
    )


def mixed_rows(inputs: dict[str, Tensor]) -> None:
    """Rows from flat to peaked, in no order."""
    n = len(inputs["hidden"])
    scale = torch.linspace(0.1, 5.0, n)[torch.randperm(n)]
    with torch.no_grad():
        inputs["hidden"].mul_(scale[:, None].to(inputs["hidden"].dtype))


def touched(
    inputs: dict[str, Tensor], labels: Tensor, transform: LogitTransform, tokens: Tensor, tol: float
) -> Tensor:
    """(N, V): the columns that the backward makes for each row, read off what the forward hands it."""
    given = [inputs.get(name) for name in ("noise_weight", "noise_bias", "noise_proj")]
    outputs = torch.ops.fastpo.noisy_linear_logprobs(
        inputs["hidden"], inputs["weight"], labels, inputs["bias"], *given, tokens,
        SEED - 2**64, *transform, -100, False, "auto", tol,
    )  # fmt: skip
    order, count, columns, counts = outputs[2], int(outputs[3]), outputs[5], outputs[6]
    vocab = inputs["weight"].shape[0]
    seen = torch.zeros(labels.numel(), vocab, dtype=torch.bool)
    of_blocks = nucleus.column_mask(columns, vocab) | (counts == vocab)[:, None]
    seen[order[:count]] = of_blocks.repeat_interleave(HEIGHT, dim=0)[:count]
    return seen


def cut_gradients(
    inputs: dict[str, Tensor],
    labels: Tensor,
    coefficient: Tensor,
    transform: LogitTransform,
    tokens: Tensor,
    seen: Tensor,
) -> list[Tensor]:
    """All gradients in float64, of dz̃ set to zero where it was not ``seen``."""
    wide = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    z = noisy_logits(wide, transform, tokens)
    kept = (labels != -100)[:, None]
    hot = torch.zeros_like(z).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    dz = coefficient.double()[:, None] * (hot - torch.softmax(z, 1)).detach()
    return list(torch.autograd.grad((z * dz * (seen & kept)).sum(), list(wide.values())))


@pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "low rank"])
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("dtype", "generator", "error"),
    [
        (torch.float64, torch.float64, 1e-11),
        (torch.float32, torch.float32, 2e-5),
        (torch.bfloat16, torch.float32, 4e-3),
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.float16, torch.float16, 4e-3),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_cut(
    rank: int | None,
    transform: LogitTransform,
    dtype: torch.dtype,
    generator: torch.dtype,
    error: float,
    seed: int,
    low_blocks: None,
) -> None:
    inputs, labels, coefficient = draw(45, 9, 203, rank=rank, dtype=dtype)
    mixed_rows(inputs)
    for name in NAMES[3:]:
        if name in inputs:
            inputs[name] = inputs[name].detach().to(generator).requires_grad_()
    tokens = torch.randint(2**40, labels.shape)
    options = {"token_index": tokens, "return_clean": True, **transform._asdict()}
    logps, clean = run(inputs, labels, backward="certified", tol=2**-5, **options)
    exact, exact_clean = run(inputs, labels, backward="exact", **options)
    nats = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(logps, exact, rtol=0, atol=nats)
    torch.testing.assert_close(clean, exact_clean, rtol=0, atol=nats)
    assert (logps <= 0).all()
    seen = touched(inputs, labels, transform, tokens, 2**-5)
    assert 0.05 < seen[labels != -100].double().mean() < 0.9
    expected = cut_gradients(inputs, labels, coefficient, transform, tokens, seen)
    got = torch.autograd.grad(logps @ coefficient.to(logps), list(inputs.values()))
    for name, a, b in zip(inputs, got, expected, strict=True):
        assert a.dtype == inputs[name].dtype
        assert relative(a, b) <= error, name


@pytest.mark.parametrize("tol", [2**-4, 2**-8, 2**-12])
@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_the_promise_holds(tol: float, sigma: float, seed: int, low_blocks: None) -> None:
    """Of every row: the mass left out, and the L1 error of dz̃ and of dσ, that is of the biases' gradients."""
    inputs, labels, _ = draw(21, 7, 151, dtype=torch.float32, sigma=sigma)
    mixed_rows(inputs)
    tokens = torch.arange(len(labels))
    kept = labels != -100
    z = noisy_logits({name: t.double() for name, t in inputs.items()}, PLAIN, tokens)
    p = torch.softmax(z, 1).detach()
    left_out = (p * ~touched(inputs, labels, PLAIN, tokens, tol)).sum(1)[kept]
    assert float(left_out.max()) <= tol * (1 + 1e-3)
    if tol == 2**-4:
        assert float(left_out.max()) > 0.05 * tol  # or nothing was left out
    logps = run(inputs, labels, backward="certified", tol=tol)
    epsilon = fastpo.philox_normal(SEED, tokens[:, None], torch.arange(151)).double()
    hot = torch.zeros_like(p).scatter_(1, labels.clamp(min=0)[:, None], 1.0)
    for row in kept.nonzero().flatten().tolist():
        dz, dsigma = torch.autograd.grad(
            logps[row], [inputs["bias"], inputs["noise_bias"]], retain_graph=True
        )
        truth = (hot - p)[row]
        rounding = 1e-5 * truth.abs().sum()
        assert (dz.double() - truth).abs().sum() <= tol * (1 + 1e-3) + rounding
        largest = epsilon[row].abs().max()
        error = (dsigma.double() - truth * epsilon[row]).abs().sum()
        assert error <= largest * (tol * (1 + 1e-3) + rounding)


@pytest.mark.parametrize(
    ("wanted", "rank"), [*((name, None) for name in NAMES[:-1]), *((name, 3) for name in NAMES)]
)
def test_one_gradient_alone_is_the_same(
    wanted: str, rank: int | None, seed: int, low_blocks: None
) -> None:
    inputs, labels, coefficient = draw(45, 9, 101, rank=rank)
    mixed_rows(inputs)
    options = {"backward": "certified", "tol": 2**-5}
    logps = run(inputs, labels, **options)
    full = torch.autograd.grad(logps @ coefficient.double(), list(inputs.values()))
    alone = {name: tensor.detach() for name, tensor in inputs.items()}
    alone[wanted].requires_grad_()
    logps = run(alone, labels, **options)
    (got,) = torch.autograd.grad(logps @ coefficient.double(), alone[wanted])
    torch.testing.assert_close(got, full[list(inputs).index(wanted)], rtol=1e-11, atol=1e-13)


def test_flat_rows_are_dense_and_exact(seed: int, low_blocks: None) -> None:
    inputs, labels, coefficient = draw(30, 9, 101, sigma=0.01)
    with torch.no_grad():
        inputs["hidden"].mul_(0.01)
        inputs["bias"].zero_()
    assert touched(inputs, labels, PLAIN, torch.arange(30), 2**-10)[labels != -100].all()
    found = [
        torch.autograd.grad(run(inputs, labels, **options) @ coefficient.double(), list(inputs.values()))
        for options in ({"backward": "certified"}, {"backward": "exact"})
    ]  # fmt: skip
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_default_follows_the_dtype_and_plans_of_real_calls(seed: int) -> None:
    inputs, labels, coefficient = draw(300, 24, 4099, dtype=torch.bfloat16, rank=5)
    mixed_rows(inputs)
    leaves = list(inputs.values())
    default, certified, exact = (
        torch.autograd.grad(run(inputs, labels, **options) @ coefficient, leaves)
        for options in ({}, {"backward": "certified"}, {"backward": "exact"})
    )
    assert all(torch.equal(a, b) for a, b in zip(default, certified, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(default, exact, strict=True))
    for a, b in zip(default, exact, strict=True):
        assert relative(a, b) <= 2e-2


FAULTS = {
    "tokens in the old order": lambda m: m.setattr(
        certified_noisy_torch, "normal_columns",
        lambda seed, token, columns, out: REAL_COLUMNS(seed, token.flip(0), columns, out),
    ),
    "columns without the slice's start": lambda m: m.setattr(
        certified_noisy_torch, "normal_columns",
        lambda seed, token, columns, out: REAL_COLUMNS(seed, token, columns % 32, out),
    ),
    "noise forgotten in the forward": lambda m: m.setattr(
        certified_noisy_torch, "normal_tile",
        lambda seed, token, first, last, out: out.zero_(),
    ),
    "blocks not kept apart": lambda m: m.setattr(
        certified_noisy_torch, "keep_needed", lambda *a, **k: None
    ),
}  # fmt: skip
REAL_COLUMNS = certified_noisy_torch.normal_columns


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(
    fault: str, seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        test_gradients_are_those_of_the_cut(
            None, PLAIN, torch.float64, torch.float64, 1e-11, seed, None
        )


def test_the_check_of_everything_names_the_row(
    seed: int, low_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPO_CHECK", "1")
    inputs, labels, _ = draw(45, 9, 203, dtype=torch.float32)
    mixed_rows(inputs)
    run(inputs, labels, backward="certified", tol=2**-6).sum().backward()
    real = certified_torch.gather_blocks

    def columns_left_out(*arguments: Any) -> Any:
        order, columns, counts = real(*arguments)
        return order, columns & 0x55555555, counts.clamp(max=100)

    monkeypatch.setattr(certified_torch, "gather_blocks", columns_left_out)
    with pytest.raises(RuntimeError, match=r"certified backward: row \d+ loses .* of its probab"):
        run(inputs, labels, backward="certified", tol=2**-6).sum().backward()
