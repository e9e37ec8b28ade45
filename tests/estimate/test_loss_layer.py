"""What an operation is said to hold while it runs, beside what PyTorch's allocator is asked for in a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpo
from benchmarks.memory import draw, peak_extra_bytes
from fastpo.estimate.ledger import Ledger
from fastpo.estimate.loss_layer import workspace_bytes
from fastpo.ops.linear_logprobs import score

CPU = torch.device("cpu")
CALLS: dict[str, dict[str, Any]] = {
    "exact": {"backward": "exact"},
    "exact, statistics": {"backward": "exact", "return_stats": True},
    "certified": {"backward": "certified", "return_stats": True},
    "certified, low memory": {"backward": "certified", "low_memory": True},
    "last columns": {"backward": "exact", "last_columns": 16},
    "certified, last columns": {"backward": "certified", "last_columns": 16},
    "noise": {"backward": "exact", "noise": 24},
    "certified, noise": {"backward": "certified", "noise": 24},
}
SHAPES = {"many tokens": (2048, 2063, 48), "large vocabulary": (300, 16_000, 128)}


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Hidden states, head, labels and what else a call takes; and those that get a gradient."""
    hidden, weight, labels = draw(*shape)
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    others: dict[str, Tensor] = {}
    leaves = [hidden, weight]
    if "last_columns" in options:
        weight.requires_grad_(False)
        others["last"] = weight[:, -options["last_columns"] :].clone().requires_grad_()
        leaves = [hidden, others["last"]]
    if "noise" in options:  # of low rank, the reference's hidden states and head without gradient
        hidden.requires_grad_(False)
        weight.requires_grad_(False)
        rank = options["noise"]
        others["noise_weight"] = (1e-3 * torch.randn(shape[1], rank)).requires_grad_()
        others["noise_proj"] = torch.randn(rank, shape[2]).requires_grad_()
        leaves = list(others.values())
    return (hidden, weight, labels, others), leaves


def call(given: Any, options: dict[str, Any]) -> Tensor:
    hidden, weight, labels, others = given
    kept = {k: v for k, v in options.items() if k not in ("noise", "last_columns")}
    if "noise_weight" in others:
        result: Any = fastpo.noisy_linear_logprobs(
            hidden, weight, labels, seed=0, return_clean=True, **others, **kept
        )
    elif "last" in others:
        result = score(hidden, weight, labels, None, others["last"], **kept)
    else:
        result = fastpo.linear_logprobs(hidden, weight, labels, **kept)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("name", "shape"),
    # Few tokens let a certified backward draw in smaller parts than are counted.
    [(n, s) for n in CALLS for s in SHAPES if (n, s) != ("certified, noise", "large vocabulary")],
)
def test_within_a_tenth(name: str, shape: str, dtype: torch.dtype, seed: int) -> None:
    options = CALLS[name]
    given, leaves = inputs(SHAPES[shape], dtype, options)
    kept: list[Tensor] = []

    def forward() -> list[Tensor]:
        kept[:] = [call(given, options)]
        return kept

    measured = [
        peak_extra_bytes(forward),
        peak_extra_bytes(lambda: torch.autograd.grad(kept[0].sum(), leaves)),
    ]
    said: list[int] = []

    def workspace(operation: Any, arguments: tuple[Any, ...]) -> int:
        said.append(workspace_bytes(CPU, 1.0, operation, arguments))
        return said[-1]

    with FakeTensorMode() as mode, Ledger(workspace):
        tensors, others = given[:3], given[3]
        fake = (
            *map(mode.from_tensor, tensors),
            {k: mode.from_tensor(v) for k, v in others.items()},
        )
        leaves = [t for t in (*fake[:2], *fake[3].values()) if t.requires_grad]
        torch.autograd.grad(call(fake, options).sum(), leaves)
    assert said == pytest.approx(measured, rel=0.1)


def test_only_scored_rows_count(seed: int) -> None:
    hidden, weight, labels = (t.detach() for t in draw(1000, 3000, 16))
    seen = []
    for scored in (1.0, 0.25):
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            Ledger(
                lambda *call, share=scored: seen.append(workspace_bytes(CPU, share, *call)) or 0
            ),
        ):
            fastpo.linear_logprobs(hidden, weight, labels, backward="certified")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Ledger(lambda *call: seen.append(workspace_bytes(CPU, 1.0, *call)) or 0),
    ):
        fastpo.linear_logprobs(hidden[:250], weight, labels[:250], backward="certified")
    assert seen[1] == seen[2] < seen[0]
