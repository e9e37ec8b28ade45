"""The preference epilogue: PyTorch against the losses' own path, the Triton kernel against PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastpo
from fastpo.kernels import margins_torch, preference_epilogue_torch
from fastpo.kernels.preference_epilogue_torch import (
    PAIR_LOSSES,
    EpilogueResult,
    expand_to_tokens,
    pair_loss,
    preference_epilogue,
)

BETA, GAMMA0 = 0.7, 0.9
HAVE_MARGINS = [name for name, loss in fastpo.losses.LOSSES.items() if loss.margin]
SMOOTHED = {"dpo", "sigmoid", "robust", "rdpo", "spin", "cpo", "simpo", "sigmoid_norm"}


class Batch(NamedTuple):
    tokens: torch.Tensor  # (2B, T) float32, nats; NaN where there is no label
    labels: torch.Tensor
    ref_logps: torch.Tensor  # (2B,)
    extra_gaps: torch.Tensor  # (E,)


def make_batch(pairs: int, length: int, extra: int = 7, unlabelled: int | None = None) -> Batch:
    tokens = -2 * torch.rand(2 * pairs, length)
    labels = torch.randint(0, 9, tokens.shape)
    labels[torch.rand(tokens.shape) < 0.3] = -100
    labels[:, 0] = 1
    if unlabelled is not None:
        labels[unlabelled] = -100
    noise = 1 + 0.3 * torch.randn(2 * pairs)
    ref_logps = torch.where(labels != -100, tokens, 0.0).sum(1) * noise
    tokens[labels == -100] = torch.nan
    return Batch(tokens, labels, ref_logps, torch.randn(extra, dtype=torch.float64))


def pack(batch: Batch, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segments of different lengths (trailing unlabelled positions cut off) and unused positions at the end."""
    last = torch.arange(1, batch.labels.shape[1] + 1) * (batch.labels != -100)
    sizes = last.amax(1).tolist()
    tokens = [row[:n] for row, n in zip(batch.tokens, sizes, strict=True)] + [torch.zeros(3)]
    labels = [row[:n] for row, n in zip(batch.labels, sizes, strict=True)]
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(dtype)
    return torch.cat(tokens), torch.cat([*labels, torch.zeros(3, dtype=torch.int64)]), bounds


def reference(batch: Batch, name: str, epsilon: float, tau: float | None, extra: bool) -> dict:
    """``PreferenceLoss`` in float64, its gradients by autograd."""

    def margin(gaps, gamma0):
        known = torch.cat([gaps, batch.extra_gaps]) if extra else gaps
        return fastpo.solve_margins(known, gamma0, tau)[: len(gaps)]

    loss_fn = fastpo.PreferenceLoss(
        name,
        beta=BETA,
        label_smoothing=epsilon,
        sft_weight=0.0,
        margin=None if tau is None else margin,
        **({"simpo_gamma": GAMMA0} if tau is not None or name == "simpo" else {}),
    )
    tokens = batch.tokens.double().requires_grad_()
    out = loss_fn.from_token_logps(tokens, batch.labels, ref_logps=batch.ref_logps)
    (gradient,) = torch.autograd.grad(out.losses.sum(), tokens)
    return {
        "losses": out.losses,
        "logps": torch.cat([out.chosen_logps, out.rejected_logps]),
        "gamma": out.gamma,
        "lengths": (batch.labels != -100).sum(1),
        "gradient": gradient,
    }


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_torch_equals_the_losses(name, seed):
    assert set(HAVE_MARGINS) == set(PAIR_LOSSES)
    batch = make_batch(pairs=6, length=23, unlabelled=8)
    for values in (batch.tokens, batch.labels, batch.ref_logps):
        values[6] = values[0]  # a tie, which no loss takes for settled
    for epsilon in (0.0, 0.1) if name in SMOOTHED else (0.0,):
        loss = pair_loss(name, label_smoothing=epsilon)
        for tau, extra in ((None, False), (0.4, False), (0.4, True)):
            expected = reference(batch, name, epsilon, tau, extra)
            found = preference_epilogue(
                batch.tokens,
                batch.labels,
                loss,
                beta=BETA,
                gamma0=GAMMA0,
                tau=tau,
                ref_logps=batch.ref_logps,
                extra_gaps=batch.extra_gaps if extra else None,
            )
            gradient = expand_to_tokens(found.coefficients, batch.labels)
            assert (found.gamma is None) == (expected["gamma"] is None)
            assert torch.equal(found.lengths, expected.pop("lengths"))
            assert found.losses[2] == 0  # rejected 2 has no label
            assert gradient.abs().sum() > 0
            for key, value in expected.items():
                ours = gradient if key == "gradient" else getattr(found, key)
                if value is not None:
                    assert ours.dtype == torch.float32
                    torch.testing.assert_close(
                        ours.double(), value.double(), rtol=1e-6, atol=1e-7, msg=f"{name} {key}"
                    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_padded(dtype, seed):
    batch = make_batch(pairs=5, length=31, unlabelled=3)
    tokens, labels, bounds = pack(batch, dtype)
    for name in ("simpo", "rdpo"):
        arguments = {"beta": BETA, "gamma0": GAMMA0, "tau": 0.5, "ref_logps": batch.ref_logps}
        loss = pair_loss(name)
        padded = preference_epilogue(batch.tokens, batch.labels, loss, **arguments)
        packed = preference_epilogue(tokens, labels, loss, cu_seqlens=bounds, **arguments)
        for expected, found in zip(padded, packed, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        spread = expand_to_tokens(packed.coefficients, labels, cu_seqlens=bounds)
        wanted = expand_to_tokens(padded.coefficients, batch.labels)
        torch.testing.assert_close(spread[labels != -100][:-3], wanted[batch.labels != -100])
        assert not spread[-3:].any()


def float64_batch() -> Batch:
    """10⁴ tokens of −2 and one of −2^−13, which a float32 sum would lose: the gap is 2 − 2^−13."""
    tokens = torch.full((2, 10_000), -2.0)
    tokens[0, 5000] = -(2.0**-13)
    labels = torch.ones(tokens.shape, dtype=torch.int64)
    return Batch(tokens, labels, torch.zeros(2), torch.zeros(0))


def test_sums_are_float64():
    batch = float64_batch()
    found = preference_epilogue(batch.tokens, batch.labels, pair_loss("cpo"), beta=1.0)
    assert found.gaps.item() == 2.0 - 2.0**-13


def make_jobs() -> dict:
    """Everything the interpreter runs, small but for one of each size that takes another path."""
    jobs = []

    def add(batch, name, epsilon=0.0, layout="padded", extra=False, tau=0.4, gamma0=GAMMA0):
        tokens, labels, bounds = batch.tokens, batch.labels, None
        if layout != "padded":
            tokens, labels, bounds = pack(batch, getattr(torch, layout))
        arguments = {
            "beta": BETA,
            "gamma0": gamma0,
            "tau": tau,
            "cu_seqlens": bounds,
            "ref_logps": batch.ref_logps,
            "extra_gaps": batch.extra_gaps if extra else None,
        }
        jobs.append((tokens, labels, name, {"label_smoothing": epsilon}, arguments))

    for i, name in enumerate(PAIR_LOSSES):
        layout = ("padded", "int32", "int64")[i % 3]
        add(make_batch(4, 9, unlabelled=6), name, 0.1 * (name in SMOOTHED), layout, extra=i % 2 > 0)
        add(make_batch(3, 5), name, tau=None)
    add(make_batch(1, 1), "dpo")
    add(make_batch(2, 2500), "simpo")  # several blocks of tokens
    add(make_batch(3, 4, extra=600), "simpo", extra=True)  # the wider block of gaps
    add(make_batch(130, 2, extra=1000), "dpo", extra=True)  # and two of them
    add(make_batch(3, 5), "simpo", gamma0=0.0)
    add(float64_batch(), "cpo", tau=None)
    hard = make_batch(6, 40)
    hard.tokens.mul_(
        torch.tensor([400.0, 1.0] * 6).unsqueeze(1)
    )  # gaps of ±1e4, losses and slopes saturated
    add(hard, "dpo", 0.1)
    add(hard, "cpo", tau=1e-3)
    margins = [
        (torch.randn(n, dtype=torch.float64) * scale, gamma0, tau)
        for n, scale, gamma0, tau in (
            (1, 1.0, 1.0, 1.0),
            (17, 3.0, 4.0, 0.3),
            (256, 3.0, 0.4, 10.0),
            (257, 1e4, 4.0, 0.1),
            (1500, 5.0, 50.0, 0.01),
            (60, 1e4, 1e4, 1e-3),
            (60, 5.0, 1e-3, 1e6),
            (5, 1.0, 0.0, 1.0),
        )
    ]
    return {"epilogues": jobs, "margins": margins}


def test_triton_equals_torch(seed, tmp_path):
    job = make_jobs()
    torch.save(job, tmp_path / "job.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("preference_epilogue_worker.py")),
         str(tmp_path)],
        check=True,
        timeout=300,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(fastpo.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    results = torch.load(tmp_path / "results.pt")
    for case, found in zip(job["epilogues"], results["epilogues"], strict=True):
        tokens, labels, name, options, arguments = case
        expected = preference_epilogue(tokens, labels, pair_loss(name, **options), **arguments)
        assert all(torch.isfinite(part).all() for part in expected if part is not None)
        for field, ours, theirs in zip(EpilogueResult._fields, found, expected, strict=True):
            if theirs is None:
                assert ours is None
                continue
            where = f"{name} {tuple(tokens.shape)} {field}"
            torch.testing.assert_close(
                ours, theirs, rtol=2e-7, atol=1e-12, msg=lambda m, w=where: f"{w}: {m}"
            )
    for case, found in zip(job["margins"], results["margins"], strict=True):
        expected = margins_torch.exact_margins(*case)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * case[1])
    assert results["tickets"] == [0]


def test_eligibility():
    pytest.importorskip("triton")
    from fastpo.kernels import margins_triton, preference_epilogue_triton

    tokens = torch.zeros(4, 3)
    assert "float64" in preference_epilogue_triton.supported(tokens.double(), 2)
    assert "5000 pairs" in preference_epilogue_triton.supported(tokens, 5000)
    assert "5000 extra gaps" in preference_epilogue_triton.supported(tokens, 2, 5000)
    assert "cpu" in preference_epilogue_triton.supported(tokens, 2)
    assert "9000 gaps" in margins_triton.supported(torch.zeros(9000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(4, 2)}, r"shapes \(4, 3\) and \(4, 2\)"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, r"expected \(N,\) with cu_seqlens"),
        ({"tokens": torch.zeros(3, 3), "labels": torch.zeros(3, 3)}, "got 3 sequences, expected an even"),
        ({"ref_logps": None}, r"ref_logps: got None, expected \(4,\)"),
        ({"ref_logps": torch.zeros(2)}, r"ref_logps: got shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message):
    arguments = {
        "tokens": torch.zeros(4, 3),
        "labels": torch.ones(4, 3),
        "ref_logps": torch.zeros(4),
    }
    arguments |= change
    tokens, labels = arguments.pop("tokens"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        preference_epilogue(tokens, labels, pair_loss("dpo"), beta=1.0, **arguments)
    with pytest.raises(ValueError, match="name: got 'orpo', expected one of dpo"):
        preference_epilogue_torch.pair_loss("orpo")
