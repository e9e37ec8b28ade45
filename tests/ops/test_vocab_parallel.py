"""A head whose rows are sharded over two and over four gloo processes against the whole head in one process.

All calls of a number of processes are made in one start of them, by vocab_ranks_worker.py: with blocks of eight
rows and a budget that cuts even these small problems into many tiles, chunks and windows.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import vocab_ranks_worker
from torch import Tensor

import fastpo
from fastpo.kernels.logit_transform import LogitTransform

TOL = 2**-5
PLAIN = LogitTransform()
CAPPED = LogitTransform(logit_scale=1.7, softcap=5.0, temperature=1.3)
# What a certified call promises of every row is checked with the gradient that the row gets by itself.
PROMISED: dict[str, Any] = {"backward": "certified", "per_row": True, "rows": 29}
# Uneven; one rank of four has a single row.
SIZES = {2: [60, 41], 4: [40, 1, 37, 23]}
NAMES = vocab_ranks_worker.NAMES
MIB = 2**20


def problem(
    world: int,
    dtype: torch.dtype = torch.float64,
    *,
    rows: int = 45,
    sizes: list[int] | None = None,
    spread: float = 3.0,
    bias: bool = True,
    ignored: float = 0.2,
    frozen: tuple[str, ...] = (),
    transform: LogitTransform = PLAIN,
    backward: str = "exact",
    **more: Any,
) -> dict[str, Any]:
    """A case of the worker: the whole head, and how it is cut and called."""
    sizes, width = sizes or SIZES[world], 7
    vocab = sum(sizes)
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < ignored] = -100
    if ignored < 1:  # the first and last token of every shard
        ends = torch.tensor(sizes).cumsum(0)
        labels[: 2 * len(sizes)] = torch.cat([ends - torch.tensor(sizes), ends - 1])
    options = {**transform._asdict(), "backward": backward, "tol": TOL}
    return {
        "hidden": (torch.randn(rows, width) * (0.3 + torch.rand(rows, 1))).to(dtype),
        "weight": (torch.randn(vocab, width) * (spread / math.sqrt(width))).to(dtype),
        "bias": torch.randn(vocab).to(dtype) if bias else None,
        "labels": labels,
        "grad": torch.randn(rows, dtype=torch.float64),
        "sizes": sizes,
        "frozen": frozen,
        "options": options,
        **more,
    }


def tied(world: int) -> dict[str, Any]:
    """Every token has a twin in the next shard, with the same logit to the last bit, as all are integers."""
    size = 8
    case = problem(world, rows=40, sizes=[size] * world, bias=False, ignored=0.0)
    case["hidden"] = torch.randint(-9, 10, case["hidden"].shape).double() / 16
    case["weight"] = torch.randint(-9, 10, (size, 7)).double().repeat(world, 1)
    case["labels"] = (case["hidden"] @ case["weight"][:size].t()).argmax(1)
    case["labels"] += size * (torch.arange(40) % world)
    return case


def forbidden(world: int, **options: Any) -> dict[str, Any]:
    """A bias forbids the first rank's tokens, all of them."""
    case = problem(world, **options)
    size = case["sizes"][0]
    case["bias"][:size] = -torch.inf
    case["labels"][(case["labels"] >= 0) & (case["labels"] < size)] = size
    return case


def exact_cases(world: int) -> dict[str, dict[str, Any]]:
    many_rows = {"rows": 130, "sizes": [11, 9] if world == 2 else [6, 5, 3, 9]}
    dtensor = {"sizes": [51, 50] if world == 2 else [26, 26, 26, 23], "dtensor": True}
    return {
        "float64": problem(world),
        "float64, capped": problem(world, transform=CAPPED),
        "float64, more rows than columns": problem(world, transform=CAPPED, **many_rows),
        "float32": problem(world, torch.float32),
        "float32, capped": problem(world, torch.float32, transform=CAPPED),
        "bfloat16": problem(world, torch.bfloat16, transform=CAPPED),
        "bfloat16, more rows than columns": problem(world, torch.bfloat16, **many_rows),
        "no bias": problem(world, bias=False),
        "every row labelled": problem(world, ignored=0.0),
        "no row labelled": problem(world, ignored=1.0),
        "no rows": problem(world, rows=0, ignored=1.0),
        "frozen weight": problem(world, frozen=("weight", "bias")),
        "frozen hidden": problem(world, frozen=("hidden",)),
        "far apart": problem(world, spread=60.0),
        "ties": tied(world),
        "a forbidden shard": forbidden(world),
        "checked": problem(world, check=True),
        "one rank alone": problem(world, sizes=[30], group="alone"),
        "DTensor": problem(world, **dtensor),
        "DTensor, no bias, frozen": problem(world, bias=False, frozen=("weight",), **dtensor),
    }


def certified_cases(world: int) -> dict[str, dict[str, Any]]:
    options = PROMISED
    flat = {"spread": 0.1, **options}
    cases = {
        "float64": problem(world, **options),
        "capped": problem(world, transform=CAPPED, **options),
        "peaked": problem(world, spread=15.0, **options),
        "flat": problem(world, **flat),
        "float32": problem(world, torch.float32, **options),
        "every row labelled": problem(world, ignored=0.0, **options),
        "a forbidden shard": forbidden(world, **options),
        "checked": problem(world, check=True, **options),
        "frozen hidden": problem(world, frozen=("hidden",), **options),
        "frozen weight": problem(world, frozen=("weight", "bias"), backward="certified"),
        "bfloat16": problem(world, torch.bfloat16, backward="auto"),
        "bfloat16, low memory": problem(world, torch.bfloat16, backward="auto"),
        "no row labelled": problem(world, ignored=1.0, backward="certified"),
    }
    cases["bfloat16, low memory"]["options"]["low_memory"] = True
    return {f"certified: {name}": case for name, case in cases.items()}


FAULTS = {
    "no_sum_of_dh": "float64",
    "dh_summed_twice": "float64",
    "wrong_offset": "float64",
    "lse_of_the_shard": "float64",
    "ties_to_the_highest": "ties",
    "whole_tolerance_for_every_shard": "certified: flat",
}


def run_ranks(world: int, job: dict[str, Any], folder: Path, **more: str) -> list[dict[str, Any]]:
    """What ``vocab_ranks_worker`` finds on every rank."""
    torch.save(job, folder / "job.pt")
    root = Path(fastpo.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, vocab_ranks_worker.__file__, str(world), str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=240)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


def seeded(number: int) -> None:
    """Fixtures of a whole module are drawn from the session's seed alone."""
    torch.manual_seed(int(os.environ["FASTPO_SEED"]) + number)


class Run:
    """The cases of so many processes, and what each rank found."""

    def __init__(self, world: int, folder: Path) -> None:
        seeded(world)
        self.cases = exact_cases(world) | certified_cases(world)
        if world == 4:
            self.cases["half of the ranks"] = problem(2, group="halves")
        else:
            self.cases["compiled"] = problem(2, compiled=True)
            self.cases["DTensor, compiled"] = {**self.cases["DTensor"], "compiled": True}
            self.cases["certified"] = problem(2, backward="certified")
            self.cases["certified, compiled"] = {**self.cases["certified"], "compiled": True}
        self.cases |= {fault: self.cases[case] | {"fault": fault} for fault, case in FAULTS.items()}
        job: dict[str, Any] = {"cases": self.cases, "refusals": True, "budget": 96 * 1024}
        if world == 2:
            job["opcheck"] = [0.0, TOL]
            job["memory"] = {"rows": 1024, "vocab": 20_000, "width": 8, "budget": 10 * MIB}
        self.ranks = run_ranks(world, job, folder)

    def found(self, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        return self.cases[name], [rank["cases"][name] for rank in self.ranks]


@pytest.fixture(scope="module", params=[2, 4], ids=["two", "four"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(request.param, tmp_path_factory.mktemp("ranks"))


def truth_of(case: dict[str, Any]) -> dict[str, Any]:
    """The exact results of the (rounded) inputs in float64, in this process, with the whole head."""
    wide = {name: None if case[name] is None else case[name].double() for name in NAMES}
    options = {**case["options"], "backward": "exact", "low_memory": False}
    plain = {"options": options, "compiled": False, "dtensor": False, "per_row": False}
    return vocab_ranks_worker.call({**case, **wide, **plain}, 0, None)


def joined(shares: list[dict[str, Any]], name: str) -> Tensor | None:
    """A gradient of the whole head, from those of its shards; of hidden, which all ranks must have alike."""
    parts = [share[name] for share in shares]
    if parts[0] is None:
        assert not any(part is not None for part in parts)
        return None
    if name == "hidden":
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    return torch.cat(parts)


def ranks_of(case: dict[str, Any], shares: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that share a head with the first."""
    return {"all": shares, "alone": shares[:1], "halves": shares[::2]}[case.get("group", "all")]


def check_results(case: dict[str, Any], shares: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probs and statistics: the same on all ranks, and those of the whole head, which is returned."""
    truth, dtype = truth_of(case), case["hidden"].dtype
    for share in shares[1:]:
        assert torch.equal(share["logps"], shares[0]["logps"])
        for name, value in share["stats"].items():
            assert torch.equal(value, shares[0]["stats"][name]), name
    logps, stats = shares[0]["logps"], shares[0]["stats"]
    z = case["hidden"].double() @ case["weight"].double().t()
    peak = max(1.0, float(z.abs().max()) if z.numel() else 1.0)
    # float32 and lower precision: log-probs are float32 numbers, made of logits and lse as large as ``peak``.
    bound = 1e-12 * peak if dtype == torch.float64 else 2e-6 * peak
    torch.testing.assert_close(logps.double(), truth["logps"], rtol=0, atol=bound)
    assert bool((logps <= 0).all())
    for name in ("entropy", "logit_mean"):
        torch.testing.assert_close(
            stats[name].double(), truth["stats"][name], rtol=1e-12, atol=5 * bound
        )
    assert torch.equal(stats["top1"], truth["stats"]["top1"])
    return truth


def check_gradients(
    case: dict[str, Any], shares: list[dict[str, Any]], truth: dict[str, Any]
) -> None:
    dtype = case["hidden"].dtype
    # bfloat16: one rounding of the result, and for dH one of each rank's part.
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype]
    labelled = bool((case["labels"] != -100).any())
    for name in NAMES:
        got, expected = joined(shares, name), truth[name]
        assert (got is None) == (expected is None) == (name in case["frozen"] or case[name] is None)
        if got is None:
            continue
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert bool(got.any()) == labelled
        error = float((got.double() - expected).norm())
        assert error <= tolerance * float(expected.norm()), name
    if shares[0]["hidden"] is not None:
        assert not shares[0]["hidden"][case["labels"] == -100].any()


EXACT = [*exact_cases(2)]


@pytest.mark.parametrize("name", EXACT)
def test_equals_one_process(run: Run, name: str) -> None:
    case, shares = run.found(name)
    shares = ranks_of(case, shares)
    check_gradients(case, shares, check_results(case, shares))
    assert float(shares[0]["stats"]["dropped_mass_max"]) == 0.0
    assert float(shares[0]["stats"]["active_fraction"]) == 1.0
    assert int(shares[0]["stats"]["dense_rows"]) == int((case["labels"] != -100).sum())


def test_ties_across_shards_count_for_the_lowest_id(run: Run) -> None:
    """What the comparison above relies on: labels are the likeliest tokens, or a twin under a higher id."""
    case, shares = run.found("ties")
    assert torch.equal(shares[0]["stats"]["top1"], case["labels"] < case["sizes"][0])
    assert 0 < int(shares[0]["stats"]["top1"].sum()) < 40


@pytest.mark.parametrize("run", [2], indirect=True)
def test_compiles_whole(run: Run) -> None:
    for name in ("compiled", "DTensor, compiled"):
        case, shares = run.found(name)
        check_gradients(case, shares, check_results(case, shares))
    for plain, compiled in zip(
        run.found("certified")[1], run.found("certified, compiled")[1], strict=True
    ):
        assert all(torch.equal(plain[name], compiled[name]) for name in ("logps", *NAMES))
        assert 0.0 < float(plain["stats"]["dropped_mass_max"]) <= TOL


@pytest.mark.parametrize("run", [2], indirect=True)
def test_opcheck(run: Run) -> None:
    """Schema, fake and autograd of the registered operator, as with a whole head."""
    for rank in run.ranks:
        for tol in (0.0, TOL):
            assert set(rank["opcheck"][tol].values()) == {"SUCCESS"}


@pytest.mark.parametrize("run", [4], indirect=True)
def test_some_of_the_ranks(run: Run) -> None:
    """Two groups side by side, of every other rank."""
    case, shares = run.found("half of the ranks")
    for half in (shares[::2], shares[1::2]):
        check_gradients(case, half, check_results(case, half))


def check_promise(case: dict[str, Any], shares: list[dict[str, Any]]) -> Tensor:
    """Of every row: what is dropped over all shards is at most tol, and the rest exact; which is returned."""
    check_results(case, shares)
    stats = shares[0]["stats"]
    kept = case["labels"] != -100
    h, w, b = (case[name].double() for name in NAMES)
    transform = LogitTransform(**{k: case["options"][k] for k in LogitTransform._fields})
    z = transform.apply_(h @ w.t() + b)
    slope = torch.as_tensor(transform.derivative(z), dtype=torch.float64).expand_as(z)
    p = z.softmax(1)
    hot = torch.zeros_like(p).scatter_(1, torch.where(kept, case["labels"], 0)[:, None], 1.0)
    truth = torch.where(kept[:, None], (hot - p) * slope, 0.0)
    dz = torch.cat([share["dz"] for share in shares], dim=1).double()
    rounding = 1e-12 if case["hidden"].dtype == torch.float64 else 1e-5
    dropped = (dz == 0.0) & (truth != 0.0)
    torch.testing.assert_close(torch.where(dropped, truth, dz), truth, rtol=0, atol=rounding)
    lost = torch.where(dropped, p, 0.0).sum(1)
    assert float(lost.max()) <= TOL * (1 + 1e-3)
    assert float(lost.max()) <= float(stats["dropped_mass_max"]) + 1e-6  # unions only add columns
    assert float(stats["dropped_mass_max"]) <= TOL
    assert not (dropped & hot.bool() & kept[:, None]).any()  # every label
    share = float(stats["active_fraction"])
    assert 0.0 < share <= 1.0
    assert share >= float((dz != 0.0)[kept].double().mean()) - 1e-6
    whole = int((dz != 0.0)[kept].all(1).sum())
    assert int(stats["dense_rows"]) <= whole or b.isinf().any()
    return torch.where(dropped, 0.0, truth)


PER_ROW = [name for name, case in certified_cases(2).items() if case.get("per_row")]


@pytest.mark.parametrize("name", PER_ROW)
def test_the_certified_gradient_keeps_its_promise_over_all_shards(run: Run, name: str) -> None:
    case, shares = run.found(name)
    d = check_promise(case, shares) * case["grad"][:, None]
    expected = {
        "hidden": d @ case["weight"].double(),
        "weight": d.t() @ case["hidden"].double(),
        "bias": d.sum(0),
    }
    tolerance = 1e-12 if case["hidden"].dtype == torch.float64 else 1e-5
    for name_ in NAMES:
        got = joined(shares, name_)
        if name_ in case["frozen"]:
            assert got is None
            continue
        assert float((got.double() - expected[name_]).norm()) <= tolerance * float(
            expected[name_].norm()
        )


def test_columns_are_left_out(run: Run) -> None:
    """The certified cases would show nothing if all columns were taken."""
    active = [float(run.found(n)[1][0]["stats"]["active_fraction"]) for n in PER_ROW]
    assert min(active) < 0.5
    dropped = [float(run.found(n)[1][0]["stats"]["dropped_mass_max"]) for n in PER_ROW]
    assert max(dropped) > 0.5 * TOL


@pytest.mark.parametrize("name", [n for n in certified_cases(2) if n not in PER_ROW])
def test_certified_gradients_are_near_the_exact_ones(run: Run, name: str) -> None:
    """‖error of dH‖ ≤ tol·|c|·(largest row of W) per row, and likewise of dW; beside it bfloat16 is rounded."""
    check_near(*run.found(name))


def check_near(case: dict[str, Any], shares: list[dict[str, Any]]) -> None:
    truth = check_results(case, shares)
    c = case["grad"].abs() * (case["labels"] != -100)
    sizes = {
        "hidden": c.norm() * case["weight"].double().norm(dim=1).max(),
        "weight": (c * case["hidden"].double().norm(dim=1)).sum(),
        "bias": c.sum(),
    }
    rounding = 4e-3 if case["hidden"].dtype == torch.bfloat16 else 1e-12
    for name_ in NAMES:
        got, expected = joined(shares, name_), truth[name_]
        if name_ in case["frozen"]:
            assert got is None
            continue
        assert got.dtype == case["hidden"].dtype
        assert bool(got.any()) == bool(c.any())
        error = float((got.double() - expected).norm())
        assert error <= TOL * float(sizes[name_]) + rounding * float(expected.norm())
        assert error <= 0.2 * float(expected.norm())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(run: Run, fault: str) -> None:
    case, shares = run.found(fault)

    def check() -> None:
        if case.get("per_row"):
            check_promise(case, shares)
        else:
            check_gradients(case, shares, check_results(case, shares))

    with pytest.raises(AssertionError):
        check()


REFUSALS = {
    "label too large": "ValueError: labels: 3 of 3 outside [0, ",
    "label negative": "ValueError: labels: 1 of 4 outside [0, ",
    "a rank without rows": "ValueError: weight: got [2, ",
    "labels differ": "ValueError: labels: differ between the ranks of vocab_group",
    "number of labels differs": "ValueError: labels: labelled rows differ between the ranks of vocab_group",
    "rows differ": "ValueError: hidden: rows differ between the ranks of vocab_group, got [4, ",
    "options differ": "ValueError: vocab_group: dtypes or options differ between the ranks",
    "hidden differs": "ValueError: hidden: 1 labelled rows differ between the ranks of vocab_group, expected "
    "the same on all; the first is flat row 1",
    "gradients differ, exact": "ValueError: gradient of the log-probs: 1 labelled rows differ between the "
    "ranks of vocab_group, expected the same on all; the first is flat row 3",
    "gradients differ, certified": "ValueError: gradient of the log-probs: 1 labelled rows differ between",
    "only one rank checks": "ValueError: vocab_group: dtypes or options differ between the ranks",
    "no group": "TypeError: vocab_group: got str, expected a torch.distributed process group",
    "triton": "ValueError: backend: got 'triton', but the tensors are on cpu",
    "shape of a shard": "ValueError: weight: got shape (2, 4), expected (V, 3)",
    "replicated": "ValueError: weight: got a DTensor with placements (Replicate(),) on a mesh of 1 dimensions",
    "by columns": "ValueError: weight: got a DTensor with placements (Shard(dim=1),)",
    "plain bias": "ValueError: bias: got a plain tensor, expected a DTensor",
    "plain weight": "ValueError: weight: got a plain tensor, expected a DTensor",
    "hidden a DTensor": "TypeError: hidden: got a DTensor, expected a plain tensor",
    "another group": "ValueError: vocab_group: got ranks [0], expected those of the mesh of weight, [0, 1",
    "noise: group": "TypeError: noisy_linear_logprobs() got an unexpected keyword argument 'vocab_group'",
    "noise: DTensor": "TypeError: weight: got a DTensor, expected a plain tensor",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_on_every_rank(run: Run, name: str) -> None:
    messages = [rank["refusals"][name] for rank in run.ranks]
    assert messages[0].startswith(REFUSALS[name]), messages[0]
    head = REFUSALS[name].split(", expected those")[0].split("[0]")[0]
    assert all(message.startswith(head) for message in messages), messages


@pytest.mark.parametrize("run", [2], indirect=True)
@pytest.mark.parametrize("backward", ["exact", "certified"])
def test_no_rank_holds_its_part_of_the_logits(run: Run, backward: str) -> None:
    """The budget and one float32 sum of the smaller of dH and dW, where a rank's logits take 78 MiB."""
    for rank in run.ranks:
        assert rank["memory"][backward] <= 10 * MIB + 4 * 1024 * 8 + 400 * 1024
