"""The certified Triton kernels under noise against float64, on CPU tensors.

Not collected by itself: test_certified_noisy_triton.py runs it in a process of its own, with TRITON_INTERPRET=1
set before Triton is loaded. Tiles and units are 16 rows × 32 columns there, panels 16 columns.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from bit_masks import pack
from interpreted_certified_backward import draw_needed
from interpreted_certified_forward import Got, _Spoiled, check_blocks, check_nuclei
from interpreted_linear_logprobs import BFLOAT16, CAPPED, FLOAT16, FLOAT32, PLAIN, SCALED, _Altered
from interpreted_linear_logprobs import Problem as PlainProblem
from interpreted_noisy_linear_logprobs import (
    ALL,
    GENERATOR,
    Problem,
    Reference,
    check_forward,
    check_gradients,
    inputs_of,
    largest_noise_fits,
    make_problem,
    reference,
)

from fastpo.benchmarks import noise_checks
from fastpo.kernels import (
    certified_forward_triton,
    certified_noisy_triton,
    noisy_linear_logprobs_triton,
    nucleus,
    tile_configs,
)
from fastpo.kernels import certified_noisy_backward_triton as backward_launcher
from fastpo.kernels import certified_noisy_forward_triton as forward_launcher
from fastpo.kernels.logit_transform import LogitTransform
from fastpo.kernels.noise import Needed, NoisyGradients
from fastpo.kernels.philox_torch import normals

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of exp(large) = inf

HEIGHT = 16
SLICES = 2500  # bytes with which a backward has a slice for every tile of columns


def peaked(p: Problem) -> Problem:
    """Most of a row's probability in few columns."""
    return replace(p, weight=3 * p.weight)


def logits(p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """z̃, ε, x and dz/du in float64: (n, V), (n, V), (n, R), (n, V)."""
    hidden, weight, bias, u, a, s = (
        None if t is None else t.double() for t in inputs_of(p).values()
    )
    kept = hidden[p.rows]
    z = p.transform.apply_(torch.nn.functional.linear(kept, weight, bias))
    slope = p.transform.derivative(z)
    x = kept if a is None else kept @ a.t()
    epsilon = normals(p.noise.seed, p.noise.tokens[:, None], torch.arange(len(weight))).double()
    z = z + torch.nn.functional.linear(x, u, s) * epsilon
    return z, epsilon, x, torch.as_tensor(slope, dtype=torch.float64).expand_as(z)


def as_plain(p: Problem) -> PlainProblem:
    """The plain problem that has the noisy logits: one-hot states pick them."""
    z = logits(p)[0]
    n = len(z)
    return PlainProblem(torch.eye(n).double(), z.t(), None, p.labels, torch.arange(n), p.grad)


def run(p: Problem, tol: float, monkeypatch, want_clean: bool = True, budget: int = 2**26) -> Got:
    windows: list[tuple[torch.Tensor, torch.Tensor]] = []
    gather_blocks = certified_forward_triton.gather_blocks

    def recorded(masks: torch.Tensor, sizes: torch.Tensor, height: int, vocab: int):
        windows.append((masks.clone(), sizes.clone()))
        return gather_blocks(masks, sizes, height, vocab)

    with monkeypatch.context() as patch:
        patch.setattr(certified_forward_triton, "gather_blocks", recorded)
        result, nuclei = forward_launcher.launch_forward(
            p.hidden, p.weight, p.bias, p.labels, p.rows, p.transform, p.noise, want_clean, tol,
            tile_configs.target(p.hidden.device), budget,
        )  # fmt: skip
    vocab = p.weight.shape[0]
    return Got(
        result,
        nuclei,
        nucleus.column_mask(torch.cat([masks for masks, _ in windows]), vocab),
        torch.cat([sizes for _, sizes in windows]),
        [len(sizes) for _, sizes in windows],
    )


def check(p: Problem, tol: float, got: Got, height: int = 64) -> None:
    check_forward(p, got.result, reference(p))
    check_nuclei(as_plain(p), tol, got)
    check_blocks(as_plain(p), got, height)


@pytest.mark.parametrize(
    ("dtype", "generator", "rank", "transform", "bulk"),
    [
        (FLOAT32, FLOAT32, None, CAPPED, False),
        (FLOAT32, FLOAT32, 16, PLAIN, True),
        (FLOAT32, FLOAT32, 5, PLAIN, True),  # a generator that bulk copies cannot take
        (BFLOAT16, FLOAT32, None, SCALED, True),
        (FLOAT16, FLOAT16, 5, CAPPED, False),
    ],
)
def test_log_probs_and_nuclei_equal_float64(
    seed: int,
    dtype,
    generator,
    rank: int | None,
    transform: LogitTransform,
    bulk: bool,
    monkeypatch,
) -> None:
    monkeypatch.setattr(forward_launcher, "MERGE_PANELS", 2)  # several steps through the table
    p = peaked(make_problem(seed, dtype, generator, rank, transform, bulk=bulk, n=5))
    got = run(p, 2**-6, monkeypatch)
    check(p, 2**-6, got)
    assert not got.masks.all()


def test_windows_chunks_and_slices_of_the_generator(seed: int, monkeypatch) -> None:
    """Two windows, the first of two chunks, and three slices."""
    p = peaked(make_problem(seed, BFLOAT16, rank=3, n=33, vocab=67))
    monkeypatch.setattr(certified_forward_triton, "block_rows", lambda device: 32)
    monkeypatch.setattr(forward_launcher, "block_rows", lambda device: 32)
    plans = []
    plan = forward_launcher.plan_columns
    monkeypatch.setattr(
        forward_launcher, "plan_columns", lambda *a: (plans.append(plan(*a)), plans[-1])[1]
    )
    got = run(p, 2**-6, monkeypatch, budget=1)
    assert got.windows == [32, 1]
    assert len(plans[0][0]) == 3
    check(p, 2**-6, got, 32)


def test_no_rows_and_bad_labels(seed: int, monkeypatch) -> None:
    p = make_problem(seed, FLOAT32, n=7, vocab=37)
    labels = p.labels.clone()
    labels[[0, 3]] = torch.tensor([-1, 2**40])
    got = run(replace(p, labels=labels), 2**-6, monkeypatch)
    for values in (got.result.logps, got.result.clean_logps):
        assert values.isnan().nonzero().squeeze(1).tolist() == [0, 3]
    nothing = torch.empty(0, dtype=torch.int64)
    result, nuclei = forward_launcher.launch_forward(
        p.hidden, p.weight, p.bias, nothing, nothing, PLAIN, p.noise._replace(tokens=nothing), True, 0.01,
        tile_configs.target(torch.device("cpu")), 2**26,
    )  # fmt: skip
    assert [value.shape for value in result] == [(0,)] * 3
    assert [value.shape for value in nuclei] == [(0,), (0, 2), (0,), (0,)]


# The backward, on unions of any kind.


def unions(p: Problem) -> torch.Tensor:
    """(B, V) bool: the columns that each block of ``HEIGHT`` rows needs."""
    return draw_needed(-(-len(p.labels) // HEIGHT), len(p.weight), p.labels, HEIGHT)


def cut_reference(p: Problem, needed: torch.Tensor, lse: torch.Tensor) -> Reference:
    """The formulas of the contract in float64: dz̃ is 0 outside the columns that a block needs."""
    z, epsilon, x, slope = logits(p)
    columns = torch.arange(z.shape[1])
    d = (columns == p.labels[:, None]).double() - (z - lse.double()[:, None]).exp()
    of_rows = needed.repeat_interleave(HEIGHT, dim=0)[: len(d)] & (p.grad != 0)[:, None]
    d = torch.where(of_rows, p.grad.double()[:, None] * d, 0.0)
    d_sigma, dz = d * epsilon, d * slope
    hidden, a = p.hidden.double(), p.noise.projection
    kept, dx = hidden[p.rows], d_sigma @ p.noise.weight.double()
    dh = torch.zeros_like(hidden)
    dh[p.rows] = dz @ p.weight.double() + (dx if a is None else dx @ a.double())
    gradients = NoisyGradients(
        dh, dz.t() @ kept, dz.sum(dim=0), d_sigma.t() @ x,
        None if a is None else dx.t() @ kept, d_sigma.sum(dim=0),
    )  # fmt: skip
    return replace(reference(p), gradients=gradients, dz=dz, d_sigma=d_sigma)


def backward(
    p: Problem, needed: torch.Tensor, lse: torch.Tensor, wanted: Needed = ALL, budget: int = SLICES
) -> NoisyGradients:
    dense = needed.all(dim=1, keepdim=True)
    masks = torch.where(dense, 0x55555555, pack(needed))  # a dense block's is not read
    return backward_launcher.launch_backward(
        p.grad, p.hidden, p.weight, p.bias, p.labels, p.rows, lse, masks, needed.sum(dim=1, dtype=torch.int32),
        HEIGHT, p.transform, p.noise, wanted, tile_configs.target(p.hidden.device), budget,
    )  # fmt: skip


def check_backward(
    p: Problem, needed: torch.Tensor, wanted: Needed = ALL, budget: int = SLICES
) -> None:
    lse = reference(p).lse.float()
    got = backward(p, needed, lse, wanted, budget)
    check_gradients(p, got, cut_reference(p, needed, lse), wanted)
    for name in ("weight", "noise_weight", "noise_bias"):  # what no block needs is nothing
        gradient = getattr(got, name)
        assert gradient is None or not gradient[~needed.any(dim=0)].any()


@pytest.mark.parametrize(
    ("dtype", "generator", "rank", "transform"),
    [
        (FLOAT32, FLOAT32, None, CAPPED),
        (FLOAT32, FLOAT32, 3, SCALED),
        (BFLOAT16, FLOAT32, None, SCALED),
        (BFLOAT16, FLOAT32, 16, CAPPED),
        (BFLOAT16, BFLOAT16, None, PLAIN),
    ],
)
def test_gradients_equal_float64(
    seed: int, dtype, generator, rank: int | None, transform: LogitTransform
) -> None:
    """Four blocks, the last of which needs all columns."""
    p = make_problem(seed, dtype, generator, rank, transform, n=53)
    p.grad[torch.rand(53) < 0.2] = 0.0
    needed = unions(p)
    assert needed[3].all()
    check_backward(p, needed)


def test_float16_at_the_largest_noise(seed: int) -> None:
    largest_noise_fits(
        make_problem(seed, FLOAT16, n=3),
        lambda p: backward(p, all_columns(p), reference(p).lse.float()),
    )


def all_columns(p: Problem) -> torch.Tensor:
    return torch.ones(1, len(p.weight), dtype=torch.bool)


def test_one_slice_and_the_generator_alone(seed: int, monkeypatch) -> None:
    """Where the model is frozen dz is not written, and dU is the only product of a generator of full rank."""
    p = make_problem(seed, BFLOAT16, biases=False, n=21)
    needed, made = unions(p), []
    real = backward_launcher.add_products
    monkeypatch.setattr(backward_launcher, "add_products", lambda *a: (made.append(a[2]), real(*a)))
    check_backward(p, needed, GENERATOR._replace(noise_bias=False), budget=2**26)
    assert len(made) == 1
    plans = []
    plan = backward_launcher.plan_columns
    monkeypatch.setattr(
        backward_launcher, "plan_columns", lambda *a: (plans.append(plan(*a)), plans[-1])[1]
    )
    check_backward(p, needed, GENERATOR._replace(noise_bias=False))
    assert len(plans[0][0]) == 3


@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "noise_projection", "noise_bias"])
def test_one_gradient_alone(seed: int, name: str) -> None:
    p = make_problem(seed, FLOAT32, rank=4, transform=CAPPED, n=19, vocab=37)
    check_backward(p, unions(p), Needed(*(field == name for field in Needed._fields)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_without_a_coefficient_are_not_touched(seed: int, bad: float) -> None:
    p = make_problem(seed, FLOAT32, n=37, vocab=67)
    p.grad[16:32] = 0.0
    p.grad[3] = 0.0
    lse = reference(p).lse.float()
    needed = unions(p)
    want = cut_reference(p, needed, lse)
    lse[p.grad == 0] = bad
    p.hidden[p.rows[p.grad == 0]] = bad
    got = backward(p, needed, lse)
    check_gradients(p, got, want)


def test_no_rows_no_gradient(seed: int) -> None:
    p = make_problem(seed, BFLOAT16, n=7)
    nothing = torch.empty(0, dtype=torch.int64)
    q = replace(p, labels=nothing, rows=nothing, grad=nothing.float())
    q = replace(q, noise=p.noise._replace(tokens=nothing))
    assert not any(g.any() for g in backward(q, unions(p), nothing.float()) if g is not None)


def test_module_is_the_backend(seed: int, monkeypatch) -> None:
    """The unions that the forward chose, and what they leave out of each row."""
    monkeypatch.setitem(nucleus.BLOCK_ROWS, "cpu", HEIGHT)
    tol = 2**-6
    p = make_problem(seed, FLOAT32, rank=3, n=19, vocab=89)
    p = replace(p, weight=8 * p.weight)  # so peaked that no union is all of the vocabulary
    result, nuclei = certified_noisy_triton.forward(
        p.hidden, p.weight, p.bias, p.labels, p.rows, p.transform, p.noise, False, tol
    )
    assert result.clean_logps is None
    check_forward(p, result, reference(p))
    order, vocab = nuclei.order, len(p.weight)
    noise = p.noise._replace(tokens=p.noise.tokens[order])
    p = replace(p, labels=p.labels[order], rows=p.rows[order], grad=p.grad[order], noise=noise)
    needed = nucleus.column_mask(nuclei.columns, vocab) | (nuclei.counts == vocab)[:, None]
    got = certified_noisy_triton.backward(
        p.grad, p.hidden, p.weight, p.bias, p.labels, p.rows, result.lse[order], nuclei.columns, nuclei.counts,
        p.transform, p.noise, GENERATOR,
    )  # fmt: skip
    check_gradients(p, got, cut_reference(p, needed, result.lse[order]), GENERATOR)
    mass = logits(p)[0].softmax(dim=1)
    left_out = (mass * ~needed.repeat_interleave(HEIGHT, dim=0)[: len(mass)]).sum(dim=1)
    assert (left_out <= tol * (1 + 1e-3)).all()
    assert left_out.any()


@pytest.mark.parametrize("rank", [None, 16], ids=["full rank", "low rank"])
def test_operation_takes_both_backwards_through_the_kernels(
    seed: int, rank: int | None, monkeypatch
) -> None:
    """The check of the GPU pass, at a size for the interpreter."""
    calls = []
    for module in (noisy_linear_logprobs_triton, certified_noisy_triton):
        for name in ("forward", "backward"):
            real = getattr(module, name)
            monkeypatch.setattr(
                module, name, lambda *a, f=real, m=module, n=name: (calls.append((m, n)), f(*a))[1]
            )
    found = noise_checks.check_noisy_logprobs((21, 8, 37), BFLOAT16, rank, torch.device("cpu"))
    assert found["ok"], found
    assert len(set(calls)) == 4


# Planted faults: the comparisons above must notice each of them.


FORWARD_FAULTS = {
    "wrong counter": ("_noisy_codes_kernel", _Altered, lambda a: {"tokens": a["tokens"] + 2**32}),
    "σ without bias": ("_noisy_codes_kernel", _Altered, lambda a: {"noise_bias": a["noise_bias"] * 0}),
    "codes of other noise": (
        "_noisy_codes_kernel", _Spoiled, lambda a: a["codes"].copy_(a["codes"].roll(1, dims=0)),
    ),
    "a panel of z lost": ("_noisy_codes_kernel", _Spoiled, lambda a: a["table"][3, :, :2].zero_()),
    "clean label of the next row": (
        "_noisy_codes_kernel", _Spoiled,
        lambda a: a["clean_label_logits"].copy_(a["clean_label_logits"].roll(1)),
    ),
}  # fmt: skip
BACKWARD_FAULTS = {
    "wrong counter": lambda a: {"tokens": a["tokens"] + 1},
    "noise of other columns": lambda a: {
        "noise_columns": torch.where(
            a["noise_columns"] >= 0, a["noise_columns"].roll(1).clamp(min=0), -1
        )
    },
    "σ without bias": lambda a: {"noise_bias": a["noise_bias"] * 0},
    "missing slope": lambda a: {"factor": 1.0},
    "a column left out of the unions": lambda a: {"masks": a["masks"] & ~1},
    "lse of the next row": lambda a: {"lse": a["lse"].roll(1)},
}


@pytest.mark.parametrize("fault", [None, *FORWARD_FAULTS])
def test_forward_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    p = peaked(make_problem(seed, FLOAT32, n=7, vocab=67))
    if fault is None:
        return check(p, 2**-6, run(p, 2**-6, monkeypatch))
    name, change, how = FORWARD_FAULTS[fault]
    monkeypatch.setattr(forward_launcher, name, change(getattr(forward_launcher, name), how))
    with pytest.raises(AssertionError):
        check(p, 2**-6, run(p, 2**-6, monkeypatch))


@pytest.mark.parametrize("fault", [None, *BACKWARD_FAULTS])
def test_backward_faults_are_noticed(seed: int, monkeypatch, fault: str | None) -> None:
    p = make_problem(seed, FLOAT32, transform=SCALED, n=19, vocab=67)
    p.labels[3] = 32  # of a word's lowest bit
    kernel = _Altered(
        backward_launcher._noisy_pieces_kernel, BACKWARD_FAULTS.get(fault, lambda a: {})
    )
    monkeypatch.setattr(backward_launcher, "_noisy_pieces_kernel", kernel)
    needed = unions(p)
    if fault is None:
        return check_backward(p, needed)
    with pytest.raises(AssertionError):
        check_backward(p, needed)
