"""NoiseGenerator: the penalty against dense σ², what it costs, the largest σ, log-probs, files, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastpo
from fastpo import noise
from fastpo.benchmarks.memory import peak_extra_bytes
from fastpo.kernels import chunking

RANKS = pytest.mark.parametrize("rank", [None, 3], ids=["full rank", "low rank"])
WIDTH, VOCAB = 9, 37


def drawn(rank: int | None = None, dtype: torch.dtype = torch.float64) -> fastpo.NoiseGenerator:
    """A generator whose parameters are all well away from 0."""
    generator = fastpo.NoiseGenerator(WIDTH, VOCAB, rank=rank, init_std=0.5, dtype=dtype)
    with torch.no_grad():
        generator.bias.normal_()
    return generator


def dense_sigma(generator: fastpo.NoiseGenerator, hidden: Tensor) -> Tensor:
    """(N, V) float64, differentiable by autograd."""
    inner = hidden.double().reshape(-1, hidden.shape[-1])
    if generator.proj is not None:
        inner = inner @ generator.proj.double().t()
    return inner @ generator.weight.double().t() + generator.bias.double()


def gradients(value: Tensor, generator: fastpo.NoiseGenerator) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(generator.parameters())))


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(params=["one slice", "small slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "small slices":
        monkeypatch.setattr(noise, "_slice_rows", lambda *_: 5)
        monkeypatch.setattr(noise, "plan_tile", lambda *_: chunking.Tile(rows=4, cols=6))


@RANKS
@pytest.mark.parametrize(
    ("hidden_dtype", "dtype", "error"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float64, torch.float32, 1e-13),  # accumulated in float64
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-6),
    ],
    ids=["float64", "float64 states", "float32", "bfloat16 states"],
)
def test_penalty_is_the_mean_of_sigma_squared(
    rank: int | None, hidden_dtype: torch.dtype, dtype: torch.dtype, error: float, slices: None, seed: int
) -> None:  # fmt: skip
    generator = drawn(rank, dtype)
    hidden = (torch.randn(3, 7, WIDTH) + 2 * torch.randn(WIDTH)).to(hidden_dtype)
    expected = dense_sigma(generator, hidden).square().mean()
    got = generator.penalty(hidden)
    assert got.dtype == (torch.float64 if hidden_dtype == torch.float64 else torch.float32)
    assert relative(got, expected) <= error
    # The gradients are rounded to the parameters' dtype; a upstream factor passes through.
    bound = max(error, 2e-6 if dtype == torch.float32 else 0)
    for ours, theirs in zip(
        gradients(1.7 * got, generator), gradients(1.7 * expected, generator), strict=True
    ):
        assert ours.dtype == dtype
        assert relative(ours, theirs) <= bound


def test_penalty_does_not_cancel_where_the_bias_undoes_the_mean(seed: int) -> None:
    """σ is small although U h and b are large; uᵀ E[h hᵀ] u + 2 b uᵀh̄ + b² would lose every digit here."""
    generator = drawn(dtype=torch.float32)
    hidden = 1e4 + torch.randn(50, WIDTH)
    with torch.no_grad():
        generator.bias.copy_(-generator.weight @ hidden.mean(0))
    expected = dense_sigma(generator, hidden).square().mean()
    assert relative(generator.penalty(hidden), expected) < 1e-5


@RANKS
def test_penalty_of_masked_tokens(rank: int | None, seed: int) -> None:
    generator = drawn(rank)
    hidden = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.5
    mask[0, 0] = True
    hidden[~mask] = torch.nan
    expected = generator.penalty(hidden[mask])
    assert torch.equal(generator.penalty(hidden, mask), expected)
    assert generator.sigma_max(hidden, mask) == generator.sigma_max(hidden[mask])


def test_no_token_is_no_penalty_and_no_gradient(seed: int) -> None:
    generator = drawn(3)
    none = torch.zeros(2, 5, dtype=torch.bool)
    value = generator.penalty(torch.randn(2, 5, WIDTH, dtype=torch.float64), none)
    assert value == 0
    value.backward()
    assert not any(p.grad.any() for p in generator.parameters() if p.grad is not None)
    assert generator.sigma_max(torch.randn(0, WIDTH)) == 0
    assert generator.penalty_and_peak(torch.randn(0, WIDTH))[1] == 0


def test_penalty_gives_no_gradient_to_hidden_and_has_one_derivative(seed: int) -> None:
    generator = drawn()
    hidden = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    value = generator.penalty(hidden)
    (d_weight,) = torch.autograd.grad(value, generator.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(d_weight.sum(), generator.weight)
    generator.penalty(hidden).backward()
    assert hidden.grad is None


@RANKS
def test_penalty_grows_with_tokens_and_vocabulary_apart(rank: int | None, seed: int) -> None:
    """The multiplications of its matrix products are counted: a·N + b·V, without a term in N·V."""
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}

    def flops(tokens: int, vocab: int) -> int:
        generator = fastpo.NoiseGenerator(WIDTH, vocab, rank=rank)
        hidden = torch.randn(tokens, WIDTH)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            generator.penalty(hidden).backward()
        return counter.get_total_flops()

    base, more_tokens, more_vocab, both = (
        flops(n, v) for n, v in ((64, 50), (128, 50), (64, 100), (128, 100))
    )
    assert both - more_vocab == more_tokens - base > 0
    assert both - more_tokens == more_vocab - base > 0


class LargestTensor(TorchDispatchMode):
    """The most elements that the output of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_the_penalty_is_larger_than_its_arguments(seed: int) -> None:
    tokens, vocab = 300, 400
    generator = fastpo.NoiseGenerator(WIDTH, vocab)
    hidden = torch.randn(tokens, WIDTH)
    with LargestTensor() as seen:
        generator.penalty(hidden).backward()
    assert 0 < seen.elements <= max(tokens, vocab) * WIDTH


def test_memory_beyond_the_gradients_is_bounded(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """No second tensor of the size of the weight, and none that grows with the tokens."""
    width, vocab = 64, 8192
    monkeypatch.setattr(noise, "budget_bytes", lambda _: 1024 * 1024)
    generator = fastpo.NoiseGenerator(width, vocab)
    hidden = torch.randn(8192, width)
    generator.penalty(hidden).backward()  # what is made once

    def step() -> list[Tensor]:
        return gradients(generator.penalty(hidden), generator)

    assert peak_extra_bytes(step) < generator.weight.nbytes // 2


@RANKS
def test_largest_sigma(rank: int | None, slices: None, seed: int) -> None:
    generator = drawn(rank)
    hidden = torch.randn(11, WIDTH, dtype=torch.float64)
    expected = dense_sigma(generator, hidden).abs().max()
    got = generator.sigma_max(hidden)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach(), rtol=1e-13, atol=0)


@RANKS
def test_peak_is_the_largest_root_mean_square_of_an_entry(
    rank: int | None, slices: None, seed: int
) -> None:
    generator = drawn(rank)
    hidden = torch.randn(11, WIDTH, dtype=torch.float64)
    penalty, peak = generator.penalty_and_peak(hidden)
    assert torch.equal(penalty, generator.penalty(hidden))
    assert not peak.requires_grad
    expected = dense_sigma(generator, hidden).detach().square().mean(0).max().sqrt()
    torch.testing.assert_close(peak, expected, rtol=1e-12, atol=0)


@RANKS
def test_forward_is_the_operation(rank: int | None, seed: int) -> None:
    generator = drawn(rank)
    hidden, head = torch.randn(2, 3, WIDTH).double(), torch.randn(VOCAB, WIDTH).double()
    labels, index = torch.randint(VOCAB, (2, 3)), torch.randint(2**40, (2, 3))
    bias = torch.randn(VOCAB).double()
    options: dict[str, Any] = {
        "bias": bias,
        "return_clean": True,
        "seed": seed,
        "token_index": index,
    }
    noisy, clean = generator(hidden, head, labels, **options)
    expected = fastpo.noisy_linear_logprobs(
        hidden, head, labels, generator.weight, generator.bias, noise_proj=generator.proj, **options
    )
    assert torch.equal(noisy, expected[0])
    assert torch.equal(clean, expected[1])
    assert len(gradients(noisy.sum(), generator)) == (2 if rank is None else 3)


def test_parameters_at_the_start(seed: int) -> None:
    full = fastpo.NoiseGenerator(40, 500, init_std=0.2, dtype=torch.float64)
    assert {k: tuple(v.shape) for k, v in full.named_parameters()} == {
        "weight": (500, 40),
        "bias": (500,),
    }
    low = fastpo.NoiseGenerator(40, 500, rank=8, init_std=0.2, device="cpu")
    assert {k: tuple(v.shape) for k, v in low.named_parameters()} == {
        "weight": (500, 8),
        "bias": (500,),
        "proj": (8, 40),
    }
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    torch.manual_seed(seed)
    full.reset_parameters()
    torch.manual_seed(seed)
    expected = 0.2 * torch.empty(500, 40, dtype=torch.float64).normal_()
    torch.testing.assert_close(full.weight.detach(), expected, rtol=1e-12, atol=0)
    assert not full.bias.any()
    silent = fastpo.NoiseGenerator(40, 500, rank=8, init_std=0)
    assert silent.penalty(torch.randn(3, 40)) == 0
    assert repr(low) == "NoiseGenerator(hidden_size=40, vocab_size=500, rank=8)"


@RANKS
def test_saved_and_loaded_to_the_last_bit(rank: int | None, tmp_path: Path, seed: int) -> None:
    generator, other = drawn(rank), drawn(rank)
    path = tmp_path / "noise.safetensors"
    generator.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["noise.safetensors"]
    assert load_file(path).keys() == generator.state_dict().keys()
    other.load(path)
    for name, tensor in generator.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def unfit_files(directory: Path) -> Iterator[tuple[Path, str]]:
    path = directory / "noise.safetensors"
    yield path, "path: no file"
    path.write_bytes(b"PK\x03\x04 a pickle")
    yield path, "is not a safetensors file"
    save_file({"lm_head.weight": torch.zeros(2)}, path)
    yield path, "is no noise generator: it holds lm_head.weight"
    for changed, message in (
        ({"weight": torch.zeros(5)}, r"is no noise generator: weight has shape \(5,\)"),
        ({"bias": torch.zeros(VOCAB + 1)}, "is no noise generator: its shapes do not fit, "),
        ({"proj": torch.zeros(2, WIDTH)}, "is no noise generator: its shapes do not fit, "),
    ):
        whole = {"weight": torch.zeros(VOCAB, WIDTH), "bias": torch.zeros(VOCAB)}
        save_file(whole | changed, path)
        yield path, message
    for sizes, message in (
        (((WIDTH + 1), VOCAB, None), f"hidden_size: got {WIDTH}, expected {WIDTH + 1}, that of the"),
        ((WIDTH, VOCAB + 1, None), f"vocab_size: got {VOCAB}, expected {VOCAB + 1}, that of the"),
        ((WIDTH, VOCAB, 2), "rank: got None, expected 2, that of the"),
    ):  # fmt: skip
        fastpo.NoiseGenerator(sizes[0], sizes[1], rank=sizes[2]).save(path)
        yield path, message


def test_files_that_do_not_fit_are_refused(tmp_path: Path, seed: int) -> None:
    generator = fastpo.NoiseGenerator(WIDTH, VOCAB)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    for path, message in unfit_files(tmp_path):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            generator.load(path)
    for name, tensor in before.items():
        assert torch.equal(generator.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size: got 0, expected an integer ≥ 1"),
        ({"vocab_size": -1}, ValueError, "vocab_size: got -1, expected an integer ≥ 1"),
        ({"rank": 0}, ValueError, "rank: got 0, expected an integer ≥ 1"),
        ({"rank": 2.0}, TypeError, "rank: got float, expected an integer ≥ 1"),
        ({"hidden_size": True}, TypeError, "hidden_size: got bool"),
        ({"init_std": -1e-3}, ValueError, "init_std: got -0.001, expected a finite number ≥ 0"),
        ({"init_std": float("nan")}, ValueError, "init_std: got nan"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fastpo.NoiseGenerator(**{"hidden_size": WIDTH, "vocab_size": VOCAB, **arguments})


def test_bad_arguments_are_refused(seed: int) -> None:
    generator = drawn()
    hidden = torch.randn(2, 3, WIDTH).double()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    head = torch.randn(VOCAB, WIDTH).double()
    with pytest.raises(
        ValueError, match=rf"hidden: got torch\.float32 of shape \(2, {WIDTH + 1}\)"
    ):
        generator.penalty(torch.randn(2, WIDTH + 1))
    with pytest.raises(ValueError, match=r"hidden: got torch\.int64 of shape"):
        generator.penalty(torch.zeros(2, WIDTH, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"mask: got dtype torch\.int64"):
        generator.penalty(hidden, labels)
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), expected \(2, 3\)"):
        generator.sigma_max(hidden, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="hidden: got device meta, expected that of the noise gen"):
        generator.penalty(hidden.to("meta"))
    with pytest.raises(
        ValueError, match=rf"hidden: got shape \(2, 3, 4\), expected \(..., {WIDTH}\)"
    ):
        generator(hidden[..., :4], head, labels, seed=0)
    with pytest.raises(
        ValueError, match=rf"weight: got shape \(5, {WIDTH}\), expected \({VOCAB}, {WIDTH}\)"
    ):
        generator(hidden, head[:5], labels, seed=0)
