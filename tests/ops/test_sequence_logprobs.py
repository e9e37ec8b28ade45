"""Sequence log-probs against plain loops, in both layouts; label shifting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastpo


def by_loops(rows: list[tuple[Tensor, Tensor]], average: bool) -> Tensor:
    results = []
    for logps, labels in rows:
        kept = [float(p) for p, y in zip(logps, labels, strict=True) if y != -100]
        results.append(sum(kept) / (max(len(kept), 1) if average else 1))
    return torch.tensor(results, dtype=torch.float64)


def draw(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    rows = []
    for length in lengths:
        labels = torch.randint(50, (length,))
        labels[torch.rand(length) < 0.4] = -100
        rows.append((-torch.rand(length) * 9, labels))
    return rows


@pytest.mark.parametrize("average", [False, True])
def test_both_layouts_match_loops(average: bool, seed: int) -> None:
    rows = draw([5, 0, 1, 17, 8])
    expected = by_loops(rows, average)
    padded = [torch.zeros(5, 17), torch.full((5, 17), -100)]
    for i, (logps, labels) in enumerate(rows):
        padded[0][i, : len(logps)], padded[1][i, : len(labels)] = logps, labels
    got = fastpo.sequence_logprobs(*padded, average=average)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-7, atol=1e-7)

    boundaries = torch.tensor([0, 5, 5, 6, 23, 31], dtype=torch.int32)
    packed = [torch.cat(column) for column in zip(*rows, strict=True)]
    got = fastpo.sequence_logprobs(*packed, cu_seqlens=boundaries, average=average)
    torch.testing.assert_close(got.double(), expected, rtol=1e-7, atol=1e-7)


def test_summed_in_float64() -> None:
    """A thousand times 1/1024 after 2^20: a float32 running sum loses all of them."""
    logps = torch.full((1, 1025), -(2.0**-10))
    logps[0, 0] = -(2.0**20)
    got = fastpo.sequence_logprobs(logps, torch.zeros(1, 1025, dtype=torch.int64))
    assert float(got) == -(2.0**20) - 1


def test_gradient_is_the_coefficient_on_labelled_tokens(seed: int) -> None:
    rows = draw([6, 4])
    logps, labels = (torch.cat(column) for column in zip(*rows, strict=True))
    logps.requires_grad_()
    cu_seqlens = torch.tensor([0, 6, 10])
    sums = fastpo.sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens)
    (gradient,) = torch.autograd.grad(sums, logps, torch.tensor([2.0, -3.0]))
    coefficient = torch.tensor([2.0] * 6 + [-3.0] * 4)
    assert torch.equal(gradient, torch.where(labels != -100, coefficient, 0.0))


def test_nothing_labelled_gives_zero_not_nan() -> None:
    logps = torch.full((2, 3), torch.nan)
    labels = torch.full((2, 3), -100)
    assert fastpo.sequence_logprobs(logps, labels, average=True).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("shapes", "cu_seqlens", "message"),
    [
        (((2, 3), (2, 4)), None, r"labels: got shape \(2, 4\)"),
        (((6,), (6,)), None, r"token_logps: got shape \(6,\), expected \(B, T\)"),
        (((2, 3), (2, 3)), [0, 3, 6], r"expected \(N,\) with cu_seqlens"),
        (((6,), (6,)), [[0, 6]], "cu_seqlens: got shape"),
    ],
)
def test_bad_input_is_named(shapes: tuple, cu_seqlens: list | None, message: str) -> None:
    boundaries = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    with pytest.raises(ValueError, match=message):
        fastpo.sequence_logprobs(
            torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64), cu_seqlens=boundaries
        )


def test_a_tensor_on_another_device_is_named() -> None:
    logps, labels, bounds = torch.zeros(6), torch.zeros(6).long(), torch.tensor([0, 2, 6])
    with pytest.raises(ValueError, match="labels: got device meta, expected that of token_logps"):
        fastpo.sequence_logprobs(logps, labels.to("meta"), cu_seqlens=bounds)
    with pytest.raises(
        ValueError, match="cu_seqlens: got device meta, expected that of token_logps"
    ):
        fastpo.sequence_logprobs(logps, labels, cu_seqlens=bounds.to("meta"))


def test_labels_are_shifted_by_one() -> None:
    ids = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    completion = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    labels = fastpo.shift_labels(ids, completion)
    assert labels.tolist() == [[-100, 12, 13, -100], [21, 22, -100, -100]]
    with pytest.raises(ValueError, match="completion_mask: got shape"):
        fastpo.shift_labels(ids, completion[:1])


@pytest.mark.parametrize("bounds", [[1, 3, 6], [0, 4, 3], [0, 3, 7], [3, 5, 2]])
def test_bounds_that_are_none_are_named(bounds: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"cu_seqlens: got \[.*expected bounds that rise from 0 to at most 6"
    ):
        fastpo.sequence_logprobs(
            torch.zeros(6), torch.zeros(6, dtype=torch.int64), cu_seqlens=torch.tensor(bounds)
        )


def test_bounds_are_integers() -> None:
    with pytest.raises(TypeError, match=r"cu_seqlens: got dtype torch\.float32"):
        fastpo.sequence_logprobs(
            torch.zeros(6), torch.zeros(6, dtype=torch.int64), cu_seqlens=torch.tensor([0.0, 6.0])
        )
