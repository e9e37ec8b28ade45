"""The certified backward's Triton kernels against float64, on CPU tensors.

Not collected by itself: test_certified_backward_triton.py runs it in a process of its own, with
TRITON_INTERPRET=1 set before Triton is loaded. Units are 16 rows there and tiles 32 columns.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from bit_masks import pack
from interpreted_linear_logprobs import (
    BFLOAT16,
    CAPPED,
    DTYPES,
    FLOAT16,
    FLOAT32,
    PLAIN,
    SCALED,
    Problem,
    _Altered,
    reference,
)

from fastpo.kernels import certified_backward_triton as launcher
from fastpo.kernels import (
    certified_triton,
    linear_logprobs_backward_triton,
    nucleus,
    nucleus_tiles_triton,
    tile_configs,
)
from fastpo.kernels.logit_transform import LogitTransform

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(large) = inf

UNIT, TILE = 16, 32
SLICES = 2500  # bytes that make several slices, and for n > V several batches


@dataclass(frozen=True)
class Blocks:
    """Rows of ``problem`` in blocks of ``height``, and the columns that each block needs."""

    problem: Problem
    height: int
    needed: torch.Tensor  # (B, V) bool; all of a dense block
    lse: torch.Tensor  # (n,)

    def of_rows(self) -> torch.Tensor:
        """(n, V) bool."""
        return self.needed.repeat_interleave(self.height, dim=0)[: len(self.problem.labels)]

    def counts(self) -> torch.Tensor:
        return self.needed.sum(dim=1, dtype=torch.int32)

    def masks(self) -> torch.Tensor:
        """A dense block's is not read: it says nothing."""
        dense = self.needed.all(dim=1, keepdim=True)
        return torch.where(dense, 0x55555555, pack(self.needed))

    def backward(
        self,
        hidden: bool = True,
        weight: bool = True,
        bias: bool = True,
        *,
        low_memory: bool = False,
        budget: int = 2**26,
        last_columns: int | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        p = self.problem
        return launcher.launch_backward(
            p.grad, p.hidden, p.weight, p.bias, p.labels, p.rows, self.lse, self.masks(), self.counts(),
            self.height, p.transform, hidden, weight, bias and p.bias is not None, low_memory,
            tile_configs.target(p.hidden.device), budget, last_columns,
        )  # fmt: skip


def dlogits(b: Blocks) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The formula of the contract in float64: dz and d loss / d raw product, both (n, V); the largest |z|."""
    p = b.problem
    raw = torch.nn.functional.linear(
        p.hidden[p.rows].double(), p.weight.double(), None if p.bias is None else p.bias.double()
    )
    z = p.transform.apply_(raw.clone())
    columns = torch.arange(p.weight.shape[0])
    dz = (columns == p.labels[:, None]).double() - (z - b.lse.double()[:, None]).exp()
    dz = torch.where(b.of_rows() & (p.grad != 0)[:, None], p.grad.double()[:, None] * dz, 0.0)
    return dz, dz * p.transform.derivative(z), z[z.isfinite()].abs().max().item()


def gradients(b: Blocks, du: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dH (N, H), dW (V, H), db (V,)."""
    p = b.problem
    kept = torch.where((p.grad != 0)[:, None], p.hidden[p.rows].double(), 0.0)
    d_hidden = torch.zeros(p.hidden.shape, dtype=torch.float64)
    d_hidden[p.rows] = du @ p.weight.double()
    return d_hidden, du.t() @ kept, du.sum(dim=0)


def check(b: Blocks, got: tuple[torch.Tensor | None, ...], floor: float = 0.0) -> None:
    """Relative error in the norm: 2e-6·max(1, max|z|) for float32, else 4e-3; ``floor`` if all cancel.

    db in 16 bits: every term was rounded once, and so was the sum.
    """
    p = b.problem
    _, du, largest = dlogits(b)
    want, terms = gradients(b, du), du.abs().sum(dim=0)
    wide = p.hidden.dtype == FLOAT32
    relative = 2e-6 * max(1.0, largest) if wide else 4e-3
    inputs = (p.hidden, p.weight, p.bias)
    for name, like, value, expected in zip(("dH", "dW", "db"), inputs, got, want, strict=True):
        if value is None:
            continue
        assert value.dtype == like.dtype
        assert value.shape == like.shape
        error = value.double() - expected
        if name == "db" and not wide:
            info = torch.finfo(value.dtype)
            room = 2**-8 * (1.01 * terms + expected.abs()) + floor
            assert (error.abs() <= room + info.smallest_normal * info.eps).all()
        else:
            bound = relative * expected.norm().item() + floor
            assert error.norm().item() <= bound, f"{name}: {error.norm()} of {expected.norm()}"
        # What no block needs is nothing, not a small number.
        untouched = torch.ones(len(value), dtype=torch.bool)
        untouched[p.rows[p.grad != 0] if name == "dH" else b.needed.any(dim=0)] = False
        assert not value[untouched].any()


def draw_needed(blocks: int, vocab: int, labels: torch.Tensor, height: int) -> torch.Tensor:
    """Unions of every kind: nearly nested ones, a stranger, single words, tile and word edges, a dense one."""
    places = torch.rand(vocab)  # lower places are needed by more blocks
    needed = torch.zeros(blocks, vocab, dtype=torch.bool)
    for block in range(blocks):
        kind = block % 5
        if kind == 0:
            needed[block] = places < 0.1
        elif kind == 1:
            needed[block] = places < torch.rand(()) * 0.6
        elif kind == 2:
            needed[block] = torch.rand(vocab) < 0.1
        elif kind == 3:
            needed[block] = True
        else:
            needed[block, [0, 31, 32, vocab - 1]] = True
    for place, label in enumerate(labels.tolist()):
        needed[place // height, label] = True
    return needed


def make_blocks(
    seed: int,
    dtype: torch.dtype,
    transform: LogitTransform = PLAIN,
    *,
    height: int = 16,
    tall: bool = False,
    bias: bool = True,
) -> Blocks:
    """Odd sizes, three to five units and two to four tiles; rows without a coefficient and rows not listed."""
    draw = random.Random(seed)
    n, vocab = (
        draw.choice([67, 71, 73, 79] if tall else [37, 41, 43, 47]),
        draw.choice([41, 53, 61]),
    )
    vocab, width = vocab if tall else 2 * vocab - 1, draw.choice([5, 17, 19, 31])
    labels = torch.randint(vocab, (n,))
    labels[:2] = torch.tensor([0, vocab - 1])
    p = Problem(
        hidden=torch.randn(n + 3, width).to(dtype),
        weight=(torch.randn(vocab, width) * 2 / math.sqrt(width)).to(dtype),
        bias=torch.randn(vocab).to(dtype) if bias else None,
        labels=labels,
        rows=torch.randperm(n + 3)[:n],
        grad=torch.randn(n) * (torch.rand(n) > 0.2),
        transform=transform,
    )
    needed = draw_needed(-(-n // height), vocab, labels, height)
    return Blocks(p, height, needed, reference(p).lse.float())


@pytest.mark.parametrize("tall", [False, True], ids=["n ≤ V", "n > V"])
@pytest.mark.parametrize(
    ("dtype", "low_memory"), [*((dtype, False) for dtype in DTYPES), (BFLOAT16, True)]
)
def test_gradients_equal_float64(
    seed: int, dtype: torch.dtype, tall: bool, low_memory: bool
) -> None:
    b = make_blocks(seed, dtype, CAPPED if tall == low_memory else SCALED, tall=tall)
    check(b, b.backward(low_memory=low_memory, budget=SLICES))


@pytest.mark.parametrize("tall", [False, True], ids=["n ≤ V", "n > V"])
@pytest.mark.parametrize("budget", [SLICES, 2**26], ids=["slices", "all at once"])
@pytest.mark.parametrize(("dtype", "low_memory"), [(FLOAT32, False), (BFLOAT16, True)])
def test_gradient_of_the_last_columns(
    seed: int, dtype: torch.dtype, low_memory: bool, budget: int, tall: bool
) -> None:
    b = make_blocks(seed, dtype, CAPPED, tall=tall)
    options = {"low_memory": low_memory, "budget": budget}
    got, whole = b.backward(**options, last_columns=3), b.backward(**options)
    assert torch.equal(got[0], whole[0])
    assert torch.equal(got[2], whole[2])
    assert got[1].shape == (len(b.problem.weight), 3)
    close = (
        1e-5 if dtype == FLOAT32 else 2**-8
    )  # a product of fewer columns may sum up in another order
    torch.testing.assert_close(got[1], whole[1][:, -3:], rtol=close, atol=1e-5)


@pytest.mark.parametrize("tall", [False, True], ids=["n ≤ V", "n > V"])
def test_all_at_once(seed: int, tall: bool) -> None:
    b = make_blocks(seed, BFLOAT16, tall=tall)
    check(b, b.backward())


def test_small_budget_means_several_slices_and_batches(seed: int, monkeypatch) -> None:
    """What the tests above rely on."""
    parts = []
    real = launcher.plan_sweep

    def recorded(outer: tuple[int, int], inner: tuple[int, int], *args) -> tuple[int, int]:
        lengths = real(outer, inner, *args)
        parts.append((-(-outer[0] // lengths[0]), -(-inner[0] // lengths[1])))
        return 0, 0  # of no use: the sweep ends here

    monkeypatch.setattr(launcher, "plan_sweep", recorded)
    for dtype, tall in itertools.product((FLOAT32, BFLOAT16), (False, True)):
        with pytest.raises(ValueError, match="must not be zero"):
            make_blocks(seed, dtype, tall=tall).backward(budget=SLICES)
        with pytest.raises(ValueError, match="must not be zero"):
            make_blocks(seed, dtype, tall=tall).backward(hidden=False, budget=SLICES)
        (batches, slices), frozen = parts[-2:]
        assert (batches > 1) == tall
        assert slices > 1
        assert min(frozen) > 1


@pytest.mark.parametrize("height", [12, 40])
def test_blocks_of_any_height(seed: int, height: int) -> None:
    """Lower than a unit, and several units long, both across the edges of units."""
    b = make_blocks(seed, FLOAT32, height=height)
    check(b, b.backward(budget=SLICES))


@pytest.mark.parametrize("need", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(seed: int, need: str) -> None:
    b = make_blocks(seed, FLOAT32, CAPPED)
    got = b.backward(**{name: name == need for name in ("hidden", "weight", "bias")}, budget=SLICES)
    assert [value is not None for value in got] == [
        name == need for name in ("hidden", "weight", "bias")
    ]
    check(b, got)
    assert b.backward(False, False, False) == (None, None, None)


def test_no_bias(seed: int) -> None:
    b = make_blocks(seed, FLOAT32, bias=False)
    got = b.backward()
    assert got[2] is None
    check(b, got)


def test_all_columns_are_the_exact_backward(seed: int) -> None:
    b = make_blocks(seed, FLOAT32, SCALED)
    b = replace(b, needed=torch.ones_like(b.needed))
    p = b.problem
    exact = linear_logprobs_backward_triton.launch_backward(
        p.grad, p.hidden, p.weight, p.bias, p.labels, p.rows, b.lse, p.transform, True, True, True,
        tile_configs.target(p.hidden.device), 2**26,
    )  # fmt: skip
    for got, want in zip(b.backward(), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=4e-6 * want.norm().item())


def test_results_repeat_to_the_bit(seed: int) -> None:
    b = make_blocks(seed, BFLOAT16, tall=True)
    for once, again in zip(b.backward(budget=SLICES), b.backward(budget=SLICES), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_coefficient_are_not_touched(seed: int, bad: float) -> None:
    """Single rows, a whole block, and rows of hidden that are not listed, with numbers that would spread."""
    b = make_blocks(seed, FLOAT32)
    p = b.problem
    p.grad[16:32] = 0.0
    idle = p.grad == 0
    b.lse[idle] = bad
    unlisted = torch.ones(len(p.hidden), dtype=torch.bool)
    unlisted[p.rows[~idle]] = False
    p.hidden[unlisted] = bad
    check(b, b.backward(budget=SLICES))


def test_no_coefficient_at_all(seed: int) -> None:
    b = make_blocks(seed, BFLOAT16)
    b.problem.grad.zero_()
    assert not any(gradient.any() for gradient in b.backward(budget=SLICES))


def test_no_rows(seed: int) -> None:
    b = make_blocks(seed, FLOAT32)
    p = b.problem
    empty = replace(p, labels=p.labels[:0], rows=p.rows[:0], grad=p.grad[:0])
    b = Blocks(empty, 16, b.needed[:1], b.lse[:0])
    for gradient, like in zip(b.backward(), (p.hidden, p.weight, p.bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_labels_outside_the_union_or_the_vocabulary(seed: int) -> None:
    b = make_blocks(seed, FLOAT32)
    p = b.problem
    p.grad[:4] = 1.0
    b.needed[0, p.labels[0]] = False
    p.labels[[1, 2, 3]] = torch.tensor([-1, len(p.weight), 2**40])
    check(b, b.backward(budget=SLICES))


def test_forbidden_tokens(seed: int) -> None:
    """A bias of −∞, also for columns that a union has."""
    b = make_blocks(seed, BFLOAT16)
    p = b.problem
    bias = p.bias.clone()
    forbidden = torch.rand(len(bias)) < 0.5
    forbidden[p.labels] = False
    bias[forbidden] = -math.inf
    p = replace(p, bias=bias)
    b = replace(b, problem=p, lse=reference(p).lse.float())
    got = b.backward(budget=SLICES)
    assert not got[2][forbidden].any()
    check(b, got)


def test_any_strides(seed: int) -> None:
    b = make_blocks(seed, FLOAT32)
    p = b.problem
    (total, width), vocab = p.hidden.shape, len(p.weight)
    hidden = torch.full((width, 2 * total), math.nan)[:, ::2].t()
    weight = torch.full((vocab + 3, 2 * width + 1), math.nan)[3:, 1::2]
    hidden.copy_(p.hidden)
    weight.copy_(p.weight)
    every_other = {
        name: torch.stack([getattr(p, name)] * 2, dim=1).flatten()[::2]
        for name in ("labels", "bias", "rows")
    }
    grad = torch.tensor(0.7).expand(len(p.grad))  # as the gradient of a sum comes
    p = replace(p, hidden=hidden, weight=weight, grad=grad, **every_other)
    b = replace(b, problem=p)
    check(b, b.backward(budget=SLICES))


@pytest.mark.parametrize(
    ("tall", "tiles"),
    [(False, ((16, 16, 16), (64, 32, 32))), (True, ((64, 64, 16), (16, 32, 32)))],
    ids=["n ≤ V", "n > V"],
)
def test_logits_and_products_may_have_different_tiles(
    seed: int, tall: bool, tiles: tuple, monkeypatch
) -> None:
    logits, product = (tile_configs.TileConfig(*tile, 1, 1) for tile in tiles)
    choose = {"pieces": logits, "matmul": product}
    monkeypatch.setattr(launcher, "tile_config", lambda use, *_: choose[use])
    b = make_blocks(seed, FLOAT32, tall=tall)
    check(b, b.backward(budget=4 * SLICES))


@pytest.mark.parametrize("coefficient", [1e-9, 1e6])
def test_float16_coefficients_of_any_size(seed: int, coefficient: float) -> None:
    """dz alone would underflow below 6e-8 or overflow above 65504; the gradient here does not."""
    b = make_blocks(seed, FLOAT16, bias=False)
    p = b.problem
    balance = max(min(1 / coefficient, 1e3), 1e-3)  # logits stay; dH gets the factor of weight
    p = replace(
        p,
        hidden=(p.hidden.double() / balance).half(),
        weight=(p.weight.double() * balance).half(),
        grad=p.grad * coefficient,
    )
    b = replace(b, problem=p, lse=reference(p).lse.float())
    check(b, b.backward(weight=False, budget=SLICES), floor=3e-8 * math.sqrt(p.hidden.numel()))


@pytest.mark.parametrize("height", [16, 20])
def test_pieces_are_what_the_unions_need_and_no_more(seed: int, height: int) -> None:
    b = make_blocks(seed, FLOAT32, height=height)
    p = b.problem
    p.grad[height : 2 * height] = 0.0
    n, vocab = len(p.labels), len(p.weight)
    t = nucleus_tiles_triton.arrange(
        p.grad, b.lse, p.labels, p.rows, b.masks(), b.counts(), vocab, height, UNIT, TILE
    )
    # Every row with a coefficient once, without gaps, blocks from large to small.
    live = int((p.grad != 0).sum())
    assert (t.source[live:] == -1).all()
    assert not t.grad[live:].any()
    place_of = {row: place for place, row in enumerate(p.rows.tolist())}
    places = torch.tensor([place_of[row] for row in t.source[:live].tolist()])
    assert torch.equal(places.sort().values, torch.arange(n)[p.grad != 0])
    for name in ("grad", "lse", "labels"):
        given = b.lse if name == "lse" else getattr(p, name)
        assert torch.equal(getattr(t, name)[:live], given[places].to(getattr(t, name).dtype))
    assert torch.equal(t.ranks[t.blocks[:live].long()], places // height)
    sizes = b.needed.sum(dim=1)[places // height]
    assert (sizes.diff() <= 0).all()
    # Every column once; those that the smallest block needs come first.
    assert torch.equal(t.columns.sort().values[-vocab:].long(), torch.arange(vocab))
    assert (t.columns == -1).sum() == len(t.columns) - vocab
    needed = torch.zeros(len(t.source), len(t.columns), dtype=torch.bool)
    needed[:live, :vocab] = b.of_rows()[places][:, t.columns[:vocab].long()]
    smallest = needed[live - 1, :vocab]
    assert smallest[: int(smallest.sum())].all()
    # A piece is what holds something needed, and the lists name all pieces in order.
    pieces = needed.view(-1, UNIT, len(t.columns) // TILE, TILE).any(dim=3).any(dim=1)
    assert torch.equal(t.flags.bool(), pieces)
    assert not pieces.all()
    for lists, flags in ((t.of_unit, pieces), (t.of_tile, pieces.t())):
        before = torch.nn.functional.pad(flags.int().cumsum(dim=1), (1, 0))
        assert torch.equal(lists.starts, before.int())
        for entries, row in zip(lists.entries, flags, strict=True):
            assert entries[: int(row.sum())].tolist() == row.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_forward_and_backward_together(seed: int, dtype: torch.dtype, monkeypatch) -> None:
    """The unions that the forward chose: their gradients, and what they leave out of each row."""
    monkeypatch.setitem(nucleus.BLOCK_ROWS, "cpu", 16)
    tol = 2**-6
    p = make_blocks(seed, dtype, SCALED if dtype == FLOAT32 else PLAIN).problem
    p = replace(p, weight=p.weight * 3)
    result, nuclei = certified_triton.forward(
        p.hidden, p.weight, p.bias, p.labels, p.rows, p.transform, False, tol
    )
    order, vocab = nuclei.order, len(p.weight)
    p = replace(p, labels=p.labels[order], rows=p.rows[order], grad=p.grad[order])
    b = Blocks(
        p,
        16,
        nucleus.column_mask(nuclei.columns, vocab) | (nuclei.counts == vocab)[:, None],
        result.lse[order],
    )
    assert not b.needed.all()
    check(
        b,
        certified_triton.backward(
            p.grad, p.hidden, p.weight, p.bias, p.labels, p.rows, b.lse, nuclei.columns, nuclei.counts,
            p.transform, True, True, True, False,
        ),
    )  # fmt: skip
    all_columns = replace(b, needed=torch.ones_like(b.needed))
    left_out = (dlogits(all_columns)[0] - dlogits(b)[0]).abs().sum(dim=1)
    assert (left_out <= tol * (1 + 1e-3) * p.grad.abs()).all()
    assert left_out.any()


# Planted faults: the comparison above must notice each of them.


def without_lowest_bits(a: dict) -> dict:
    return {"masks": a["masks"] & ~1}  # column 32 among them, the label of a row


DZ_FAULTS = {
    "a column left out of the unions": without_lowest_bits,
    "rows in the next block": lambda a: {
        "blocks": torch.where(a["blocks"] >= 0, (a["blocks"] - 1).clamp(min=0), -1)
    },
    "lse of the next row": lambda a: {"lse": a["lse"].roll(1)},
    "zero coefficients": lambda a: {"grad": a["grad"] * 0},
    "shifted labels": lambda a: {"labels": a["labels"] - 1},
    "ignored bias": lambda a: {"bias": a["bias"] * 0},
    "next row of hidden": lambda a: {
        "source": torch.where(a["source"] >= 0, a["source"].roll(1).clamp(min=0), -1)
    },
    "pieces not made": lambda a: {"flags": torch.zeros_like(a["flags"])},
}
PRODUCT_FAULTS = {
    "wrong scale": lambda a: {"unscale": a["unscale"] * 0.5},
    "last piece of each unit missing": lambda a: {
        "unit_starts": (a["unit_starts"] - 1).clamp(min=0)
    },
    "last piece of each tile missing": lambda a: {
        "tile_starts": (a["tile_starts"] - 1).clamp(min=0)
    },
    "pieces of the next unit": lambda a: {"tile_entries": (a["tile_entries"] - 1).clamp(min=0)},
    "columns backwards": lambda a: {"columns": _backwards(a["columns"])},
}


def _backwards(columns: torch.Tensor) -> torch.Tensor:
    known = columns >= 0  # padding stays at the end
    return torch.cat([columns[known].flip(0), columns[~known]])


@pytest.mark.parametrize("fault", [None, *DZ_FAULTS, *PRODUCT_FAULTS])
def test_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    b = make_blocks(seed, FLOAT32, SCALED)
    b.problem.labels[0] = 32  # a word's lowest bit, and no neighbour's label
    b.problem.grad[0] = 1.0
    b.needed[0, 32] = True
    for name, faults in (("_dz_pieces_kernel", DZ_FAULTS), ("_products_kernel", PRODUCT_FAULTS)):
        kernel = _Altered(getattr(launcher, name), faults.get(fault, lambda a: {}))
        monkeypatch.setattr(launcher, name, kernel)
    # dz outside the pieces is not written: what a fault leaves out is 0 there, not what the memory held.
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *s, **o: real(t, *s, **o).zero_())
    if fault is None:
        return check(b, b.backward())
    with pytest.raises(AssertionError):
        check(b, b.backward())
