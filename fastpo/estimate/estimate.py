"""``estimate(config)``: what a step needs on one device, and on one of several that share the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .sharding import on_one_device
from .step import simulate

if TYPE_CHECKING:
    from .config import EstimateConfig

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Memory per device, in bytes.

    Attributes:
        model: class of the model.
        parameters, trained: how many numbers it has, and how many of them are trained.
        dtype: of its weights, as the layers see them.
        most: of each part by itself, over the step.
        at_peak: of each part when all together are at their most.
        total: the sum of ``at_peak``: what the device must have.
        device_memory: what it has; None where that is not known.
        notes: what the numbers leave out.
    """

    model: str
    parameters: int
    trained: int
    dtype: str
    most: dict[str, int]
    at_peak: dict[str, int]
    total: int
    device_memory: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the total is within ``device_memory``; None where that is not known."""
        return None if self.device_memory is None else self.total <= self.device_memory


def estimate(config: EstimateConfig) -> Estimate:
    """Memory per device of the run that ``config`` describes, at the worst moment of a step.

    Counted is what PyTorch's allocator is asked for. Not counted: a CUDA context, what the allocator holds and
    nobody uses, buffers of communication libraries. What several devices hold: :mod:`fastpo.estimate.sharding`.

    Raises:
        FileNotFoundError, ValueError: settings or a model configuration that cannot be estimated.
    """
    if not config.max_length:
        raise ValueError(
            f"max_length: got {config.max_length}, expected a number of tokens: memory grows with it"
        )
    seen = simulate(config)
    timeline, parts = on_one_device(seen, config)
    totals = timeline.sum(axis=1)
    peak = int(totals.argmax())
    memory = None if config.device_memory is None else int(config.device_memory * GIB)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    return Estimate(
        seen.name,
        seen.parameters,
        seen.trained,
        str(seen.dtype).removeprefix("torch."),
        {name: int(n) for name, n in zip(parts, timeline.max(axis=0), strict=True) if n},
        {
            name: int(n)
            for name, n, most in zip(parts, timeline[peak], timeline.max(axis=0), strict=True)
            if most
        },
        int(totals[peak]),
        memory,
        _notes(config),
    )


def _notes(config: EstimateConfig) -> list[str]:
    notes = []
    packed = [
        n for n in ("padding_free", "prefix_sharing", "tokens_per_batch") if getattr(config, n)
    ]
    if packed:
        notes.append(
            f"{', '.join(packed)}: not counted, the micro-step is per_device_train_batch_size pairs padded to "
            "max_length"
        )
    if config.use_liger_kernel:
        notes.append("use_liger_kernel: counted without Liger's layers, which hold less")
    if config.torch_compile:
        notes.append("torch_compile: counted as if not compiled")
    options = getattr(config, "activation_checkpointing_kwargs", None)
    options = options or config.gradient_checkpointing_kwargs or {}
    if options.get("offload"):
        notes.append("gradient checkpoints that go to the host are counted as if they stayed")
    if config.is_sharded:
        notes.append("sharded parts are computed from one device's, not measured")
    return notes
