"""What one of several devices holds, from the timeline of one that holds everything.

With N devices and mixed precision in 16 bits ("16"), or without it ("32"):

| sharding | weights | gradients | optimizer | and what sharding needs itself |
|---|---|---|---|---|
| none (DDP) | 1 | 1 | 1 | DDP's buckets: the gradients once more |
| fsdp | 1/N in the loaded dtype | 1/N | 1/N | weights gathered while they are used, in the dtype of computing |
| zero2 | 1, in 16 bits under 16 | 1/N | 1/N; under 16 in float32, with a float32 copy of the weights | |
| zero3 | as zero2, 1/N | 1/N | as zero2 | weights gathered while they are used |

Gathered are everything outside the layers, and two layers, of which the next is fetched while one is at work.
A live reference is as its policy's weights, but whole in the loaded dtype under zero2. Activations and the loss
layer are whole on every device. Of a noise generator a device has 1/N of everything, whatever the sharding, its
whole parameters while they are used, and its whole gradient once more to hand it out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .ledger import GRADIENTS, NOISE, OPTIMIZER, PARTS, REFERENCE, WEIGHTS

if TYPE_CHECKING:
    from .config import EstimateConfig
    from .step import Simulation

BUCKETS, GATHERED = "gradient buckets", "gathered weights"
_SHARDED = {
    "none": (),
    "zero2": (GRADIENTS, OPTIMIZER),
    "zero3": (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER),
    "fsdp": (WEIGHTS, REFERENCE, GRADIENTS, OPTIMIZER),
}


def on_one_device(seen: Simulation, config: EstimateConfig) -> tuple[np.ndarray, tuple[str, ...]]:
    """The timeline (moments, parts + 1) of one device in bytes, and the names of its columns.

    Args:
        seen: of a device that holds everything; of a sharded run with mixed precision, one whose weights have
            the dtype that is computed in.
        config: how many devices, and what they share.
    """
    factors, copies = _precision(seen, config)
    if config.devices > 1:
        for part in (NOISE, *_SHARDED[config.sharding]):
            factors[part] = factors.get(part, 1.0) / config.devices
    own = np.ceil(seen.timeline * [factors.get(part, 1.0) for part in PARTS]).astype(np.int64)
    own[:, PARTS.index(OPTIMIZER)] += copies // config.devices
    if config.devices > 1:
        own[:, PARTS.index(NOISE)] += 2 * seen.generator
    added, name = 0, GATHERED
    if config.devices > 1 and config.sharding == "none":
        added, name = int(seen.timeline[:, PARTS.index(GRADIENTS)].max()), BUCKETS
    elif config.is_sharded and WEIGHTS in _SHARDED[config.sharding]:
        # Policy and reference take turns.
        added = max(
            min(2 * layer + others, int(seen.timeline[:, PARTS.index(part)].max()))
            for part, (layer, others) in (
                (WEIGHTS, seen.units),
                (REFERENCE, seen.reference_units),
            )
        )
    column = np.full((len(own), 1), added, dtype=np.int64)
    return np.concatenate([own, column], axis=1), (*PARTS, name)


def _precision(seen: Simulation, config: EstimateConfig) -> tuple[dict[str, float], int]:
    """Factors from the dtype of the step to those that a sharded run keeps, and bytes of float32 copies."""
    if not config.is_sharded or config.compute_dtype is None:
        return {}, 0
    # An adapter's gradients and moments are in float32 already.
    trained = () if seen.adapted else (GRADIENTS, OPTIMIZER)
    if config.sharding == "fsdp":
        stored = seen.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        wider = stored.itemsize / seen.dtype.itemsize
        return dict.fromkeys((WEIGHTS, REFERENCE, *trained), wider), 0
    return ({} if seen.adapted else {OPTIMIZER: 2.0}), 4 * seen.trained
