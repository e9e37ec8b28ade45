"""Gradients of the noisy log-probs on one tile, in PyTorch, and where they are summed up.

With dz̃ = c·(1[v = y] − p̃), for the rows and columns of a tile:

    dz = dz̃·dz/du        dh += dz w      dw += dzᵀ h      db += Σ_rows dz
    dσ = dz̃∘ε            dx += dσ u      du += dσᵀ x      ds += Σ_rows dσ

Shapes: R rows, C columns; h (R, H), w (C, H), x (R, ·) and u (C, ·), where x is h (and dx is dh) if the
generator has full rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import spans
from .linear_logprobs_torch import add_products, logit_tile, softmax_gradient_, write_rows
from .logit_transform import IDENTITY, LogitTransform
from .noise import Needed, Noise, NoisyGradients
from .precision import accumulation_dtype
from .products_torch import add_product, multiply

GATHERED_ROWS = 512  # widened at a time
OF_VOCABULARY = ("weight", "bias", "noise_weight", "noise_bias")


class Rows(NamedTuple):
    """What a tile takes of its rows, and what it adds to."""

    h: Tensor  # (R, H)
    x: Tensor  # (R, ·)
    lse: Tensor  # (R,)
    grad: Tensor  # (R,)
    dh: Tensor | None  # (R, H)
    dx: Tensor | None  # (R, ·)

    def part(self, r: slice) -> Rows:
        return Rows(*(None if t is None else t[r] for t in self))  # type: ignore[arg-type]


class Columns(NamedTuple):
    """What a tile takes of its columns, and what it adds to."""

    w: Tensor  # (C, H)
    b: Tensor | None  # (C,)
    u: Tensor  # (C, ·)
    s: Tensor | None  # (C,)
    dw: Tensor | None  # (C, H)
    db: Tensor | None  # (C,)
    du: Tensor | None  # (C, ·)
    ds: Tensor | None  # (C,)


class Tiles:
    """Room for a few tiles of the same shape, all overwritten by each step."""

    def __init__(self, count: int, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty((count, elements), dtype=dtype, device=device)

    def of(self, rows: int, cols: int) -> tuple[Tensor, ...]:
        """(rows, cols) each."""
        return self.flat[:, : rows * cols].view(-1, rows, cols).unbind()


def add_tile_gradients(
    rows: Rows,
    columns: Columns,
    label: Tensor,  # (R,) int64 in [0, C): where among the columns the row's label is
    inside: Tensor,  # (R,) bool: whether it is there at all
    transform: LogitTransform,
    draw: Tensor,  # (R, C) ε; overwritten, as are the next two
    room: Tensor,  # (R, C)
    free: Tensor,  # (R, F): σ is made so many columns at a time
    keep: Callable[[Tensor], None] | None = None,
) -> None:
    """Make a tile of noisy logits again; add all products of its dz and dσ.

    ``keep`` zeroes what of dz̃ is not to be used.
    """
    z = logit_tile(rows.h, columns.w, columns.b, transform, room)
    slope = transform.derivative(z)
    for c in spans(z.shape[1], free.shape[1]):
        part = free.flatten()[: len(z) * (c.stop - c.start)].view(len(z), -1)
        s = None if columns.s is None else columns.s[c]
        z[:, c].addcmul_(logit_tile(rows.x, columns.u[c], s, IDENTITY, part), draw[:, c])
    dz = softmax_gradient_(z, label, inside, rows.lse, rows.grad)
    if keep is not None:
        keep(dz)
    add_products(draw.mul_(dz), rows.x, columns.u, rows.dx, columns.du, columns.ds)
    if rows.dh is None and columns.dw is None and columns.db is None:
        return
    if isinstance(slope, Tensor) or slope != 1.0:
        dz.mul_(slope)
    add_products(dz, rows.h, columns.w, rows.dh, columns.dw, columns.db)


class GradientSums:
    """The wanted gradients while they are summed up, in ``accumulation_dtype``.

    Those of the rows are held whole. Those of the vocabulary are summed in place, or, in a lower precision,
    for one slice of the vocabulary at a time.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,  # (n,) int64 into hidden
        noise: Noise,
        needed: Needed,
    ) -> None:
        self.hidden, self.rows, self.noise, self.needed = hidden, rows, noise, needed
        self.dtype = dtype = accumulation_dtype(hidden.dtype)
        n, device = rows.numel(), hidden.device
        self.dh = self.dx = None
        if needed.hidden:
            self.dh = torch.zeros((n, hidden.shape[1]), dtype=dtype, device=device)
        if noise.projection is None:
            self.dx = self.dh
        elif needed.hidden or needed.noise_projection:
            self.dx = torch.zeros((n, noise.weight.shape[1]), dtype=dtype, device=device)
        inputs = zip(OF_VOCABULARY, (weight, bias, noise.weight, noise.bias), strict=True)
        self.whole = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            for name, tensor in inputs
            if tensor is not None and getattr(needed, name)
        }
        self.narrow = {name for name, t in self.whole.items() if t.dtype != dtype}

    def slices(self, length: int) -> list[slice]:
        """The slices of the vocabulary to be walked one after the other, ``length`` where it must be sliced."""
        vocab = self.noise.weight.shape[0]
        return list(spans(vocab, length if self.narrow else vocab))

    def of_slice(self, v: slice) -> dict[str, Tensor]:
        """Sums of the slice v, to add to: views, or zeros that ``end_slice`` writes back."""
        return {
            name: torch.zeros_like(tensor[v], dtype=self.dtype)
            if name in self.narrow
            else tensor[v]
            for name, tensor in self.whole.items()
        }

    def end_slice(self, v: slice, sums: dict[str, Tensor]) -> None:
        for name in self.narrow:
            self.whole[name][v].copy_(sums[name])

    def finish(self) -> NoisyGradients:
        """All of them, in the dtypes of the inputs."""
        d_projection = None
        if self.noise.projection is not None and self.dx is not None:
            a = self.noise.projection.to(self.dtype)
            wide = torch.zeros_like(a) if self.needed.noise_projection else None
            for r, h in row_blocks(self.hidden, self.rows, self.dtype):
                if wide is not None:
                    add_product(wide, self.dx[r].t(), h)
                if self.dh is not None:
                    add_product(self.dh[r], self.dx[r], a)
            d_projection = None if wide is None else wide.to(self.noise.projection.dtype)
        d_hidden = None
        if self.dh is not None:
            like = self.hidden
            d_hidden = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            write_rows(d_hidden, self.rows, slice(0, self.rows.numel()), self.dh)
        return NoisyGradients(
            hidden=d_hidden,
            noise_projection=d_projection,
            **{name: self.whole.get(name) for name in OF_VOCABULARY},
        )


def project(hidden: Tensor, rows: Tensor, noise: Noise) -> Tensor | None:
    """x (n, ·) of a generator of low rank, None of one of full rank, whose x is h."""
    if noise.projection is None:
        return None
    dtype = accumulation_dtype(hidden.dtype)
    a = noise.projection.to(dtype)
    x = hidden.new_empty((rows.numel(), a.shape[0]), dtype=dtype)
    for r, h in row_blocks(hidden, rows, dtype):
        multiply(h, a, out=x[r])
    return x


def row_blocks(hidden: Tensor, rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of hidden in ``dtype``, a few at a time."""
    for r in spans(rows.numel(), GATHERED_ROWS):
        yield r, hidden[rows[r]].to(dtype)
