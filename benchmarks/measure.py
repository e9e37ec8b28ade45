"""Measure one case: all rivals side by side in time, peak extra memory and accuracy, as plain JSON."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastpo

from . import reference, workloads
from .cases import Case
from .loss_rivals import loss_rivals
from .memory import peak_extra_bytes
from .problem import Outcome, Problem
from .rivals import Absent, Attempt, Rival, token_rivals
from .timing import interleaved, product, reason

TOL = 2**-10
NUCLEUS_ROWS = 256  # of which sizes are told
TAU = 10.0  # the authors' usual
LEFT_OUT = "the time was up"

Result = dict[str, Any]

# (times, k): a rival so many times slower than the fastest takes part in every k-th round, to leave time for
# the others, unless it is quick even so.
SELDOM = ((10.0, 1_000_000), (3.0, 3))
QUICK_SECONDS = 0.5


def measure(
    case: Case,
    chosen: Callable[[str], bool],
    *,
    device: torch.device,
    states: Path | None = None,
    expired: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Measure ``case``.

    Args:
        case: what to measure.
        chosen: whether the rival of that name takes part.
        device: where.
        states: safetensors file of the lm workload; None: the project's own model.
        expired: asked between runs; once true, what is left is marked as left out.
        say: takes lines about the progress.

    Returns:
        Description of the case, raw times in seconds, bytes and errors of every rival.
    """
    # Every shape and dtype is a compilation of its own for the rivals that torch.compile serves.
    torch._dynamo.config.recompile_limit = 64
    say(f"{case.name}: making the workload")
    workload = _workload(case, device, states)
    problem = Problem.build(workload, case.length, loss=case.loss, frozen_head=case.frozen_head)
    record = describe(case, problem)
    if case.group == "epilogue":
        return record | _measure_epilogue(case, problem, device, expired)

    rivals = token_rivals() if case.loss is None else loss_rivals()
    rivals = [r for r in rivals if chosen(r.name) and (not case.rivals or r.name in case.rivals)]
    truths = _Truths(problem) if case.accuracy else None
    results, attempts = _first_runs(rivals, problem, truths, device, expired, say)
    del truths
    record |= {"results": results, "G_seconds": [], **_sparsity(problem, attempts)}

    steps: dict[str, Callable[[], object]] = {"G": product(*_kept(problem))}
    for rival in rivals:
        if rival.name not in attempts:
            continue
        attempt = attempts[rival.name]
        if case.loss is None and not rival.sums_only:
            steps[f"{rival.name} forward"] = functools.partial(attempt, problem, False)
        steps[f"{rival.name} step"] = functools.partial(attempt, problem, True)
    say(f"{case.name}: {case.rounds} rounds of {len(steps)} steps")
    timings = interleaved(
        steps, case.rounds, device=device, expired=expired, warm=True, seldom=_seldom(results)
    )
    record["G_seconds"] = timings.seconds["G"]
    for result in results:
        for kind in ("forward", "step"):
            name = f"{result['rival']} {kind}"
            result[f"{kind}_seconds"] = timings.seconds.get(name, [])
            if name in timings.failures:
                result |= {"status": "failed", "reason": timings.failures[name]}
    return record


@functools.lru_cache(maxsize=1)
def _cached_workload(
    n: int,
    width: int,
    vocab: int,
    entropy: float | None,
    dtype: str,
    ignored: float,
    head_noise: float,
    device: torch.device,
    states: Path | None,
) -> workloads.Workload:
    options: dict[str, Any] = {
        "ignored": ignored,
        "dtype": getattr(torch, dtype),
        "device": device,
    }
    if entropy is None:
        return workloads.flat(n, width, vocab, **options)
    return workloads.lm(
        n, width, vocab, entropy=entropy, head_noise=head_noise, states=states, **options
    )


def _workload(case: Case, device: torch.device, states: Path | None) -> workloads.Workload:
    c = case
    return _cached_workload(
        c.n, c.width, c.vocab, c.entropy, c.dtype, c.ignored, c.head_noise, device, states
    )


def describe(case: Case, problem: Problem) -> Result:
    """What was measured: the case, the workload as it came out, and its nuclei."""
    workload = problem.workload
    rows, head = _kept(problem)
    rows = rows[:: -(-len(rows) // NUCLEUS_ROWS)]
    sizes = workloads.nucleus_sizes(rows, head, TOL)
    return {
        "name": case.name,
        "device": problem.hidden.device.type,
        "case": asdict(case),
        "workload": {
            "name": workload.name,
            "entropy": workload.entropy,
            "factor": workload.factor,
            "ignored": workload.ignored,
            "seed": workload.seed,
            "labelled": int((workload.labels != -100).sum()),
        },
        "nucleus": {
            "tol": TOL,
            "rows": len(rows),
            "quantiles": {f"{q:g}": size for q, size in workloads.quantiles(sizes).items()},
        },
    }


def _kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """Hidden states of the labelled tokens, and the head; G is their product."""
    hidden = problem.hidden.detach()
    kept = problem.labels != -100
    return (hidden if bool(kept.all()) else hidden[kept]), problem.weight.detach()


class _Truths:
    """Float64 results of a problem, for both kinds of upstream, each computed when it is asked for first."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @functools.cached_property
    def weighted(self) -> reference.Truth:
        return self.problem.truth()

    @functools.cached_property
    def ones(self) -> reference.Truth:
        return self.problem.truth(ones=True)

    def errors(self, rival: Rival, outcome: Outcome) -> dict[str, float]:
        """Relative L2 errors of log-probs and gradients, and the largest error of a pair's margin in nats."""
        truth = self.ones if rival.sums_only else self.weighted
        found = {}
        if outcome.logps is not None:
            found["logps"] = reference.relative_error(outcome.logps, truth.logps)
        if outcome.margins is not None:
            expected = reference.margins(truth.logps, self.problem.length)
            found["margin_nats"] = float((outcome.margins.double() - expected).abs().max())
        for key, got, wanted in zip(
            ("hidden_grad", "weight_grad"),
            outcome.gradients,
            (truth.hidden_grad, truth.weight_grad),
            strict=False,  # a frozen head has no gradient
        ):
            found[key] = reference.relative_error(got, wanted)
        return found


def _first_runs(
    rivals: Sequence[Rival],
    problem: Problem,
    truths: _Truths | None,
    device: torch.device,
    expired: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[list[Result], dict[str, Attempt]]:
    """Two runs of every rival, which also warm it up: one for accuracy, one for memory."""
    results, attempts = [], {}
    for rival in rivals:
        result: Result = {"rival": rival.name, "settings": rival.settings, "status": "measured"}
        results.append(result)
        try:
            attempt = rival.prepare(problem)
            if expired():
                result |= {"status": "left out", "reason": LEFT_OUT}
                continue
            say(f"  {rival.name}")
            start = time.perf_counter()
            outcome = attempt(problem, True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            result["first_seconds"] = time.perf_counter() - start  # with compilation, if any
            if truths is not None:
                result["errors"] = truths.errors(rival, outcome)
            del outcome
            start = time.perf_counter()
            result["extra_bytes"] = _extra_bytes(attempt, problem)
            result["second_seconds"] = time.perf_counter() - start
            attempts[rival.name] = attempt
        except Absent as absence:
            result |= {"status": "absent", "reason": str(absence)}
        except Exception as error:  # one of them must not cost the others their run
            result |= {"status": "failed", "reason": reason(error)}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results, attempts


def _seldom(results: Sequence[Result]) -> dict[str, int]:
    """Name of a step → in every how many rounds it takes part, by how long the rivals' second runs took."""
    seconds = {r["rival"]: r["second_seconds"] for r in results if "second_seconds" in r}
    fastest = min(seconds.values(), default=0.0)
    found: dict[str, int] = {}
    for rival, taken in seconds.items():
        for times, every in SELDOM:
            if taken > max(times * fastest, QUICK_SECONDS):
                found |= {f"{rival} forward": every, f"{rival} step": every}
                break
    return found


def _extra_bytes(attempt: Attempt, problem: Problem) -> int:
    return peak_extra_bytes(lambda: attempt(problem, True).gradients, problem.hidden.device)


def _sparsity(problem: Problem, attempts: dict[str, Attempt]) -> Result:
    """ρ and the certificate that the forward of the certified backward reports, if it took part."""
    if "fastpo-certified" not in attempts:
        return {"sparsity": None}
    _, stats = fastpo.linear_logprobs(
        problem.hidden,
        problem.weight,
        problem.labels,
        backward="certified",
        return_stats=True,
    )
    names = ("active_fraction", "dropped_mass_max", "dense_rows")
    return {"sparsity": {name: float(getattr(stats, name)) for name in names}}


def _measure_epilogue(
    case: Case, problem: Problem, device: torch.device, expired: Callable[[], bool]
) -> Result:
    """γ solve and epilogue (sums, gaps, γ, losses and their gradient) alone, and a whole step of the head."""
    answers = problem.answers(problem.labels)
    loss = problem.preference_loss("certified")
    loss.margin = fastpo.DynamicMargin(tau=TAU)
    with torch.no_grad():
        logps = fastpo.linear_logprobs(problem.hidden, problem.weight, problem.labels)
        found = loss.from_token_logps(problem.answers(logps), answers)
        gaps = (found.chosen_rewards - found.rejected_rewards).double()
    token_logps = problem.answers(logps).detach().requires_grad_()

    def epilogue() -> object:
        output = loss.from_token_logps(token_logps, answers)
        return torch.autograd.grad(output.loss, token_logps)

    def step() -> object:
        output = loss(problem.answers(problem.hidden), problem.weight, answers)
        return torch.autograd.grad(output.loss, problem.leaves)

    steps = {
        "solve": lambda: fastpo.solve_margins(gaps, loss.gamma0, TAU),
        "epilogue": epilogue,
        "step": step,
    }
    timings = interleaved(steps, case.rounds, device=device, expired=expired)
    record: Result = {"pairs": len(gaps)}
    if timings.failures:
        record["failures"] = timings.failures
    return record | {f"{name}_seconds": times for name, times in timings.seconds.items()}


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None
