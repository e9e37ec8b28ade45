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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpo.kernels.chunking import (
    CPU_PRODUCT_BYTES,
    plan_certified_backward,
    plan_certified_forward,
    plan_noisy_tile,
    plan_tile,
)
from fastpo.kernels.nucleus import block_rows, words
from fastpo.kernels.precision import accumulation_dtype
from fastpo.kernels.products_torch import LEAST_WORK, onednn_is_faster

_PER_TOKEN = 8  # vectors of a number per token that are alive at once, at most


def workspace_bytes(device: torch.device, operation: Any, arguments: tuple[Any, ...]) -> int:
    """Bytes of one call.

    Args:
        device: what the run is for; the arguments' own is a stand-in.
        operation: of the namespace ``fastpo``; other ones than the log-probs hold nothing of note.
        arguments: as the operation takes them, tensors by shape and dtype alone.
    """
    named = dict(zip((a.name for a in operation._schema.arguments), arguments, strict=False))
    if "hidden" not in named or "weight" not in named:
        return 0
    call = _Call(device, named)
    backward = "lse" in named
    if call.tol > 0:
        used = call.certified_backward() if backward else call.certified_forward()
    else:
        used = call.exact_backward() if backward else call.exact_forward()
    return used + _PER_TOKEN * call.wide * call.n


class _Call:
    """The sizes of a call, and what each direction holds."""

    def __init__(self, device: torch.device, named: dict[str, Any]) -> None:
        hidden: Tensor = named["hidden"]
        weight: Tensor = named["weight"]
        self.device = device
        self.n, (self.vocab, self.width) = hidden.shape[0], weight.shape
        self.dtype = accumulation_dtype(hidden.dtype)
        self.wide = self.dtype.itemsize
        self.stored = weight.dtype.itemsize
        self.narrow = weight.dtype != self.dtype
        self.tol = float(named.get("tol") or 0.0)
        self.low_memory = bool(named.get("low_memory"))
        self.stats = bool(named.get("want_stats"))
        self.softcap = named.get("softcap") is not None
        needed = named.get("needed")  # of a noisy operation: hidden and weight stand first
        self.need_hidden = bool(named.get("need_hidden", needed and needed[0]))
        self.need_weight = bool(named.get("need_weight", needed and needed[1]))
        self.noisy = "noise_weight" in named

    def _tile(self) -> tuple[int, int, int]:
        """Rows and columns of a tile, and how many of them noise adds: σ and its draw."""
        plan = plan_noisy_tile if self.noisy else plan_tile
        rows, cols = plan(self.n, self.vocab, self.width, self.device, self.dtype)
        return rows, cols, 3 if self.noisy else 0

    def _by_onednn(self, rows: int, cols: int) -> bool:
        """Whether a tile's products go to a library with memory of its own (``products_torch``)."""
        return (
            self.device.type == "cpu"
            and self.dtype == torch.float32
            and rows * cols * self.width >= LEAST_WORK
            and onednn_is_faster()
        )

    def _logits_product(self, rows: int, cols: int) -> int:
        """What such a library holds of a tile of logits: a part of them, and the terms of a part."""
        if not self._by_onednn(rows, cols):
            return 0
        return min(CPU_PRODUCT_BYTES, 4 * rows * cols) * 5 // 4

    def _gradient_product(self, rows: int, cols: int) -> int:
        """The same of dW's product with a tile: the tile turned over, and a part of dW."""
        if not (self.need_weight and self._by_onednn(rows, cols)):
            return 0
        parts = max(1, -(-4 * cols * self.width // CPU_PRODUCT_BYTES))
        return 4 * -(-cols // parts) * (rows + self.width)

    def exact_forward(self) -> int:
        rows, cols, noise = self._tile()
        elements = (1 + noise) * rows * cols + rows * self.width + self.narrow * cols * self.width
        # With statistics a tile stays beside its exponentials, which are made after the product.
        beside = self.stats * rows * cols * self.wide
        return self.wide * elements + max(beside, self._logits_product(rows, cols))

    def exact_backward(self) -> int:
        rows, cols, noise = self._tile()
        tiles = (2 if self.softcap else 1) + noise
        elements = tiles * rows * cols + rows * self.width + self.narrow * cols * self.width
        if self.n <= self.vocab:
            elements += self.need_hidden * self.n * self.width
            elements += self.narrow * self.need_weight * cols * self.width
        else:
            elements += self.narrow * self.need_weight * self.vocab * self.width
            elements += self.need_hidden * rows * self.width
        products = self._logits_product(rows, cols), self._gradient_product(rows, cols)
        return self.wide * elements + max(products)

    def certified_forward(self) -> int:
        height = block_rows(self.device)
        plan = plan_certified_forward(
            self.n, self.vocab, self.width, height, self.device, self.dtype, self.narrow
        )
        masks = 4 * words(self.vocab) * (plan.window_rows + -(-self.n // height))
        elements = (plan.chunk_rows + plan.tile_rows) * self.vocab + plan.chunk_rows * self.width
        elements += self.narrow * plan.product_cols * self.width
        product = self._logits_product(plan.chunk_rows, plan.product_cols)
        return self.wide * elements + masks + product

    def certified_backward(self) -> int:
        height = block_rows(self.device)
        plan = plan_certified_backward(
            self.vocab, self.width, height, self.device, self.dtype, tiles=4 if self.noisy else 1
        )
        rows, cols = min(self.n, plan.group_rows), min(self.vocab, plan.piece_cols)
        room = self.stored * cols * self.width
        room += self.wide * (cols * self.width + rows * cols * (4 if self.noisy else 1))
        held = self.wide * 2 * rows * self.width  # the group's rows and their gradient
        gathered = self.narrow * self.wide * cols * self.width + rows // height * self.vocab
        tile = plan_tile(rows, self.vocab, self.width, self.device, self.dtype)
        dense_cols = min(tile.cols, cols) if self.narrow else tile.cols
        dense = self.wide * (tile.rows + self.narrow * self.width) * dense_cols
        dense += self._gradient_product(tile.rows, dense_cols)
        gathered += self._gradient_product(rows, cols)
        sums = 0
        if self.narrow and self.need_weight:
            sliced = self.low_memory or self.n <= self.vocab
            slice_cols = min(self.vocab, plan.slice_cols) if sliced else self.vocab
            sums = self.wide * slice_cols * self.width
            if self.need_hidden and not self.low_memory and slice_cols < self.vocab:
                sums += self.wide * self.n * self.width
        return room + held + max(gathered, dense) + sums
