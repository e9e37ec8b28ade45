"""The certified forward's Triton kernels against float64, on CPU tensors.

Not collected by itself: test_certified_forward_triton.py runs it in a process of its own, with
TRITON_INTERPRET=1 set before Triton is loaded. Tiles are 16 rows × 32 columns × 16 there, panels 16 columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from bit_masks import pack
from interpreted_linear_logprobs import (
    BFLOAT16,
    CAPPED,
    FLOAT16,
    FLOAT32,
    PLAIN,
    SCALED,
    Problem,
    _Altered,
    check_forward,
    make_problem,
    reference,
)

from fastpo.kernels import certified_forward_triton as launcher
from fastpo.kernels import nucleus, nucleus_blocks_triton, tile_configs
from fastpo.kernels.linear_logprobs_torch import ForwardResult

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(large) = inf

STEP = math.log(2) / 8  # between codes, nats


def probabilities(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and softmax of every kept row, (n, V) float64."""
    hidden = p.hidden if p.rows is None else p.hidden[p.rows]
    bias = None if p.bias is None else p.bias.double()
    z = torch.nn.functional.linear(hidden.double(), p.weight.double(), bias)
    z = p.transform.apply_(z)
    return z, z.softmax(dim=1)


def smallest_sizes(mass: torch.Tensor, tol: float) -> torch.Tensor:
    """(n,) how many columns the smallest set has that leaves at most ``tol`` of a row: by sorting."""
    left_out = mass.sort(dim=1).values.cumsum(dim=1) <= tol
    return mass.shape[1] - left_out.sum(dim=1)


@dataclass(frozen=True)
class Got:
    """What a call returned, and the masks and sizes of its rows on the way to the blocks."""

    result: ForwardResult
    nuclei: nucleus.Nuclei
    masks: torch.Tensor  # (n, V) bool
    sizes: torch.Tensor  # (n,)
    windows: list[int]  # rows in each


def run(
    p: Problem, tol: float, monkeypatch, *, want_stats: bool = True, budget: int = 2**26
) -> Got:
    windows: list[tuple[torch.Tensor, torch.Tensor]] = []
    gather_blocks = launcher.gather_blocks

    def recorded(masks: torch.Tensor, sizes: torch.Tensor, height: int, vocab: int):
        windows.append((masks.clone(), sizes.clone()))
        return gather_blocks(masks, sizes, height, vocab)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "gather_blocks", recorded)
        result, nuclei = launcher.launch_forward(
            p.hidden, p.weight, p.bias, p.labels, p.rows, p.transform, want_stats, tol,
            tile_configs.target(p.hidden.device), budget,
        )  # fmt: skip
    masks = torch.cat([masks for masks, _ in windows])
    vocab = p.weight.shape[0]
    assert torch.equal(pack(nucleus.column_mask(masks, vocab)), masks)  # no bit beyond V
    return Got(
        result,
        nuclei,
        nucleus.column_mask(masks, vocab),
        torch.cat([sizes for _, sizes in windows]),
        [len(sizes) for _, sizes in windows],
    )


def check_nuclei(p: Problem, tol: float, got: Got) -> None:
    """The certificate; and that a nucleus is what lies above a threshold, up to a step of the codes."""
    z, mass = probabilities(p)
    rows = torch.arange(len(p.labels))
    left_out = (mass * ~got.masks).sum(dim=1)
    assert (left_out <= tol * (1 + 1e-3)).all(), (left_out / tol).max()
    dropped = got.nuclei.dropped.double()
    assert (dropped <= tol).all(), (dropped / tol).max()
    assert (left_out <= dropped * (1 + 1e-3) + 1e-7 * tol).all(), "more left out than reported"
    # A code step above the truth, but for the 1e-6 that a panel's mass is taken to be uncertain by.
    assert (dropped <= left_out * math.exp(1.01 * STEP) + mass[rows, p.labels] + 2e-6).all()
    assert got.masks[rows, p.labels].all()
    assert got.masks[rows, z.argmax(dim=1)].all()
    assert torch.equal(got.masks.sum(dim=1), got.sizes)
    kept = got.masks.clone()
    kept[rows, p.labels] = False
    lowest = torch.where(kept, z, math.inf).amin(dim=1)
    highest = torch.where(got.masks, -math.inf, z).amax(dim=1)
    rounding = 1e-5 * z[z.isfinite()].abs().max()
    assert (lowest >= highest - STEP - rounding).all()


def check_blocks(p: Problem, got: Got, height: int) -> None:
    """Every window's rows are there, by size, and united block by block."""
    order, columns, counts, _ = got.nuclei
    vocab = p.weight.shape[0]
    start = block = 0
    for length in got.windows:
        window = order[start : start + length]
        assert torch.equal(window.sort().values, torch.arange(start, start + length))
        assert (got.sizes[window].diff() >= 0).all()
        for rows in window.split(height):
            union = got.masks[rows].any(dim=0)
            assert torch.equal(nucleus.column_mask(columns[block : block + 1], vocab)[0], union)
            dense = union.sum() >= nucleus.DENSE_SHARE * vocab
            assert counts[block] == (vocab if dense else union.sum())
            block += 1
        start += length
    assert start == len(order) == len(p.labels)
    assert block == len(columns) == len(counts)


def kinds(tol: float, vocab: int) -> torch.Tensor:
    """(rows, vocab) logits of every kind: each is a row of its own."""
    noise = torch.randn(vocab)
    few = torch.randint(-3, 1, (vocab,)).double()
    peak = torch.zeros(vocab).index_fill_(0, torch.randint(vocab, (1,)), 1.0)
    half = torch.arange(vocab) % 2 == 0
    return torch.stack(
        [
            noise,  # flat
            3 * noise,  # like a language model's
            8 * noise,  # peaked
            40 * noise,
            torch.zeros(vocab),  # constant
            60 * peak,  # one-hot
            12 * peak,
            12 * peak + 0.3 * noise,  # peaked, with a flat tail about as heavy as tol
            few,  # ties everywhere
            5 * few,
            torch.where(half, 0.0, math.log(tol)),  # the lower half weighs nearly tol
            torch.where(half, 0.0, math.log(tol) + 0.01),  # and a little more
            -torch.arange(vocab) / 8.0,  # geometric
            -(torch.arange(vocab).flip(0)) * STEP / 2,  # half a step apart
            200 + 2 * noise,
            -900 + 3 * noise,
        ]
    ).double()


def first_rows(p: Problem, n: int) -> Problem:
    """The first n of the kept rows."""
    p = replace(p, hidden=p.hidden[:n]) if p.rows is None else replace(p, rows=p.rows[:n])
    return replace(p, labels=p.labels[:n], grad=p.grad[:n])


def problem_of(logits: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> Problem:
    """One-hot states that pick the rows of ``logits``, in another order."""
    n, vocab = logits.shape
    order = torch.randperm(n)
    return Problem(
        hidden=torch.eye(n)[order].to(dtype),
        weight=logits.t().to(dtype),
        bias=None if bias is None else bias.to(dtype),
        labels=torch.randint(vocab, (n,)),
        rows=torch.randperm(n),
        grad=torch.ones(n),
    )


@pytest.mark.parametrize(
    ("dtype", "transform", "bias", "gather"),
    [
        (FLOAT32, PLAIN, False, False),
        (BFLOAT16, SCALED, True, True),
        (FLOAT16, CAPPED, True, False),
        (FLOAT32, CAPPED, False, True),
    ],
)
def test_log_probs_and_statistics_equal_float64(
    seed: int, dtype: torch.dtype, transform, bias: bool, gather: bool, monkeypatch
) -> None:
    p = first_rows(make_problem(seed, dtype, transform, bias=bias, gather=gather), 5)
    got = run(p, 2**-6, monkeypatch)
    check_forward(p, got.result, reference(p))
    check_nuclei(p, 2**-6, got)
    check_blocks(p, got, 128)


@pytest.mark.parametrize(
    ("dtype", "exponent", "forbidden"),
    [(FLOAT32, 4, False), (FLOAT16, 7, True), (BFLOAT16, 10, False), (FLOAT32, 14, True)],
)  # fmt: skip
def test_certificate_on_every_kind_of_row(
    seed: int, dtype: torch.dtype, exponent: int, forbidden: bool, monkeypatch
) -> None:
    tol, vocab = 2.0**-exponent, 150 + seed % 200
    bias = None
    if forbidden:
        bias = torch.zeros(vocab).masked_fill_(torch.rand(vocab) < 0.4, -math.inf)
        bias[32:64] = -math.inf  # a whole tile
    p = problem_of(kinds(tol, vocab), dtype, bias)
    if bias is not None:
        allowed = bias.isfinite().nonzero().squeeze(1)
        p = replace(p, labels=allowed[torch.randint(len(allowed), p.labels.shape)])
    got = run(p, tol, monkeypatch)
    check_forward(p, got.result, reference(p))
    check_nuclei(p, tol, got)


@pytest.mark.parametrize("tol", [0.9, 1e-9])
def test_extreme_tolerances(seed: int, tol: float, monkeypatch) -> None:
    """Never empty at the one end; at the other float32 cannot tell the tail from rounding, and keeps it."""
    z = kinds(2**-10, 100)[[0, 2, 4, 5]]
    p = problem_of(z, FLOAT32, None)
    got = run(p, tol, monkeypatch, want_stats=False)
    _, mass = probabilities(p)
    left_out = (mass * ~got.masks).sum(dim=1)
    assert (left_out <= tol * (1 + 1e-3)).all()
    assert (got.sizes >= 1).all()
    assert got.masks[torch.arange(4), mass.argmax(dim=1)].all()


def test_nuclei_are_close_to_the_smallest_possible(seed: int, monkeypatch) -> None:
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]).unsqueeze(1)
    p = problem_of(torch.randn(5, 900).double() * spread, FLOAT32, None)
    got = run(p, 2**-8, monkeypatch)
    check_nuclei(p, 2**-8, got)
    smallest = smallest_sizes(probabilities(p)[1], 2**-8)
    assert (got.sizes - 1 >= smallest - 1).all()  # the label may be the one more
    assert got.sizes.sum() <= 1.1 * smallest.sum()
    assert (got.sizes - 1 <= 1.3 * smallest + 1).all()
    assert got.nuclei.dropped.median() >= 0.85 * 2**-8


def test_rows_do_not_depend_on_their_batch(seed: int, monkeypatch) -> None:
    """Two windows, the first of two chunks; then some of the rows alone."""
    p = make_problem(seed, FLOAT32, SCALED, gather=False, more_rows_than_columns=True)
    p = first_rows(replace(p, hidden=3 * p.hidden), 33)
    monkeypatch.setattr(launcher, "block_rows", lambda device: 32)
    many = run(p, 2**-6, monkeypatch, budget=1)
    assert many.windows == [32, 1]
    check_forward(p, many.result, reference(p))
    check_nuclei(p, 2**-6, many)
    check_blocks(p, many, 32)
    rows = torch.tensor([32, 15, 16, 0])
    few = run(replace(p, rows=rows, labels=p.labels[rows]), 2**-6, monkeypatch)
    for one, other in zip(
        (*many.result, many.nuclei.dropped), (*few.result, few.nuclei.dropped), strict=True
    ):
        torch.testing.assert_close(one[rows], other)
    assert torch.equal(many.masks[rows], few.masks)


def test_bulk_copies_load_what_pointers_load(seed: int, monkeypatch) -> None:
    """Where rows are aligned, tiles come through tensor descriptors, whose edges are zeros."""
    hidden = torch.randn(18, 48).to(BFLOAT16)[1:]
    weight = (torch.randn(71, 48) / 2).to(BFLOAT16)
    p = Problem(hidden, weight, None, torch.randint(71, (17,)), None, torch.ones(17))
    target = tile_configs.target(hidden.device)
    assert launcher.bulk_copies(target, p.hidden, p.weight)
    assert not launcher.bulk_copies(target, p.hidden[:, 1:], p.weight[:, 1:])
    bulk = run(p, 2**-6, monkeypatch)
    monkeypatch.setattr(launcher, "bulk_copies", lambda *_: False)
    pointers = run(p, 2**-6, monkeypatch)
    for one, other in zip(
        (*bulk.result, *bulk.nuclei), (*pointers.result, *pointers.nuclei), strict=True
    ):
        assert torch.equal(one, other)
    check_nuclei(p, 2**-6, bulk)


def test_any_strides(seed: int, monkeypatch) -> None:
    p = first_rows(make_problem(seed, FLOAT32, bias=True), 3)
    want = run(p, 2**-6, monkeypatch)
    (total, width), vocab = p.hidden.shape, p.weight.shape[0]
    hidden = torch.full((width, 2 * total), math.nan)[:, ::2].t()
    weight = torch.full((vocab + 3, 2 * width + 1), math.nan)[3:, 1::2]
    hidden.copy_(p.hidden)
    weight.copy_(p.weight)
    every_other = {
        name: torch.stack([getattr(p, name)] * 2, dim=1).flatten()[::2]
        for name in ("labels", "bias", "rows")
    }
    got = run(replace(p, hidden=hidden, weight=weight, **every_other), 2**-6, monkeypatch)
    for one, other in zip((*got.result, *got.nuclei), (*want.result, *want.nuclei), strict=True):
        assert torch.equal(one, other)


def test_without_statistics_only_log_probs_and_lse_come_back(seed: int, monkeypatch) -> None:
    p = first_rows(make_problem(seed, FLOAT32, bias=False), 2)
    plain, full = run(p, 0.1, monkeypatch, want_stats=False), run(p, 0.1, monkeypatch)
    assert plain.result[2:] == (None,) * 4
    assert all(torch.equal(a, b) for a, b in zip(plain.result[:2], full.result[:2], strict=True))
    assert torch.equal(plain.masks, full.masks)


@pytest.mark.parametrize(("n", "height", "vocab"), [(1, 16, 31), (37, 16, 5000), (32, 16, 4096)])
def test_blocks_are_those_of_plain_tensor_operations(
    seed: int, n: int, height: int, vocab: int
) -> None:
    masks = pack(torch.rand(n, vocab) < torch.rand(n, 1) / 16)
    sizes = torch.randint(0, 9, (n,), dtype=torch.int32)
    got = nucleus_blocks_triton.gather_blocks(masks, sizes, height, vocab)
    want = nucleus.gather_blocks(masks, sizes, height, vocab)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_no_rows() -> None:
    for rows in (None, torch.empty(0, dtype=torch.int64)):
        result, nuclei = launcher.launch_forward(
            torch.zeros(0 if rows is None else 3, 8), torch.zeros(50, 8), None,
            torch.empty(0, dtype=torch.int64), rows, PLAIN, True, 0.01,
            tile_configs.target(torch.device("cpu")), 2**26,
        )  # fmt: skip
        assert [value.shape for value in result] == [(0,)] * 6
        assert [value.shape for value in nuclei] == [(0,), (0, 2), (0,), (0,)]


def test_bad_rows_come_to_an_end_and_harm_no_other(seed: int, monkeypatch) -> None:
    """Labels out of range, some of them within the last tile; NaN; infinity; all tokens but one forbidden."""
    vocab = 71
    logits = 2 * torch.randn(8, vocab).double()
    p = problem_of(logits, FLOAT32, None)
    want = run(p, 2**-6, monkeypatch)
    hidden, labels, rows = p.hidden.clone(), p.labels.clone(), p.rows
    hidden[rows[0], 0], hidden[rows[1], 0] = math.nan, math.inf
    labels[2:5] = torch.tensor([-1, vocab, 2**40])
    got = run(replace(p, hidden=hidden, labels=labels), 2**-6, monkeypatch)
    assert got.result.logps.isnan().tolist() == [True] * 5 + [False] * 3
    assert got.nuclei.dropped.isnan().tolist() == [True] * 2 + [False] * 6
    assert torch.equal(got.masks[:2], torch.nn.functional.one_hot(labels[:2], vocab).bool())
    for one, other in zip((*got.result, got.masks), (*want.result, want.masks), strict=True):
        assert torch.equal(one[5:], other[5:])
    assert torch.equal(got.nuclei.dropped[5:], want.nuclei.dropped[5:])
    assert (got.masks[2:5] <= want.masks[2:5]).all()  # without the label that was there

    only = torch.full((vocab,), -math.inf)
    only[40] = 0.0
    alone = run(replace(p, bias=only, labels=torch.full_like(labels, 40)), 2**-6, monkeypatch)
    assert torch.equal(alone.result.logps, torch.zeros(8))
    assert torch.equal(alone.masks.nonzero()[:, 1], torch.full((8,), 40))


# Planted faults: the comparisons above must notice each of them.


class _Spoiled:
    """A kernel after which some of its outputs are changed."""

    def __init__(self, kernel, spoil) -> None:
        self.kernel, self.spoil = kernel, spoil

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            self.spoil(dict(zip(self.kernel.arg_names, args, strict=False)))

        return launch


FAULTS = {
    "codes one step down": ("_codes_kernel", _Spoiled, lambda a: a["codes"].add_(2)),
    "codes of the next row": (
        "_codes_kernel", _Spoiled, lambda a: a["codes"].copy_(a["codes"].roll(1, dims=0)),
    ),
    "a panel's mass lost": ("_codes_kernel", _Spoiled, lambda a: a["table"][1, :, 2].mul_(0.5)),
    "the unread panels forgotten": ("_rows_kernel", _Spoiled, lambda a: a["bounds"][2].zero_()),
    "a panel not listed": ("_rows_kernel", _Spoiled, lambda a: a["counts"].sub_(1)),
    "too high a tolerance": ("_nuclei_kernel", _Altered, lambda a: {"tol": 1.2 * a["tol"]}),
    "label's column left out": ("_nuclei_kernel", _Altered, lambda a: {"labels": a["labels"] * 0 - 1}),
    "a column left out": (
        "_nuclei_kernel", _Spoiled, lambda a: a["masks"].bitwise_and_(~(a["masks"] & -a["masks"])),
    ),
    "a row left out of its block": ("_unite_kernel", _Altered, lambda a: {"n": a["n"] - 1}),
    "sizes unsorted": ("_nuclei_kernel", _Spoiled, lambda a: a["sizes"].copy_(a["sizes"].flip(0))),
}  # fmt: skip


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    """Rows whose flat tail weighs half of tol and lies in panels that are never read; and plainer ones."""
    tol, vocab = 2.0**-5, 300
    logits = torch.randn(4, vocab).double()
    logits[:2, 32:] = math.log(0.5 * tol * 32 * math.exp(0.5) / (vocab - 32))
    p = problem_of(logits, FLOAT32, None)
    p = replace(p, labels=probabilities(p)[1].argmin(dim=1))
    if fault is not None:
        name, change, how = FAULTS[fault]
        module = launcher if hasattr(launcher, name) else nucleus_blocks_triton
        monkeypatch.setattr(module, name, change(getattr(module, name), how))

    def check() -> None:
        got = run(p, tol, monkeypatch)
        check_forward(p, got.result, reference(p))
        check_nuclei(p, tol, got)
        check_blocks(p, got, 128)

    if fault is None:
        return check()
    with pytest.raises(AssertionError):
        check()
