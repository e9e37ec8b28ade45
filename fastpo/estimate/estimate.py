"""``estimate(config)``: what a step needs on one device, and on one of several that share the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from .ledger import HOST
from .sharding import on_one_device
from .step import Simulation, simulate

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
        sequences, sequence_tokens: of the micro-step, how many there are and how long each is.
        rows, row_tokens: how they lie.
        most: of each part by itself, over the step.
        at_peak: of each part when all together are at their most.
        total: the sum of ``at_peak``: what the device must have.
        host_memory: what waits for the backward outside the device, at most.
        device_memory: what it has; None where that is not known.
        notes: what the numbers leave out.
    """

    model: str
    parameters: int
    trained: int
    dtype: str
    sequences: int
    sequence_tokens: int
    rows: int
    row_tokens: int
    most: dict[str, int]
    at_peak: dict[str, int]
    total: int
    host_memory: int
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
    host = parts.index(HOST)
    host_memory = int(timeline[:, host].max())
    timeline, parts = np.delete(timeline, host, axis=1), (*parts[:host], *parts[host + 1 :])
    totals = timeline.sum(axis=1)
    rows, row_tokens = seen.micro_step.batch["input_ids"].shape
    peak = int(totals.argmax())
    memory = None if config.device_memory is None else int(config.device_memory * GIB)
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    return Estimate(
        seen.name,
        seen.parameters,
        seen.trained,
        str(seen.dtype).removeprefix("torch."),
        seen.micro_step.sequences,
        seen.micro_step.length,
        rows,
        row_tokens,
        {name: int(n) for name, n in zip(parts, timeline.max(axis=0), strict=True) if n},
        {
            name: int(n)
            for name, n, most in zip(parts, timeline[peak], timeline.max(axis=0), strict=True)
            if most
        },
        int(totals[peak]),
        host_memory,
        memory,
        _notes(config, seen),
    )


def _notes(config: EstimateConfig, seen: Simulation) -> list[str]:
    notes = []
    if config.prefix_sharing and config.prompt_length == 1:
        notes.append(
            "prefix_sharing: counted for pairs without a prompt to share; prompt_length says how long theirs is"
        )
    if not seen.plain_head:
        notes.append(
            "the head is neither a plain linear layer nor plain LoRA on one, and counted without what is added"
        )
    if config.use_liger_kernel:
        notes.append("use_liger_kernel: counted without Liger's layers, which hold less")
    if config.torch_compile:
        notes.append("torch_compile: counted as if not compiled")
    if config.without_effect:
        notes.append(
            f"{', '.join(config.without_effect)}: without effect here; devices and sharding say how a run is "
            "spread"
        )
    elif config.devices == 1 and not config.use_cpu:
        notes.append("for one device; devices and sharding spread the run over several")
    if config.is_sharded:
        notes.append("sharded parts are computed from one device's, not measured")
    return notes
