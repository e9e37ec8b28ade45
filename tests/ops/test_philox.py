"""The noise: Philox against its published vectors, and its normals by shape, moments and correlations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpo
from fastpo.kernels import philox_torch

# Of Random123's kat_vectors, "philox4x32 10": counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
DRAWS = 10_000_000
ROWS = 1000


def hexadecimal(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: str, key: str, output: str) -> None:
    low, high = hexadecimal(key)
    words = tuple(torch.tensor([word]) for word in hexadecimal(counter))
    got = philox_torch.philox(words, low + (high << 32))  # type: ignore[arg-type]
    assert [int(word) for word in got] == hexadecimal(output)


def test_normals_follow_the_documented_transform(seed: int) -> None:
    token, column = 2**32 + 5, 4 * 12345 + 3
    counter = tuple(torch.tensor([word]) for word in (column // 4, 0, 5, 1))
    words = [int(word) for word in philox_torch.philox(counter, seed)]  # type: ignore[arg-type]
    u, v = ((word + 0.5) / 2**32 for word in words[2:])
    radius = math.sqrt(-2 * math.log(u))
    expected = radius * math.sin(2 * math.pi * v)
    got = fastpo.philox_normal(seed, torch.tensor(token), torch.tensor(column))
    assert got.dtype == torch.float32
    # Roundings of the angle, which the radius multiplies, and of u, which a small one divides.
    assert got.item() == pytest.approx(expected, abs=1e-6 * max(1, radius) + 1e-7 / radius)


def test_extreme_words_are_finite() -> None:
    words = torch.tensor([0, philox_torch.WORD])
    assert philox_torch.uniform(words).tolist() == [2.0**-33, 1.0]
    first, second = philox_torch.normal_pair(words, torch.zeros_like(words))
    assert 6.76 < first[0].item() <= 6.77
    assert first[1].item() == 0.0
    assert second.isfinite().all()


def test_tile_and_broadcast_and_points_agree_bit_for_bit(seed: int) -> None:
    tokens = torch.tensor([0, 7, 2**31, 2**40 + 3, -1])
    columns = torch.arange(3, 151)
    grid = fastpo.philox_normal(seed, tokens[:, None], columns)
    assert grid.shape == (5, 148)
    for first, last in [(3, 151), (4, 8), (5, 6), (6, 150), (127, 131)]:
        tile = philox_torch.normal_tile(seed, tokens, first, last)
        assert torch.equal(tile, grid[:, first - 3 : last - 3])
    for row, column in [(0, 0), (3, 77), (4, 147)]:
        point = fastpo.philox_normal(seed, tokens[row], columns[column].to(torch.int32))
        assert torch.equal(point, grid[row, column])
    assert fastpo.philox_normal(seed, tokens[:0, None], columns).shape == (0, 148)


@pytest.fixture(scope="module")
def many() -> Tensor:
    """(ROWS, DRAWS / ROWS) normals of neighbouring tokens and vocabulary entries."""
    return philox_torch.normal_tile(2**63 + 11, torch.arange(ROWS), 0, DRAWS // ROWS)


def test_moments(many: Tensor) -> None:
    """Up to the fourth, within five standard errors: Var(x)=1, Var(x²)=2, Var(x³)=15, Var(x⁴)=96."""
    x = many.double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) <= 5 * math.sqrt(variance / DRAWS), power
    assert 4.8 < float(x.abs().max()) <= 6.77
    quantiles = torch.tensor([-3.0, -1.0, -0.1, 0.0, 0.5, 2.0], dtype=torch.float64)
    for q, share in zip(quantiles, torch.special.ndtr(quantiles).tolist(), strict=True):
        assert abs(float((x < q).double().mean()) - share) <= 5 * math.sqrt(
            share * (1 - share) / DRAWS
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard errors of the product of independent standard normals."""
    return abs(float((a.double() * b.double()).mean())) * math.sqrt(a.numel())


def test_neighbours_are_not_correlated(many: Tensor) -> None:
    for distance in (1, 2, 3, 4, 5, 8, 128):
        assert correlation(many[:, distance:], many[:, :-distance]) <= 5, distance  # vocabulary
        assert correlation(many[distance:], many[:-distance]) <= 5, distance  # tokens
    magnitude = many**2 - 1  # of a pair, r is shared: squares must not show it
    assert correlation(magnitude[:, 1::2] / 2, magnitude[:, ::2] / 2) * 2 <= 5
    for seed in (2**63 + 10, 2**63 + 12, 11, 2**63 + 11 - 2**32):
        other = philox_torch.normal_tile(seed, torch.arange(ROWS), 0, DRAWS // ROWS)
        assert correlation(many, other) <= 5, seed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, [0], [0]), TypeError, r"seed: got float, expected an integer"),
        ((-1, [0], [0]), ValueError, r"seed: got -1, expected an integer in \[0, 2\*\*64\)"),
        ((2**64, [0], [0]), ValueError, r"seed: got 18446744073709551616"),
        ((1, [0.5], [0]), TypeError, r"token_index: got dtype torch.float32"),
        ((1, [0], [True]), TypeError, r"vocab_index: got dtype torch.bool"),
        ((1, [0], [5, -3]), ValueError, r"vocab_index: got -3, expected integers ≥ 0"),
        ((1, [0, 1], [0, 1, 2]), ValueError, r"vocab_index: got shape \(3,\), which does not"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[Any, Any, Any], error: type[Exception], message: str) -> None:
    seed, token, column = arguments
    with pytest.raises(error, match=message):
        fastpo.philox_normal(seed, torch.tensor(token), torch.tensor(column))


def test_an_index_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="vocab_index: got list, expected a tensor"):
        fastpo.philox_normal(1, torch.tensor([0]), [0])  # type: ignore[arg-type]
