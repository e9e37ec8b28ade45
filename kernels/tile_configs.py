"""The one table of tile shapes of the Triton kernels: per kernel, chip and dtype family, fixed before run time.

A matrix kernel makes ``rows × cols`` of its output with ``warps`` warps and walks the inner dimension ``depth``
at a time, with loads ``stages`` deep in flight. No autotuner runs: what a chip gets is written here, and
``fastpo.kernels.audit`` compiles all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read when the kernels are decorated, so once

GROUP_ROWS = (
    16  # row blocks that share a sweep over the vocabulary, so that they meet in the L2 cache
)


class TileConfig(NamedTuple):
    """Shape of one program's work in a matrix kernel; powers of two."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


class Target(NamedTuple):
    """What the launchers need to know about a device."""

    chip: str
    processors: int  # streaming multiprocessors


# sm_80 stands for every chip that has mma.sync but neither wgmma nor tcgen05: its tiles also fit into the
# 99 KiB of shared memory of sm_86, sm_89 and sm_120.
CHIPS = ("sm_80", "sm_90", "sm_100")

_INTERPRETER_TILE = TileConfig(16, 32, 16, 1, 1)

# "logits": rows × cols of the logits, in the exact forward and backward; "matmul": products of a backward;
# "certified": logits of the certified forward; "pieces": those of its backward; "… softcap": the same with a
# softcap, whose tanh needs registers; "noisy", "noisy certified", "noisy pieces": logits and pieces with noise,
# which have two accumulators; "unaligned": any of these for operands that cannot be loaded 16 bytes at a time,
# which takes registers for addresses, and "noisy unaligned" any of those with noise, where "… unaligned" has no
# entry of its own. Each is the largest tile that was found to compile without spills (`make audit`).
_TABLE: dict[tuple[str, str, str], TileConfig] = {
    ("logits", "sm_80", "half"): TileConfig(128, 128, 32, 8, 4),
    ("logits", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("logits", "sm_90", "half"): TileConfig(128, 256, 64, 8, 4),
    ("logits", "sm_90", "float32"): TileConfig(128, 128, 32, 8, 3),
    ("logits", "sm_100", "half"): TileConfig(128, 128, 64, 4, 3),
    ("logits", "sm_100", "float32"): TileConfig(64, 128, 32, 8, 3),
    ("logits softcap", "sm_80", "half"): TileConfig(128, 128, 32, 8, 4),
    ("logits softcap", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("logits softcap", "sm_90", "half"): TileConfig(128, 256, 64, 8, 4),
    ("logits softcap", "sm_90", "float32"): TileConfig(128, 128, 32, 8, 3),
    ("logits softcap", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("logits softcap", "sm_100", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("matmul", "sm_80", "half"): TileConfig(128, 256, 32, 8, 4),
    ("matmul", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("matmul", "sm_90", "half"): TileConfig(128, 256, 64, 8, 4),
    ("matmul", "sm_90", "float32"): TileConfig(64, 128, 32, 4, 3),
    ("matmul", "sm_100", "half"): TileConfig(128, 256, 64, 8, 4),
    ("matmul", "sm_100", "float32"): TileConfig(64, 128, 32, 8, 3),
    ("certified", "sm_80", "half"): TileConfig(128, 128, 32, 8, 4),
    ("certified", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("certified", "sm_90", "half"): TileConfig(128, 256, 64, 8, 3),
    ("certified", "sm_90", "float32"): TileConfig(64, 128, 32, 4, 3),
    ("certified", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("certified", "sm_100", "float32"): TileConfig(128, 64, 32, 8, 3),
    ("pieces", "sm_80", "half"): TileConfig(128, 128, 32, 8, 4),
    ("pieces", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("pieces", "sm_90", "half"): TileConfig(128, 256, 64, 8, 4),
    ("pieces", "sm_90", "float32"): TileConfig(64, 128, 32, 4, 3),
    ("pieces", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("pieces", "sm_100", "float32"): TileConfig(64, 128, 32, 8, 3),
    ("pieces softcap", "sm_80", "half"): TileConfig(128, 128, 32, 8, 4),
    ("pieces softcap", "sm_80", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("pieces softcap", "sm_90", "half"): TileConfig(128, 128, 64, 8, 4),
    ("pieces softcap", "sm_90", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("pieces softcap", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("pieces softcap", "sm_100", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("noisy", "sm_80", "half"): TileConfig(128, 64, 32, 8, 3),
    ("noisy", "sm_80", "float32"): TileConfig(64, 32, 32, 4, 3),
    ("noisy", "sm_90", "half"): TileConfig(128, 128, 64, 8, 3),
    ("noisy", "sm_90", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("noisy", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("noisy", "sm_100", "float32"): TileConfig(128, 64, 32, 8, 3),
    ("noisy certified", "sm_80", "half"): TileConfig(128, 64, 32, 8, 3),
    ("noisy certified", "sm_80", "float32"): TileConfig(64, 32, 32, 4, 3),
    ("noisy certified", "sm_90", "half"): TileConfig(128, 128, 64, 8, 3),
    ("noisy certified", "sm_90", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("noisy certified", "sm_100", "half"): TileConfig(64, 64, 64, 8, 3),
    ("noisy certified", "sm_100", "float32"): TileConfig(64, 64, 32, 8, 3),
    ("noisy pieces", "sm_80", "half"): TileConfig(128, 64, 32, 4, 3),
    ("noisy pieces", "sm_80", "float32"): TileConfig(64, 32, 32, 4, 3),
    ("noisy pieces", "sm_90", "half"): TileConfig(128, 128, 64, 8, 3),
    ("noisy pieces", "sm_90", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("noisy pieces", "sm_100", "half"): TileConfig(128, 64, 64, 8, 3),
    ("noisy pieces", "sm_100", "float32"): TileConfig(128, 64, 32, 8, 3),
    ("noisy unaligned", "sm_80", "half"): TileConfig(64, 32, 32, 4, 3),
    ("noisy unaligned", "sm_80", "float32"): TileConfig(64, 32, 16, 8, 3),
    ("noisy unaligned", "sm_90", "half"): TileConfig(64, 64, 32, 8, 3),
    ("noisy unaligned", "sm_90", "float32"): TileConfig(64, 32, 16, 8, 3),
    ("noisy unaligned", "sm_100", "half"): TileConfig(64, 64, 32, 8, 3),
    ("noisy unaligned", "sm_100", "float32"): TileConfig(64, 64, 16, 8, 3),
    ("unaligned", "sm_80", "half"): TileConfig(64, 64, 32, 4, 3),
    ("unaligned", "sm_80", "float32"): TileConfig(64, 64, 16, 8, 3),
    ("unaligned", "sm_90", "half"): TileConfig(64, 64, 32, 4, 3),
    ("unaligned", "sm_90", "float32"): TileConfig(64, 64, 32, 8, 3),
    ("unaligned", "sm_100", "half"): TileConfig(64, 64, 32, 8, 3),
    ("unaligned", "sm_100", "float32"): TileConfig(64, 64, 32, 8, 3),
    ("logits unaligned", "sm_90", "float32"): TileConfig(64, 64, 16, 8, 3),
    ("logits softcap unaligned", "sm_90", "float32"): TileConfig(64, 64, 16, 8, 3),
    ("matmul unaligned", "sm_80", "float32"): TileConfig(64, 32, 16, 8, 3),
    ("certified unaligned", "sm_100", "half"): TileConfig(64, 64, 64, 8, 3),
    ("pieces unaligned", "sm_100", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("pieces softcap unaligned", "sm_100", "float32"): TileConfig(64, 64, 32, 4, 3),
    ("noisy certified unaligned", "sm_80", "half"): TileConfig(64, 64, 32, 4, 3),
    ("noisy certified unaligned", "sm_100", "half"): TileConfig(64, 32, 32, 8, 3),
    ("noisy certified unaligned", "sm_100", "float32"): TileConfig(64, 32, 16, 8, 3),
    ("noisy pieces unaligned", "sm_80", "half"): TileConfig(64, 64, 32, 4, 3),
    ("noisy pieces unaligned", "sm_100", "half"): TileConfig(64, 32, 32, 8, 3),
}

_pretended: ContextVar[Target | None] = ContextVar("pretended", default=None)


@contextmanager
def pretend(chip: str, processors: int = 132) -> Iterator[None]:
    """Inside, every device counts as ``chip``: how the audit sees what a launcher would do there."""
    token = _pretended.set(Target(chip, processors))
    try:
        yield
    finally:
        _pretended.reset(token)


def unsupported(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None if they can."""
    if INTERPRETED or _pretended.get() is not None:
        return None
    if device.type != "cuda":
        return (
            f"the tensors are on {device} and TRITON_INTERPRET=1 was not set when Triton was loaded"
        )
    if torch.version.hip is not None:
        return "AMD devices have no entry in the tile table"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"


def target(device: torch.device) -> Target:
    """``device`` as the table knows it; it must be a supported one."""
    pretended = _pretended.get()
    if pretended is not None:
        return pretended
    if INTERPRETED:
        return Target("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    chip = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80")
    return Target(chip, properties.multi_processor_count)


def tile_config(use: str, target: Target, *operands: torch.Tensor) -> TileConfig:
    """The tile for ``use``, a name of the table, of matrices that come from the caller."""
    dtype = operands[0].dtype
    if not all(map(_aligned, operands)):
        own, general = (
            f"{use} unaligned",
            "noisy unaligned" if use.startswith("noisy") else "unaligned",
        )
        use = own if (own, target.chip, _family(dtype)) in _TABLE else general
    return aligned_tile_config(use, target, dtype)


def aligned_tile_config(use: str, target: Target, dtype: torch.dtype) -> TileConfig:
    """The same for matrices whose rows can be loaded 16 bytes at a time."""
    if target.chip == "interpreter":
        return _INTERPRETER_TILE
    return _TABLE[use, target.chip, _family(dtype)]


def _family(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def bulk_copies(target: Target, *operands: torch.Tensor) -> bool:
    """Whether tiles of ``operands`` can be loaded by the bulk copy engine (TMA), through tensor descriptors."""
    return target.chip != "sm_80" and all(map(_aligned, operands))


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether Triton will see that the rows can be loaded 16 bytes at a time: it asks for multiples of 16."""
    (row, col), width = matrix.stride(), matrix.shape[1]
    return col == 1 and row % 16 == 0 and width % 16 == 0 and matrix.data_ptr() % 16 == 0


def vocabulary_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """Into how many splits the vocabulary tiles go so that ``processors`` programs at a time end early.

    A split walks its tiles one after the other. At least as many are taken as fill the chip while only
    ``GROUP_ROWS`` row blocks are under way, and of those within 2 % of the earliest end the fewest, as each
    split leaves a partial result to merge.
    """
    least = min(tiles, math.ceil(processors / min(row_blocks, GROUP_ROWS)))
    ends = {
        splits: math.ceil(row_blocks * splits / processors) * math.ceil(tiles / splits)
        for splits in range(least, min(tiles, 4 * least) + 1)
    }
    fewest = min(splits for splits, end in ends.items() if end <= 1.02 * min(ends.values()))
    return math.ceil(tiles / math.ceil(tiles / fewest))  # no split without a tile
