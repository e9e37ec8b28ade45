"""Who is measured: fastpo and its rivals, each with the best settings that its documentation names.

A rival that cannot run here is absent, with the reason: ``prepare`` raises :class:`Absent`. This file holds
those that compute the log-probs of tokens; those that compute a whole preference loss are in ``loss_rivals``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpo

from . import reference
from .problem import Outcome, Problem

# (problem, with a backward?) → its results. Without one it is the forward of a training step, graph included.
Attempt = Callable[[Problem, bool], Outcome]
TokenLogprobs = Callable[[Tensor, Tensor, Tensor], Tensor]  # (N, H), (V, H), (N,) → (N,)


class Absent(Exception):
    """Why a rival cannot run here, in one line."""


@dataclass(frozen=True)
class Rival:
    """Something that solves a :class:`Problem`."""

    name: str
    settings: str  # as used here, and why
    prepare: Callable[[Problem], Attempt]  # raises Absent
    sums_only: bool = (
        False  # it returns a sum and takes no upstream per token: compared for the upstream 1
    )


def token_rivals() -> list[Rival]:
    """All that give log-probs of tokens, fastpo first; names are those of ``--only`` and ``--skip``."""
    return [
        Rival(
            "fastpo-certified",
            "backward='certified', tol=2**-10 (default)",
            lambda problem: of_tokens(fastpo_logprobs("certified")),
        ),
        Rival(
            "fastpo-exact", "backward='exact'", lambda problem: of_tokens(fastpo_logprobs("exact"))
        ),
        Rival("fastpo-low-memory", "backward='certified', low_memory=True", fastpo_low_memory),
        Rival(
            "eager",
            "log_softmax of (hidden @ weight.T).float(), as transformers does",
            lambda problem: eager(problem),
        ),
        Rival(
            "torch-chunked",
            "torch.nn.functional.linear_cross_entropy(reduction='none', options=LinearCrossEntropyOptions()), "
            "whose 'auto' is measured per device and dtype",
            torch_chunked,
        ),
        Rival(
            "trl",
            "ChunkedLogProbFunction on labelled tokens, the trainers' chunk of 32768 columns, no extra outputs",
            trl,
        ),
        Rival(
            "cce-compiled",
            "linear_cross_entropy(impl='torch_compile', reduction='none'): for CPUs and small vocabularies",
            lambda problem: cut_cross_entropy(problem, impl="torch_compile"),
        ),
        Rival(
            "cce-exact",
            "linear_cross_entropy(filter_eps=None, reduction='none')",
            lambda problem: cut_cross_entropy(problem, impl="cce", filter_eps=None),
        ),
        Rival(
            "cce-filtered",
            "linear_cross_entropy(filter_eps='high', reduction='none'): the default",
            lambda problem: cut_cross_entropy(problem, impl="cce", filter_eps="high"),
        ),
        Rival(
            "liger-ce",
            "LigerFusedLinearCrossEntropyLoss(reduction='none'), Triton, accumulates in the dtype of the head",
            liger_cross_entropy,
        ),
        Rival(
            "liger-ce-sm90",
            "LigerFusedLinearScaledCrossEntropyFunction, CuTe on Hopper",
            liger_cross_entropy_sm90,
        ),
        Rival(
            "quack",
            "chunked_linear_cross_entropy(reduction='sum', chunk_size=4096, tuned=True): the defaults; "
            "scaled-exp pipeline where eligible",
            quack,
            sums_only=True,
        ),
    ]


def of_tokens(logprobs: TokenLogprobs) -> Attempt:
    """The attempt of something that gives differentiable log-probs of tokens."""

    def attempt(problem: Problem, backward: bool) -> Outcome:
        logps = logprobs(problem.hidden, problem.weight, problem.labels)
        if not backward:
            return Outcome(logps, None, ())
        upstream = problem.coefficients.to(logps.dtype)
        gradients = torch.autograd.grad(logps, problem.leaves, upstream)
        logps = logps.detach()
        return Outcome(logps, reference.margins(logps, problem.length), gradients)

    return attempt


def fastpo_logprobs(backward: str, **options: Any) -> TokenLogprobs:
    """fastpo with the named backward."""
    return lambda hidden, weight, labels: fastpo.linear_logprobs(
        hidden, weight, labels, backward=backward, **options
    )


def fastpo_low_memory(problem: Problem) -> Attempt:
    """The certified backward in two sweeps, without a float32 sum."""
    if problem.hidden.dtype not in (torch.bfloat16, torch.float16):
        raise Absent("only low precision has a float32 sum to save")
    return of_tokens(fastpo_logprobs("certified", low_memory=True))


def eager(problem: Problem) -> Attempt:
    """All logits at once, tokens without a label included."""
    check_logits_fit(problem, rows=len(problem.labels))
    return of_tokens(eager_logprobs)


def eager_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,) log-probs through the full logits."""
    logps = (hidden @ weight.t()).float().log_softmax(-1)
    picked = logps.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return picked.masked_fill(labels == -100, 0.0)


def torch_chunked(problem: Problem) -> Attempt:
    """PyTorch's own chunked operation."""
    make_options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if make_options is None:
        raise Absent(f"torch {torch.__version__} has none, it came with 2.13")
    options = make_options()
    return of_tokens(
        lambda hidden, weight, labels: (
            -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
        )
    )


def trl(problem: Problem) -> Attempt:
    """What TRL's trainers use."""
    function: Any = require("trl.kernels.chunked_logprob", "trl >= 1.16").ChunkedLogProbFunction
    require("trl.trainer.utils", "trl >= 1.16")  # its backward imports it
    columns = min(32768, problem.weight.shape[0])

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        kept = labels != -100
        found = function.apply(
            hidden[kept], weight, None, labels[kept], 1.0, columns, None, 1.0, ()
        )
        return found[0].new_zeros(labels.shape).masked_scatter(kept, found[0])

    return of_tokens(logprobs)


def cut_cross_entropy(problem: Problem, *, impl: str, **settings: object) -> Attempt:
    """Apple's cut-cross-entropy."""
    if impl == "cce":
        require_cuda(problem)
    else:
        check_logits_fit(problem, rows=int((problem.labels != -100).sum()))
    function = require("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return of_tokens(
        lambda hidden, weight, labels: (
            -function(hidden, weight, labels, reduction="none", impl=impl, **settings)
        )
    )


def liger_cross_entropy(problem: Problem) -> Attempt:
    """Liger's fused linear cross entropy in Triton."""
    require_cuda(problem)
    module = require("liger_kernel.transformers", "liger-kernel")
    function = module.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return of_tokens(lambda hidden, weight, labels: -function(weight, hidden, labels))


def liger_cross_entropy_sm90(problem: Problem) -> Attempt:
    """Liger's kernels for Hopper."""
    require_cuda(problem, capability=(9, 0), dtype=torch.bfloat16)
    module = require("liger_kernel.ops", "liger-kernel")
    require(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
        "liger-kernel with its CuTe DSL",
    )
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return of_tokens(lambda hidden, weight, labels: -function.apply(hidden, weight, labels))


def quack(problem: Problem) -> Attempt:
    """QuACK's chunked linear cross entropy, which reduces to a sum."""
    require_cuda(problem, dtype=torch.bfloat16)
    function = require("quack.linear_cross_entropy", "quack-kernels").chunked_linear_cross_entropy

    def attempt(problem: Problem, backward: bool) -> Outcome:
        total = -function(problem.hidden, problem.weight, problem.labels, reduction="sum")
        results = torch.autograd.grad(total, problem.leaves) if backward else ()
        return Outcome(None, None, results)

    return attempt


def require(module: str, distribution: str) -> ModuleType:
    """Import a module of an optional distribution, or say why that does not work."""
    try:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise Absent(f"{distribution} is not installed")
        return importlib.import_module(module)
    except Absent:
        raise
    except Exception as error:  # whatever it is, the package does not work here
        message = " ".join(str(error).split())
        raise Absent(
            f"{distribution} cannot be imported: {type(error).__name__}: {message}"
        ) from None


def require_cuda(
    problem: Problem,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Say so where a rival needs a CUDA device, one of a certain kind, or another dtype."""
    device = problem.hidden.device
    if device.type != "cuda":
        raise Absent("needs a CUDA device")
    here = torch.cuda.get_device_capability(device)
    if capability is not None and here != capability:
        wanted = ".".join(map(str, capability))
        raise Absent(f"needs compute capability {wanted}, here it is {here[0]}.{here[1]}")
    if dtype is not None and problem.hidden.dtype != dtype:
        raise Absent(f"needs {str(dtype).removeprefix('torch.')}")


def check_logits_fit(problem: Problem, rows: int) -> None:
    """Say so where the logits of ``rows`` tokens, of which about four copies live at once, exceed free memory.

    On CUDA the allocator says it; a CPU's operating system would start killing processes.
    """
    if problem.hidden.device.type == "cuda":
        return
    needed = 4 * 4 * rows * problem.weight.shape[0]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise Absent(f"its logits need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")
