"""Noisy log-probs and their exact gradients against dense float64 with the same ε; what the noise depends on.

The certified gradients are in test_certified_noise.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from noisy_problems import CAPPED, NAMES, PLAIN, SEED, draw, noisy_logits, oracle, relative, run
from torch import Tensor

import fastpo
from fastpo.benchmarks.memory import peak_extra_bytes
from fastpo.kernels import (
    backends,
    certified_noisy_torch,
    chunking,
    noisy_linear_logprobs_torch,
)
from fastpo.kernels.linear_logprobs_torch import linear_logprobs_reference
from fastpo.kernels.logit_transform import LogitTransform


@pytest.fixture(params=["one tile", "small tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small tiles":
        monkeypatch.setattr(
            noisy_linear_logprobs_torch,
            "plan_tile",
            lambda *_: chunking.Tile(rows=5, cols=11),
        )


@pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "low rank"])
@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("dtype", "logps_error", "gradient_error"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 2e-6, 2e-5),
        (torch.bfloat16, 1e-4, 4e-3),
        (torch.float16, 1e-4, 4e-3),
    ],
    ids=str,
)
def test_matches_dense_float64(
    rank: int | None,
    transform: LogitTransform,
    dtype: torch.dtype,
    logps_error: float,
    gradient_error: float,
    seed: int,
    tiles: None,
) -> None:
    inputs, labels, coefficient = draw(rank=rank, dtype=dtype)
    tokens = torch.randint(2**40, labels.shape)
    options = {"token_index": tokens, "return_clean": True, **transform._asdict()}
    logps, clean = run(inputs, labels, backward="exact", **options)
    truth = oracle(inputs, labels, transform, tokens)
    if dtype == torch.float32:  # whose rounding grows with the logits
        peak = float(noisy_logits(inputs, transform, tokens).detach().abs().max())
        logps_error *= max(1.0, peak)
    assert (logps - truth).abs().max() <= logps_error
    assert (logps <= 0).all()
    plain = linear_logprobs_reference(
        *(inputs[name].double() for name in ("hidden", "weight")), labels, inputs["bias"].double(), transform
    )  # fmt: skip
    assert (clean - plain).abs().max() <= logps_error
    assert not clean.requires_grad
    assert (logps - clean)[labels != -100].abs().max() > 0.01
    got = torch.autograd.grad(logps @ coefficient.to(logps), list(inputs.values()))
    expected = torch.autograd.grad(truth @ coefficient.double(), list(inputs.values()))
    for name, a, b in zip(inputs, got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) <= gradient_error, name


def test_generator_in_float32_beside_a_model_in_bfloat16(seed: int) -> None:
    inputs, labels, coefficient = draw(rank=2, dtype=torch.bfloat16)
    for name in ("noise_weight", "noise_bias", "noise_proj"):
        inputs[name] = torch.randn_like(inputs[name], dtype=torch.float32).requires_grad_()
    logps = run(inputs, labels, backward="exact")
    truth = oracle(inputs, labels, PLAIN, torch.arange(len(labels)))
    got = torch.autograd.grad(logps @ coefficient, list(inputs.values()))
    expected = torch.autograd.grad(truth @ coefficient.double(), list(inputs.values()))
    for name, a, b in zip(inputs, got, expected, strict=True):
        assert a.dtype == inputs[name].dtype
        assert relative(a, b) <= (5e-6 if name.startswith("noise") else 4e-3), name


@pytest.mark.parametrize(
    ("wanted", "rank"), [*((name, None) for name in NAMES[:-1]), *((name, 3) for name in NAMES)]
)
def test_one_gradient_alone_is_the_same(wanted: str, rank: int | None, seed: int) -> None:
    inputs, labels, coefficient = draw(rank=rank)
    full = torch.autograd.grad(run(inputs, labels) @ coefficient.double(), list(inputs.values()))
    alone = {name: tensor.detach() for name, tensor in inputs.items()}
    alone[wanted].requires_grad_()
    (got,) = torch.autograd.grad(run(alone, labels) @ coefficient.double(), alone[wanted])
    torch.testing.assert_close(got, full[list(inputs).index(wanted)], rtol=1e-12, atol=1e-14)


def test_noise_follows_the_token_not_the_batch(seed: int) -> None:
    inputs, labels, _ = draw(rank=3)
    tokens = torch.randperm(1000)[: len(labels)]
    whole = run(inputs, labels, token_index=tokens)
    order = torch.randperm(len(labels))
    for part in order.split(4):
        some = {**inputs, "hidden": inputs["hidden"][part]}
        got = run(some, labels[part], token_index=tokens[part])
        torch.testing.assert_close(got, whole[part], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(inputs, labels), whole)
    other = fastpo.noisy_linear_logprobs(labels=labels, seed=SEED + 1, token_index=tokens, **inputs)
    assert not torch.allclose(other, whole)
    shaped = {**inputs, "hidden": inputs["hidden"][:12].view(3, 4, -1)}
    got = run(shaped, labels[:12].view(3, 4), token_index=tokens[:12].view(3, 4))
    torch.testing.assert_close(got.flatten(), whole[:12], rtol=1e-12, atol=1e-12)


def test_no_noise_is_the_plain_operation(seed: int) -> None:
    inputs, labels, _ = draw(sigma=0.0, dtype=torch.float32)
    noisy, clean = run(inputs, labels, return_clean=True)
    plain = fastpo.linear_logprobs(inputs["hidden"], inputs["weight"], labels, inputs["bias"])
    torch.testing.assert_close(noisy, plain, rtol=0, atol=2e-6)
    assert torch.equal(noisy, clean)


def test_all_ignored_and_empty(seed: int) -> None:
    inputs, _, _ = draw()
    for rows in (0, 5):
        some = {**inputs, "hidden": inputs["hidden"][:rows]}
        logps = run(some, torch.full((rows,), -100))
        assert torch.equal(logps, torch.zeros(rows, dtype=torch.float64))
        gradients = torch.autograd.grad(logps.sum(), [inputs["noise_weight"], inputs["weight"]])
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("tol", [0.0, 2**-6])
def test_registered_operator(tol: float, seed: int) -> None:
    inputs, labels, _ = draw(rank=2, dtype=torch.float32)
    noise = [inputs[name] for name in ("noise_weight", "noise_bias", "noise_proj")]
    token_index = torch.arange(len(labels))
    torch.library.opcheck(
        torch.ops.fastpo.noisy_linear_logprobs.default,
        (
            inputs["hidden"],
            inputs["weight"],
            labels,
            None,
            *noise,
            token_index,
            7,
            1.0,
            None,
            1.0,
            -100,
            True,
            "auto",
            tol,
        ),
    )
    (first,) = torch.autograd.grad(run(inputs, labels).sum(), inputs["hidden"], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"fastpo\.noisy_linear_logprobs can be differentiated once"
    ):
        first.sum().backward()


@pytest.mark.parametrize(
    ("backward", "n"),
    [("exact", 1500), ("exact", 4000), ("certified", 1500), ("certified", 4000)],
)
def test_memory_is_two_tiles_more_than_without_noise(backward: str, n: int, seed: int) -> None:
    width, vocab = 48, 6000
    inputs, labels, _ = draw(n, width, vocab, dtype=torch.float32)
    frozen = {name: t.detach() for name, t in inputs.items()}
    trained = [frozen[name].requires_grad_() for name in ("noise_weight", "noise_bias")]

    def noisy() -> list[Tensor]:
        return list(torch.autograd.grad(run(frozen, labels, backward=backward).sum(), trained))

    weight = frozen["weight"].clone().requires_grad_()

    def plain() -> list[Tensor]:
        logps = fastpo.linear_logprobs(
            frozen["hidden"], weight, labels, frozen["bias"], backward=backward
        )
        return list(torch.autograd.grad(logps.sum(), weight))

    tile = chunking.CPU_TILE_BYTES
    assert n * vocab * 4 > 4 * tile  # or the bound says nothing
    assert peak_extra_bytes(noisy) <= peak_extra_bytes(plain) + 2 * tile


@pytest.mark.parametrize("certified", [False, True])
def test_triton_serves_where_it_can_and_pytorch_elsewhere(
    certified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CUDA device: the kernels take a call unless they do not support it."""
    from fastpo.kernels import certified_noisy_triton, noisy_linear_logprobs_triton

    kernels = certified_noisy_triton if certified else noisy_linear_logprobs_triton
    monkeypatch.setattr(backends, "choose_backend", lambda *_: "triton")
    inputs, _, _ = draw(dtype=torch.float32)
    arguments = (inputs["hidden"], inputs["weight"])
    choose = backends.noisy_linear_logprobs_module
    monkeypatch.setattr(kernels, "supported", lambda *_: None)
    assert choose(*arguments, "auto", certified) is kernels
    monkeypatch.setattr(kernels, "supported", lambda *_: "too old a chip")
    in_pytorch = certified_noisy_torch if certified else noisy_linear_logprobs_torch
    assert choose(*arguments, "auto", certified) is in_pytorch
    assert choose(*arguments, "triton", certified) is kernels


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise_weight": torch.zeros(37, 8)}, ValueError, r"got shape \(37, 8\), expected \(37, 9\)"),
        ({"noise_weight": torch.zeros(36, 9)}, ValueError, r"noise_weight: got shape \(36, 9\)"),
        ({"noise_proj": torch.zeros(3, 9)}, ValueError, r"expected \(37, 3\) for weight \(37, 9\) and rank 3"),
        ({"noise_proj": torch.zeros(3, 8)}, ValueError, r"noise_proj: got shape \(3, 8\), expected \(r, 9\)"),
        ({"noise_bias": torch.zeros(36)}, ValueError, r"noise_bias: got shape \(36,\), expected \(37,\)"),
        ({"noise_bias": torch.zeros(37).half()}, TypeError, r"noise_bias: got dtype torch.float16"),
        ({"token_index": torch.zeros(13)}, ValueError, r"token_index: got torch.float32 of shape \(13,\)"),
        ({"token_index": torch.arange(12)}, ValueError, r"token_index: got torch.int64 of shape \(12,\)"),
        ({"token_index": [1] * 13}, TypeError, r"token_index: got list, expected a tensor or None"),
        ({"token_index": torch.arange(13, device="meta")}, ValueError, r"token_index: got device meta"),
        ({"noise_bias": [0.0] * 37}, TypeError, r"noise_bias: got list, expected a tensor or None"),
        ({"noise_proj": [[0.0]]}, TypeError, r"noise_proj: got list, expected a tensor or None"),
        ({"seed": -1}, ValueError, r"seed: got -1"),
        ({"noise_weight": None}, TypeError, r"noise_weight: got NoneType, expected a tensor"),
        ({"labels": torch.full((13,), 37)}, ValueError, r"labels: 13 of 13 outside \[0, 37\)"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs, labels, _ = draw(dtype=torch.float32)
    arguments = {"labels": labels, "seed": SEED, **inputs, **change}
    with pytest.raises(error, match=message):
        fastpo.noisy_linear_logprobs(**arguments)
