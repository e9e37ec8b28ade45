"""The epilogue as an operation, and PreferenceLoss through it: all results as on the plain path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels.preference_epilogue_torch import PAIR_LOSSES, pair_loss
from fastpo.losses import preference_loss
from fastpo.ops.preference_epilogue import _preference_epilogue, preference_epilogue

PAIRS, LENGTH = 5, 7


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probs, labels with a pair that has an unlabelled answer, reference sums."""
    labels = torch.randint(50, (2 * PAIRS, LENGTH))
    labels[torch.rand(labels.shape) < 0.3] = -100
    labels[3] = -100
    token_logps = torch.where(labels == -100, 0.0, -3 * torch.rand(labels.shape))
    return token_logps.requires_grad_(), labels, -10 * torch.rand(2 * PAIRS)


def losses_to_compare() -> list[tuple[str, dict, bool]]:
    """Every loss of the epilogue, smoothed where it can be, with a fixed and with a dynamic margin."""
    cases = []
    for name in PAIR_LOSSES:
        options: dict = {"beta": 0.7, "sft_weight": 0.0}
        if name not in ("hinge", "ipo"):
            options["label_smoothing"] = 0.1
        cases += [(name, options, False), (name, options, True)]
    return cases


def build(name: str, options: dict, dynamic: bool) -> fastpo.PreferenceLoss:
    margin = fastpo.DynamicMargin(0.8, queue_size=32, sample_size=12) if dynamic else None
    gamma0 = {"simpo_gamma": 1.3} if dynamic or name == "simpo" else {}
    return fastpo.PreferenceLoss(name, margin=margin, **options, **gamma0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "options", "dynamic"), losses_to_compare())
def test_preference_loss_is_the_same_either_way(
    name: str,
    options: dict,
    dynamic: bool,
    packed: bool,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, launched = build(name, options, dynamic), build(name, options, dynamic)
    calls = []

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return preference_epilogue(*args, **{**kwargs, "backend": "torch"})

    for step in range(3):  # later steps draw from the queue that the earlier ones filled
        token_logps, labels, ref_logps = draw()
        bounds = None
        if packed:
            token_logps = token_logps.detach().flatten().requires_grad_()
            labels, bounds = labels.flatten(), torch.arange(0, 2 * PAIRS * LENGTH + 1, LENGTH)
        twin = token_logps.detach().clone().requires_grad_()
        expected = plain.from_token_logps(
            token_logps, labels, cu_seqlens=bounds, ref_logps=ref_logps
        )
        with monkeypatch.context() as patch:
            patch.setattr(preference_loss, "epilogue_backend", lambda *a: "triton")
            patch.setattr(preference_loss, "preference_epilogue", counted)
            got = launched.from_token_logps(twin, labels, cu_seqlens=bounds, ref_logps=ref_logps)
        assert len(calls) == step + 1
        for field in ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards",
                      "gamma", "num_tokens"):  # fmt: skip
            a, b = getattr(expected, field), getattr(got, field)
            assert (a is None) == (b is None), field
            if a is not None:
                torch.testing.assert_close(
                    b, a, rtol=1e-5, atol=1e-6, msg=lambda m, f=field: f"{f}: {m}"
                )
        weights = torch.rand(PAIRS)
        for out in (expected, got):
            ((weights * out.losses).sum() + out.chosen_logps.sum() + out.loss).backward()
        assert bool(twin.grad.any())
        torch.testing.assert_close(twin.grad, token_logps.grad, rtol=1e-5, atol=1e-6)
    if dynamic:
        torch.testing.assert_close(launched.margin.queue, plain.margin.queue, rtol=1e-5, atol=1e-6)
        assert launched.margin.queued == plain.margin.queued == 3 * PAIRS


@pytest.mark.parametrize(
    "change",
    [{"sft_weight": 0.5}, {"margin": fastpo.DynamicMargin(3.0, solver="mirror")}, {"loss_type": "exo_pair",
                                                                                   "label_smoothing": 0.1}],
)  # fmt: skip
def test_what_the_kernel_does_not_know_takes_the_plain_path(
    change: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference_loss, "epilogue_backend", lambda *a: "triton")
    monkeypatch.setattr(preference_loss, "preference_epilogue", None)  # calling it would fail
    token_logps, labels, ref_logps = draw()
    loss = fastpo.PreferenceLoss(**{"loss_type": "dpo", **change})
    assert bool(loss.from_token_logps(token_logps, labels, ref_logps=ref_logps).loss.isfinite())


def test_opcheck(seed: int) -> None:
    token_logps, labels, ref_logps = draw()
    for tau in (None, 2.0):
        torch.library.opcheck(
            _preference_epilogue,
            (token_logps, labels, None, ref_logps, None, "logistic", True, False, True, 0.9, 0.1, 0.0,
             0.5, 1.0, tau, -100, "torch"),
        )  # fmt: skip


def test_double_backward_is_refused(seed: int) -> None:
    token_logps, labels, ref_logps = draw()
    result = preference_epilogue(
        token_logps, labels, pair_loss("dpo"), beta=0.5, ref_logps=ref_logps
    )
    (gradient,) = torch.autograd.grad(result.losses.sum() ** 2, token_logps, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        gradient.sum().backward()


INTERPRETED = """
import torch, fastpo
from fastpo.losses import preference_loss
torch.manual_seed({seed})
calls = []
real = preference_loss.preference_epilogue
preference_loss.preference_epilogue = lambda *a, **k: calls.append(1) or real(*a, **k)
hidden, weight = torch.randn(6, 5, 16), torch.randn(37, 16)
labels = torch.randint(37, (6, 5)); labels[:, 0] = -100
outputs = []
for backend in ("auto", "torch"):
    h = hidden.clone().requires_grad_()
    margin = fastpo.DynamicMargin(0.5)
    loss = fastpo.PreferenceLoss("simpo", beta=2.0, simpo_gamma=0.6, backend=backend, margin=margin)
    out = loss(h, weight, labels)
    out.loss.backward()
    outputs.append((out.loss.detach(), out.gamma, h.grad))
assert len(calls) == 1, calls  # the interpreter took the one-launch kernel, backend="torch" did not
for a, b in zip(*outputs):
    assert bool(b.any())
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
"""


def test_the_kernels_carry_a_whole_loss_in_the_interpreter(seed: int) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED.format(seed=seed)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[2],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
