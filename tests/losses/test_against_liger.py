"""PreferenceLoss against Liger on the CPU: the loss, and the gradients of hidden states, head and bias.

Definitions agree where they are compared. They differ, and are not compared, in:
    sigmoid with label smoothing — Liger ignores ε there, as TRL does; ours smooths (cDPO);
    ipo, sigmoid_norm, aot, aot_unpaired, sft — not in Liger 0.8.5;
    discopop for βΔ ≪ 0 — NaN in Liger;
    an answer without labels — Liger's averaged losses (SimPO, ORPO) divide 0 by 0.
"""

from __future__ import annotations

import pytest
import torch

from fastpo.losses import PreferenceLoss

liger = pytest.importorskip("liger_kernel.chunked_loss")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
DPO_LOSSES = {
    "sigmoid": 0.0,
    "hinge": 0.0,
    "exo_pair": 1e-2,
    "nca_pair": 0.0,
    "robust": 0.1,
    "bco_pair": 0.0,
    "sppo_hard": 0.0,
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "discopop": 0.0,
}
PAIRS, TOKENS, HIDDEN, VOCAB = 3, 6, 8, 13


@pytest.fixture
def batch(seed):
    """hidden, weight, bias (all requiring gradients), their reference twins, and labels with masked tokens."""
    policy = [torch.randn(s) for s in ((2 * PAIRS, TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))]
    reference = [x + 0.1 * torch.randn_like(x) for x in policy]
    labels = torch.randint(VOCAB, (2 * PAIRS, TOKENS))
    ends = torch.randint(1, TOKENS + 1, (2 * PAIRS, 1))
    labels[torch.arange(TOKENS) >= ends] = -100
    return [x.requires_grad_() for x in policy], reference, labels


def compare(batch, ours: PreferenceLoss, theirs: torch.nn.Module, with_reference: bool) -> None:
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), labels = batch
    reference = (ref_hidden, ref_weight, ref_bias) if with_reference else ()
    expected, _ = theirs(weight, hidden, labels, bias, *reference)
    names = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), reference, strict=False))
    got = ours(hidden, weight, labels, bias, **names).loss
    torch.testing.assert_close(got, expected, **TOLERANCE)
    inputs = (hidden, weight, bias)
    expected_grads = torch.autograd.grad(expected, inputs)
    for grad, expected_grad in zip(torch.autograd.grad(got, inputs), expected_grads, strict=True):
        error = (grad - expected_grad).norm() / expected_grad.norm().clamp(min=1e-3)
        # discopop's gradient changes by 1/τ = 20 per nat, and so does the rounding of Liger's float32 sums.
        bound = 1e-5 / 0.05 if ours.spec.name == "discopop" else 1e-5
        assert error < bound, f"relative error of a gradient {error:.1e}"


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_dpo(loss_type, alpha, batch):
    smoothing = DPO_LOSSES[loss_type]
    theirs = liger.LigerFusedLinearDPOLoss(
        beta=0.2,
        alpha=alpha,
        compute_nll_loss=alpha > 0,
        loss_type=loss_type,
        label_smoothing=smoothing,
        compiled=False,
    )
    ours = PreferenceLoss(loss_type, beta=0.2, label_smoothing=smoothing, sft_weight=alpha)
    compare(batch, ours, theirs, with_reference=True)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_simpo(alpha, batch):
    theirs = liger.LigerFusedLinearSimPOLoss(
        beta=1.5,
        gamma=0.6,
        label_smoothing=0.1,
        alpha=alpha,
        compute_nll_loss=alpha > 0,
        compiled=False,
    )
    ours = PreferenceLoss("simpo", beta=1.5, simpo_gamma=0.6, label_smoothing=0.1, sft_weight=alpha)
    compare(batch, ours, theirs, with_reference=False)


def test_cpo(batch):
    theirs = liger.LigerFusedLinearCPOLoss(beta=0.2, label_smoothing=0.1, compiled=False)
    compare(
        batch, PreferenceLoss("cpo", beta=0.2, label_smoothing=0.1), theirs, with_reference=False
    )


def test_orpo(batch):
    theirs = liger.LigerFusedLinearORPOLoss(beta=0.2, compiled=False)
    compare(batch, PreferenceLoss("orpo", beta=0.2), theirs, with_reference=False)
