"""What fastpo's own operations hold while they run, beyond their arguments and results.

Formulas for n tokens, V vocabulary entries, H hidden size, w = 4 bytes (8 for float64) and the sizes that
``kernels/chunking.py`` plans for the device; "narrow" is a head in 16 bits. They follow the PyTorch backend
buffer by buffer. The Triton kernels keep to the same plans and hold less of them (a byte per logit where this
counts a float32), so that on CUDA the result is an upper bound.

Exact, tile of R×C:
    forward   w·(R·C, twice with statistics; R·H gathered rows; C·H of the head widened if narrow)
    backward  w·(R·C, twice with a softcap; R·H; C·H if narrow) + the wide accumulator: w·n·H for n ≤ V,
              else w·V·H if narrow, and w·R·H
Certified:
    forward   w·(a chunk's rows × V, a tile's rows × V, the chunk's rows × H, C·H if narrow), the bit masks of a
              window and of all blocks
    backward  the room of a group: rows × H twice, rows × columns of a piece, the piece's columns × H of W, of
              dW and widened; its unions as bytes; a dense block's tile; and if narrow w·slice·H for dW and, in
              several slices, w·n·H for dH
Where a gradient is made of the last columns of the head alone, these take the place of H for dW. Noise adds σ
and its draw for a part of a tile, a second tile where log-probs without noise are made or in the backward, and
per input of the generator what the head has per column of H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.kernels.certified_noisy_torch import TILES as NOISY_TILES
from fastpo.kernels.chunking import (
    CPU_PRODUCT_BYTES,
    Tile,
    plan_certified_backward,
    plan_certified_forward,
    plan_noisy_tile,
    plan_tile,
)
from fastpo.kernels.nucleus import block_rows, words
from fastpo.kernels.philox_torch import COUNTERS, LANES
from fastpo.kernels.precision import accumulation_dtype
from fastpo.kernels.products_torch import LEAST_WORK, TERMS, onednn_is_faster

_PER_COUNTER = 64  # bytes that are alive at once while normals are drawn: eight words
_PER_TOKEN = 8  # vectors of a number per token that are alive at once, at most


def workspace_bytes(
    device: torch.device, scored: float, operation: Any, arguments: tuple[Any, ...]
) -> int:
    """Bytes of one call.

    Args:
        device: what the run is for; the arguments' own is a stand-in.
        scored: share of the rows that have a label; a noisy operation is given these alone.
        operation: of the namespace ``fastpo``; other ones than the log-probs hold nothing of note.
        arguments: as the operation takes them, tensors by shape and dtype alone.
    """
    named = dict(zip((a.name for a in operation._schema.arguments), arguments, strict=False))
    if "hidden" not in named or "weight" not in named:
        return 0
    call = _Call(device, scored, named)
    used = call.backward() if "lse" in named else call.forward()
    return used + _PER_TOKEN * call.wide * call.n


class _Call:
    """The sizes of a call, and what each direction holds."""

    def __init__(self, device: torch.device, scored: float, named: dict[str, Any]) -> None:
        hidden: Tensor = named["hidden"]
        weight: Tensor = named["weight"]
        noise: Tensor | None = named.get("noise_weight")
        self.device = device
        self.n = round((1.0 if noise is not None else scored) * hidden.shape[0])
        self.vocab, self.width = weight.shape
        self.dtype = accumulation_dtype(hidden.dtype)
        self.wide = self.dtype.itemsize
        self.stored = weight.dtype.itemsize
        self.narrow = weight.dtype != self.dtype
        self.tol = float(named.get("tol") or 0.0)
        self.low_memory = bool(named.get("low_memory"))
        self.stats = bool(named.get("want_stats"))
        self.softcap = named.get("softcap") is not None
        needed = named.get(
            "needed"
        )  # of a noisy operation, in the order of the kernels' ``Needed``
        self.need_hidden = bool(needed[0] if needed else named.get("need_hidden"))
        self.need_weight = bool(needed[1] if needed else named.get("need_weight"))
        # Columns of the weight whose gradient is made.
        columns = named.get("last_columns")
        self.trained = columns if isinstance(columns, int) else self.width
        self.noise = None if noise is None else _Noise(self, noise, named, needed)

    def forward(self) -> int:
        return self.certified_forward() if self.tol > 0 else self.exact_forward()

    def backward(self) -> int:
        if self.tol == 0:
            return self.exact_backward()
        return self.certified_backward() if self.noise is None else self.noise.certified_backward()

    def by_onednn(self, rows: int, cols: int, width: int) -> bool:
        """Whether the products of a tile with rows of ``width`` go to a library with memory of its own
        (``products_torch``)."""
        return (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and rows * cols * width >= LEAST_WORK
            and onednn_is_faster()
        )

    def logits_product(self, rows: int, cols: int) -> int:
        """What such a library holds of a tile of logits: a part of them, and the terms of a part."""
        if not self.by_onednn(rows, cols, self.width):
            return 0
        part = min(cols, CPU_PRODUCT_BYTES // 4 // (4 * TERMS))
        terms = 4 * part * TERMS if self.width > TERMS else 0
        return min(CPU_PRODUCT_BYTES, 4 * rows * part) + terms

    def product(self, rows: int, cols: int) -> int:
        """The same of a backward: its products, logits, dW and the generator's gradient, take turns."""
        # Last columns of the rows have gaps between them, which such a library does not take.
        widths = [self.width] if self.need_weight and self.trained == self.width else []
        if self.noise is not None and self.noise.trained:
            widths.append(self.noise.width)
        turned = (self._turned(rows, cols, width) for width in widths)
        return max([self.logits_product(rows, cols), *turned])

    def _turned(self, rows: int, cols: int, width: int) -> int:
        """A part of the tile turned over, and of its product with rows of ``width``."""
        if not self.by_onednn(rows, cols, width):
            return 0
        parts = max(1, -(-4 * cols * width // CPU_PRODUCT_BYTES))
        return 4 * -(-cols // parts) * (rows + width)

    def exact_forward(self) -> int:
        rows, cols = self.tile()
        elements = rows * cols + rows * self.width + self.narrow * cols * self.width
        # With statistics a tile stays beside its exponentials, which are made after the product.
        beside = self.stats * rows * cols * self.wide
        if self.noise is not None:
            elements += self.noise.forward_elements(rows, cols)
            beside = self.noise.draw_bytes(self.noise.part(rows) // LANES)
        return self.wide * elements + max(beside, self.logits_product(rows, cols))

    def exact_backward(self) -> int:
        rows, cols = self.tile()
        elements = (2 if self.softcap else 1) * rows * cols
        elements += rows * self.width + self.narrow * cols * self.width
        if self.noise is not None or self.n <= self.vocab:
            elements += self.need_hidden * self.n * self.width
            elements += self.narrow * self.need_weight * cols * self.trained
        else:
            elements += self.narrow * self.need_weight * self.vocab * self.trained
            elements += self.need_hidden * rows * self.width
        if self.noise is not None:
            elements += self.noise.backward_elements(rows, cols)
        drawn = 0 if self.noise is None else self.noise.draw_bytes(rows * cols // LANES)
        return self.wide * elements + max(self.product(rows, cols), drawn)

    def tile(self) -> Tile:
        return plan_tile(self.n, self.vocab, self.width, self.device, self.dtype)

    def certified_forward(self) -> int:
        height = block_rows(self.device)
        plan = plan_certified_forward(
            self.n, self.vocab, self.width, height, self.device, self.dtype, self.narrow
        )
        masks = 4 * words(self.vocab) * (plan.window_rows + -(-self.n // height))
        elements = (plan.chunk_rows + plan.tile_rows) * self.vocab + plan.chunk_rows * self.width
        product = self.logits_product(plan.chunk_rows, plan.product_cols)
        product += self.wide * self.narrow * plan.product_cols * self.width
        if self.noise is not None:
            elements += self.noise.projected
            product = max(product, self.noise.chunk_bytes(plan.chunk_rows))
        return self.wide * elements + masks + product

    def certified_backward(self) -> int:
        height = block_rows(self.device)
        plan = plan_certified_backward(self.vocab, self.width, height, self.device, self.dtype)
        rows, cols = min(self.n, plan.group_rows), min(self.vocab, plan.piece_cols)
        room = self.stored * cols * self.width
        room += self.wide * (cols * self.trained + rows * cols)
        held = self.wide * 2 * rows * self.width  # the group's rows and their gradient
        gathered = self.narrow * self.wide * cols * self.width + rows // height * self.vocab
        tile = plan_tile(rows, self.vocab, self.width, self.device, self.dtype)
        dense_cols = min(tile.cols, cols) if self.narrow else tile.cols
        dense = self.wide * (tile.rows + self.narrow * self.width) * dense_cols
        dense += self.product(tile.rows, dense_cols)
        gathered += self.product(rows, cols)
        sums = 0
        if self.narrow and self.need_weight:
            sliced = self.low_memory or self.n <= self.vocab
            slice_cols = min(self.vocab, plan.slice_cols) if sliced else self.vocab
            sums = self.wide * slice_cols * self.trained
            if self.need_hidden and not self.low_memory and slice_cols < self.vocab:
                sums += self.wide * self.n * self.width
        return room + held + max(gathered, dense) + sums


class _Noise:
    """What noise adds to a call: its generator has ``width`` inputs, the rank or H."""

    def __init__(
        self, call: _Call, weight: Tensor, named: dict[str, Any], needed: list[bool] | None
    ) -> None:
        self.call, self.width, self.stored = call, weight.shape[1], weight.dtype.itemsize
        self.narrow = weight.dtype != call.dtype
        self.trained = bool(needed and needed[3])
        self.clean = bool(named.get("want_clean"))
        low_rank = named.get("noise_proj") is not None
        self.projected = call.n * self.width if low_rank else 0
        self.projected_gradient = (
            self.projected if needed is not None and (needed[0] or needed[4]) else 0
        )

    def part(self, rows: int) -> int:
        """Elements of the part of a tile of so many rows for which σ is made at a time."""
        call = self.call
        plan = plan_noisy_tile(rows, call.vocab, call.width, call.device, call.dtype)
        return rows * min(plan.cols, call.vocab)

    def draw_bytes(self, counters: int) -> int:
        return _PER_COUNTER * min(counters, COUNTERS)

    def forward_elements(self, rows: int, cols: int) -> int:
        of_columns = self.narrow * cols * self.width
        return self.clean * rows * cols + 2 * self.part(rows) + of_columns + self.projected

    def backward_elements(self, rows: int, cols: int) -> int:
        part = self.part(rows)
        of_columns = self.narrow * cols * self.width * (1 + self.trained)
        return rows * cols + part + of_columns + self.projected + self.projected_gradient

    def chunk_bytes(self, rows: int) -> int:
        """Beside a chunk of the certified forward: a draw and σ, and columns of the generator."""
        part = self.part(rows)
        elements = 2 * part + self.narrow * part // rows * self.width
        return self.call.wide * elements + self.draw_bytes(part // LANES)

    def certified_backward(self) -> int:
        """The room of pieces of columns and of tiles, a group's rows and gradient, and the sums over groups."""
        call = self.call
        height = block_rows(call.device)
        both = call.width + self.width
        plan = plan_certified_backward(
            call.vocab, both, height, call.device, call.dtype, NOISY_TILES
        )
        rows, cols = min(call.n, plan.group_rows), min(call.vocab, plan.piece_cols)
        of_columns = call.narrow * call.width + self.narrow * self.width  # widened
        of_columns += call.need_weight * call.width + self.trained * self.width
        x_width = self.width if self.projected else 0
        of_rows = call.width + call.need_hidden * call.width + x_width
        of_rows += x_width if self.projected_gradient else 0
        summed = call.need_hidden * call.n * call.width + self.projected + self.projected_gradient
        sliced = call.narrow * call.need_weight * call.width
        sliced += self.narrow * self.trained * self.width
        elements = NOISY_TILES * rows * cols + of_columns * cols + of_rows * rows + summed
        elements += sliced * min(call.vocab, plan.slice_cols)
        gathered = cols * (call.stored * call.width + self.stored * self.width)
        unions = rows // height * call.vocab
        beside = max(call.product(rows, cols), self.draw_bytes(rows * cols))
        return call.wide * elements + gathered + unions + beside
