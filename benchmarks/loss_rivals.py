"""Whole preference losses from hidden states: fastpo's ``PreferenceLoss``, plain logits, Liger's losses.

Compared is a step: the loss of all pairs and its gradients, log-probs of the reference model included where the
loss needs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.losses import PreferenceOutput

from .problem import LOSSES, Outcome, Problem
from .rivals import Attempt, Rival, check_logits_fit, eager_logprobs, require

LIGER_NAMES = {"simpo": "SimPO", "dpo": "DPO", "cpo": "CPO", "orpo": "ORPO"}
AVERAGED = ("simpo", "orpo")  # whose log-probs Liger divides by the answer's length


def loss_rivals() -> list[Rival]:
    """All that give a preference loss, fastpo first."""
    return [
        Rival(
            "fastpo-certified",
            "PreferenceLoss(backward='certified'), tol=2**-10 (default)",
            lambda problem: fastpo_loss(problem, "certified"),
        ),
        Rival(
            "fastpo-exact",
            "PreferenceLoss(backward='exact')",
            lambda problem: fastpo_loss(problem, "exact"),
        ),
        Rival("eager", "PreferenceLoss on log-probs from the full float32 logits", eager_loss),
        Rival(
            "liger-loss",
            "LigerFusedLinear…Loss(compiled=False), chunks of one pair (default)",
            lambda problem: liger_loss(problem, compiled=False),
        ),
        Rival(
            "liger-loss-compiled",
            "LigerFusedLinear…Loss(compiled=True, default), chunks of one pair (default)",
            lambda problem: liger_loss(problem, compiled=True),
        ),
    ]


def fastpo_loss(problem: Problem, backward: str) -> Attempt:
    """The drop-in module, from hidden states."""
    module = problem.preference_loss(backward)

    def attempt(problem: Problem, backward: bool) -> Outcome:
        references = {}
        if problem.ref_hidden is not None:
            references = {
                "ref_hidden": problem.answers(problem.ref_hidden),
                "ref_weight": problem.weight.detach(),
            }
        output = module(
            problem.answers(problem.hidden),
            problem.weight,
            problem.answers(problem.labels),
            **references,
        )
        return _outcome(output, problem, backward)

    return attempt


def eager_loss(problem: Problem) -> Attempt:
    """The same loss on token log-probs through the full logits."""
    check_logits_fit(problem, rows=len(problem.labels))
    module = problem.preference_loss()

    def attempt(problem: Problem, backward: bool) -> Outcome:
        labels = problem.answers(problem.labels)
        ref_logps = None
        if problem.ref_hidden is not None:
            with torch.no_grad():
                tokens = eager_logprobs(problem.ref_hidden, problem.weight, problem.labels)
                ref_logps = problem.answers(tokens).sum(1)
        tokens = eager_logprobs(problem.hidden, problem.weight, problem.labels)
        output = module.from_token_logps(problem.answers(tokens), labels, ref_logps=ref_logps)
        return _outcome(output, problem, backward)

    return attempt


def _outcome(output: PreferenceOutput, problem: Problem, backward: bool) -> Outcome:
    results = torch.autograd.grad(output.loss, problem.leaves) if backward else ()
    return Outcome(None, (output.chosen_logps - output.rejected_logps).detach(), results)


def liger_loss(problem: Problem, compiled: bool) -> Attempt:
    """Liger's chunked loss of the same name and settings."""
    if problem.loss is None:
        raise ValueError("loss: got None, expected a problem with a loss")
    losses = require("liger_kernel.chunked_loss", "liger-kernel")
    check_logits_fit(problem, rows=2 * problem.length)
    settings = dict(LOSSES[problem.loss])
    if problem.loss in ("simpo", "dpo"):
        settings["compute_nll_loss"] = False
    if "simpo_gamma" in settings:
        settings["gamma"] = settings.pop("simpo_gamma")
    make = getattr(losses, f"LigerFusedLinear{LIGER_NAMES[problem.loss]}Loss")
    function = make(compiled=compiled, **settings)
    lengths = (problem.answers(problem.labels) != -100).sum(1)

    def attempt(problem: Problem, backward: bool) -> Outcome:
        references: tuple[Tensor, ...] = ()
        if problem.ref_hidden is not None:
            references = (problem.answers(problem.ref_hidden), problem.weight.detach())
        bias = (None,) if references else ()
        loss, (chosen, rejected, *_) = function(
            problem.weight,
            problem.answers(problem.hidden),
            problem.answers(problem.labels),
            *bias,
            *references,
        )
        results = torch.autograd.grad(loss, problem.leaves) if backward else ()
        logps = torch.cat([chosen, rejected]).detach().double()
        if problem.loss in AVERAGED:
            logps = logps * lengths
        chosen, rejected = logps.chunk(2)
        return Outcome(None, chosen - rejected, results)

    return attempt
