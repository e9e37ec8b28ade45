"""What the harness counts: rounds, failures, budgets, errors and bytes, with clocks and rivals made for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fastpo.benchmarks import bench, measure, reference, tables
from fastpo.benchmarks.cases import CPU, GPU, SETS, Case, case_set
from fastpo.benchmarks.memory import peak_extra_bytes
from fastpo.benchmarks.problem import Outcome
from fastpo.benchmarks.rivals import Absent, Rival
from fastpo.benchmarks.timing import interleaved, product

CPU_DEVICE = torch.device("cpu")
TINY = Case("main", 64, 16, 97, None, length=8, rounds=2, rivals=("eager", "fastpo-exact"))


class Clock:
    """Seconds that pass when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ABC"}
    timings = interleaved(steps, 2)
    assert "".join(order) == "ABCABCABC"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == dict.fromkeys(
        "ABC", 2
    )
    order.clear()
    interleaved(steps, 2, warm=True)
    assert "".join(order) == "ABCABC"


def test_slow_steps_take_part_seldom() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ABC"}
    timings = interleaved(steps, 4, seldom={"B": 3, "C": 1_000_000})
    assert "".join(order) == "ABC" + "ABC" + "A" + "A" + "AB"
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {
        "A": 4,
        "B": 2,
        "C": 1,
    }
    results = [
        {"rival": name, "second_seconds": seconds}
        for name, seconds in {"quick": 1.0, "fair": 2.9, "slow": 3.1, "hopeless": 11.0}.items()
    ]
    assert measure._seldom([*results, {"rival": "absent"}]) == {
        "slow forward": 3,
        "slow step": 3,
        "hopeless forward": 1_000_000,
        "hopeless step": 1_000_000,
    }
    small = [{"rival": r["rival"], "second_seconds": r["second_seconds"] / 100} for r in results]
    assert measure._seldom(small) == {}


def test_a_round_that_is_not_complete_does_not_count() -> None:
    answers = iter([False] * 5 + [True])  # two whole rounds of two, then half of one
    steps = {"A": lambda: None, "B": lambda: None}
    timings = interleaved(steps, 9, warm=True, expired=lambda: next(answers))
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"A": 2, "B": 2}


def test_a_step_that_fails_costs_the_others_nothing() -> None:
    def fails() -> None:
        raise RuntimeError("no\nkernel image")

    timings = interleaved({"A": fails, "B": lambda: None}, 3)
    assert timings.failures == {"A": "RuntimeError: no kernel image"}
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"B": 3}


def test_product_is_the_whole_product(monkeypatch) -> None:
    """In slices of 7 rows: what the last one leaves in the buffer."""
    monkeypatch.setitem(measure.product.__globals__["SLICE_BYTES"], "cpu", 7 * 5 * 4)
    hidden, weight = torch.randn(16, 3), torch.randn(5, 3)
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(real(a, b, out=out).clone()))
    product(hidden, weight)()
    torch.testing.assert_close(torch.cat(seen), hidden @ weight.T)


def test_peak_extra_bytes_counts_what_lives_at_once() -> None:
    def step() -> list[torch.Tensor]:
        a = torch.empty(1000)
        b = torch.empty(500)  # 6000 bytes live
        del a, b
        return [torch.empty(250)]

    assert peak_extra_bytes(step) == 6000 - 1000


def test_budget_and_its_parts() -> None:
    clock = Clock()
    budget = bench.Budget(10, clock)
    half = budget.part(0.5)
    clock.now = 299
    assert not half()
    late = budget.part(0.9)
    clock.now = 300
    assert half()
    assert not late()
    assert not budget.spent()
    clock.now = 600  # the end of all, before that of the part
    assert late()
    assert budget.spent()


def fake_rival(
    name: str, factor: float = 1.0, error: Exception | None = None, sums_only: bool = False
) -> Rival:
    """Log-probs, margins and gradients of float64, times ``factor``; or an error."""

    def prepare(problem):
        if isinstance(error, Absent):
            raise error
        truth = problem.truth(ones=sums_only)

        def attempt(problem, backward):
            if error is not None:
                raise error
            margins = reference.margins(truth.logps, problem.length) * factor
            gradients = (truth.hidden_grad * factor, truth.weight_grad * factor)
            return Outcome(truth.logps * factor, margins, gradients if backward else ())

        return attempt

    return Rival(name, f"times {factor}", prepare, sums_only)


def test_errors_are_the_relative_ones_and_everyone_is_told_of(monkeypatch) -> None:
    crowd = [
        fake_rival("right"),
        fake_rival("wrong", 1.01),
        fake_rival("sum", 1.02, sums_only=True),
        fake_rival("gone", error=Absent("is not installed")),
        fake_rival("broken", error=RuntimeError("no kernel image")),
        fake_rival("unwanted"),
    ]
    monkeypatch.setattr(measure, "token_rivals", lambda: crowd)
    case = replace(TINY, rivals=())
    record = measure.measure(case, lambda name: name != "unwanted", device=CPU_DEVICE)
    right, wrong, total, gone, broken = record["results"]
    assert max(right["errors"].values()) < 1e-12
    for key in ("logps", "hidden_grad", "weight_grad"):
        assert wrong["errors"][key] == pytest.approx(0.01, rel=1e-6)
        assert total["errors"][key] == pytest.approx(0.02, rel=1e-6)  # of the upstream 1
    truth_margin = wrong["errors"]["margin_nats"] / 0.01
    assert truth_margin > 1
    assert len(right["step_seconds"]) == len(right["forward_seconds"]) == case.rounds
    assert (len(total["step_seconds"]), total["forward_seconds"]) == (case.rounds, [])
    assert len(record["G_seconds"]) == case.rounds
    assert (gone["status"], gone["reason"]) == ("absent", "is not installed")
    assert (broken["status"], broken["reason"]) == ("failed", "RuntimeError: no kernel image")
    assert tables.missing(record) == {
        "gone": "is not installed",
        "broken": "RuntimeError: no kernel image",
    }
    shown = [row[0] for row in tables.table(record)]
    assert shown == ["rival", "right", "wrong", "sum"]
    json.dumps(record)  # plain data


def test_rivals_without_time_are_left_out() -> None:
    answers = iter([False, True, True, True])
    record = measure.measure(
        TINY, lambda name: True, device=CPU_DEVICE, expired=lambda: next(answers)
    )
    status = {r["rival"]: r["status"] for r in record["results"]}
    assert status == {"fastpo-exact": "measured", "eager": "left out"}
    exact = record["results"][0]
    assert exact["step_seconds"] == []  # no round was complete, but accuracy and memory are there
    assert exact["errors"]["hidden_grad"] < 1e-5
    assert exact["extra_bytes"] > 0
    assert "–" in tables.text(tables.table(record))


def test_sparsity_is_that_of_the_certified_forward(seed) -> None:
    case = replace(TINY, rivals=("fastpo-certified",))
    record = measure.measure(case, lambda name: True, device=CPU_DEVICE)
    sparsity = record["sparsity"]
    assert 0 <= sparsity["dropped_mass_max"] <= measure.TOL
    assert 0 < sparsity["active_fraction"] <= 1
    assert "ρ " in tables.heading(record)


def test_the_epilogue_is_timed_alone_and_in_a_step() -> None:
    case = replace(TINY, group="epilogue", length=4, loss="simpo", rivals=())
    record = measure.measure(case, lambda name: True, device=CPU_DEVICE)
    assert record["pairs"] == 8
    for key in ("solve_seconds", "epilogue_seconds", "step_seconds"):
        assert len(record[key]) == case.rounds
    header, *rows = tables.table(record)
    assert header == tables.EPILOGUE_HEADER
    assert rows[-1][-1] == "100.00%"


@pytest.mark.parametrize("name", SETS)
def test_sets_hold_different_cases_of_whole_pairs(name) -> None:
    cases = SETS[name]
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.n % (2 * case.length) == 0, case.name
        assert case.rounds >= 5  # of which medians are quoted
    assert cases[0].group == "main"


def test_the_sets_hold_what_the_protocol_asks_for() -> None:
    main = CPU[0]
    assert (main.n, main.width, main.vocab, main.entropy) == (2048, 1024, 32_000, 1.6)
    assert main.dtype == "float32"
    assert main.rounds >= 7
    small = {(c.entropy, c.dtype) for c in CPU if c.group == "accuracy"}
    assert small == {(e, d) for e in (0.9, 1.6, 2.5) for d in ("float32", "bfloat16")}
    assert [c for c in CPU if c.workload == "flat"]
    for shape in ((16_384, 4096, 128_256), (16_384, 4096, 151_936)):
        (case,) = (c for c in GPU if c.group == "main" and (c.n, c.width, c.vocab) == shape)
        assert (case.entropy, case.dtype) == (1.6, "bfloat16")
        assert case.rounds >= 5
    assert max(c.n for c in GPU if c.group == "size") == 262_144
    with pytest.raises(ValueError, match="--set: got 'gpu' on a device of type 'cpu'"):
        case_set("gpu", "cpu")
