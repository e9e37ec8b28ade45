"""Token log-probabilities under noisy logits, in PyTorch, one tile at a time: the noise of DNPO.

    z̃ = z + σ∘ε        σ = U x + s        x = h, or A h for a generator of low rank
    log p_y = z̃_y − lse(z̃)

z is the logit of ``linear_logprobs``, ε a pure function of (seed, token index, vocabulary index)
(``philox_torch``), so the backward makes the noise of the forward again. With dz̃ = c·(1[v = y] − p̃) the
gradients are those of z with dz = dz̃, and through σ, with dσ = dz̃∘ε:

    dU = dσᵀ x        ds = Σ_rows dσ        dx = dσ U        (dA = dxᵀ h, dh += dx A)

Shapes: n tokens with a label, hidden (N, H), weight (V, H), U (V, R), A (R, H), R = H without A. Neither
logits nor σ nor ε exist beyond a tile; x of a low rank is made once. The sign of σ is free, as ε is symmetric.
Cost: 2 products and a draw in the forward; in the backward these again, and a product for every gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import Tile, plan_tile, spans
from .linear_logprobs_torch import (
    LEAST_EXPONENT,
    add_products,
    labels_in_tile,
    logit_tile,
    pick_labels,
    row_block,
    softmax_gradient_,
    vocabulary_slice,
    write_rows,
)
from .logit_transform import IDENTITY, LogitTransform
from .philox_torch import normal_tile
from .precision import accumulation_dtype, full_precision


class Noise(NamedTuple):
    """A generator of noise, and which noise it makes."""

    weight: Tensor  # (V, R) U
    projection: Tensor | None  # (R, H) A, or None: R = H
    bias: Tensor | None  # (V,) s
    seed: int  # in [0, 2⁶⁴)
    tokens: Tensor  # (n,) int64 indices of the tokens with a label


class NoisyForward(NamedTuple):
    """What the forward leaves for every token."""

    logps: Tensor  # (n,) z̃_label − lse(z̃)
    lse: Tensor  # (n,) log Σ_v exp(z̃_v)
    clean_logps: Tensor | None  # (n,) without the noise, if asked for


class Needed(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    noise_weight: bool
    noise_projection: bool
    noise_bias: bool


class NoisyGradients(NamedTuple):
    """The gradients that were wanted, in the dtypes of the inputs; None else."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    noise_weight: Tensor | None  # (V, R)
    noise_projection: Tensor | None  # (R, H)
    noise_bias: Tensor | None  # (V,)


class _Sums:
    """log Σ exp of rows whose entries come a tile at a time."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        # Finite, so that the first decay is exp(−∞) = 0 and not NaN.
        self.peak = like.new_full((n,), torch.finfo(dtype).min, dtype=dtype)
        self.total = like.new_zeros(n, dtype=dtype)
        self.label_logit = like.new_zeros(n, dtype=dtype)

    def add(self, z: Tensor, labels: Tensor, r: slice, v: slice, room: Tensor) -> None:
        """A tile z of the rows r and the vocabulary entries v; ``room`` is as large, and overwritten."""
        pick_labels(z, labels[r], v, self.label_logit[r])
        peak = torch.maximum(self.peak[r], z.amax(dim=1))
        shifted = torch.sub(z, peak.unsqueeze(1), out=room).clamp_(min=LEAST_EXPONENT[z.dtype])
        self.total[r] = torch.exp(self.peak[r] - peak) * self.total[r] + shifted.exp_().sum(dim=1)
        self.peak[r] = peak

    def finish(self) -> tuple[Tensor, Tensor]:
        log_total = self.total.log()
        return (self.label_logit - self.peak) - log_total, self.peak + log_total


class _Rooms:
    """Room for the three tiles of a step: logits, draw, and σ or another temporary."""

    def __init__(self, tile: Tile, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty((3, tile.rows * tile.cols), dtype=dtype, device=device)

    def of(self, r: slice, v: slice) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = r.stop - r.start, v.stop - v.start
        z, draw, free = self.flat[:, : rows * cols].view(3, rows, cols).unbind()
        return z, draw, free


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor,  # (n,) int64 into hidden
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
) -> NoisyForward:
    """Log-probs under the noise; slices of the vocabulary outside, blocks of rows inside."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    tile = plan_tile(n, vocab, width, hidden.device, dtype)
    noisy = _Sums(n, hidden, dtype)
    clean = _Sums(n, hidden, dtype) if want_clean else None
    rooms = _Rooms(tile, dtype, hidden.device)
    with full_precision(hidden.device):
        projected = _project(hidden, rows, noise, tile, dtype)
        for v in spans(vocab, tile.cols):
            w, b = vocabulary_slice(weight, bias, v, dtype)
            u, s = vocabulary_slice(noise.weight, noise.bias, v, dtype)
            for r in spans(n, tile.rows):
                h = row_block(hidden, rows, r, dtype)
                x = h if projected is None else projected[r]
                room, draw, free = rooms.of(r, v)
                z = logit_tile(h, w, b, transform, room)
                if clean is not None:
                    clean.add(z, labels, r, v, free)
                normal_tile(noise.seed, noise.tokens[r], v.start, v.stop, draw)
                z.addcmul_(logit_tile(x, u, s, IDENTITY, free), draw)
                noisy.add(z, labels, r, v, free)
    return NoisyForward(*noisy.finish(), None if clean is None else clean.finish()[0])


def backward(
    grad: Tensor,  # (n,) d loss / d noisy log-prob
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    lse: Tensor,  # (n,) of the forward
    transform: LogitTransform,
    noise: Noise,
    needed: Needed,
) -> NoisyGradients:
    """Exact gradients; a product not needed is not made."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    device = hidden.device
    tile = plan_tile(n, vocab, width, device, dtype)
    grad = grad.to(dtype)
    rooms = _Rooms(tile, dtype, device)
    wants_input = needed.noise_projection or (needed.hidden and noise.projection is not None)

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return torch.zeros(shape, dtype=dtype, device=device) if wanted else None

    dh = zeros(needed.hidden, n, width)
    dx = zeros(wants_input, n, noise.weight.shape[1]) if noise.projection is not None else dh
    of_vocabulary = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in (
            ("weight", weight), ("bias", bias),
            ("noise_weight", noise.weight), ("noise_bias", noise.bias),
        )
        if tensor is not None and getattr(needed, name)
    }  # fmt: skip

    with full_precision(device):
        projected = _project(hidden, rows, noise, tile, dtype)
        for v in spans(vocab, tile.cols):
            w, b = vocabulary_slice(weight, bias, v, dtype)
            u, s = vocabulary_slice(noise.weight, noise.bias, v, dtype)
            sums = {
                name: torch.zeros_like(tensor[v], dtype=dtype)
                for name, tensor in of_vocabulary.items()
            }
            for r in spans(n, tile.rows):
                h = row_block(hidden, rows, r, dtype)
                x = h if projected is None else projected[r]
                room, draw, free = rooms.of(r, v)
                z = logit_tile(h, w, b, transform, room)
                slope = transform.derivative(z)
                normal_tile(noise.seed, noise.tokens[r], v.start, v.stop, draw)
                z.addcmul_(logit_tile(x, u, s, IDENTITY, free), draw)
                dz = softmax_gradient_(z, *labels_in_tile(labels[r], v), lse[r], grad[r])
                add_products(
                    draw.mul_(dz), x, u,
                    None if dx is None else dx[r], sums.get("noise_weight"), sums.get("noise_bias"),
                )  # fmt: skip
                if isinstance(slope, Tensor) or slope != 1.0:
                    dz.mul_(slope)
                add_products(
                    dz, h, w, None if dh is None else dh[r], sums.get("weight"), sums.get("bias")
                )
            for name, tensor in of_vocabulary.items():
                tensor[v].copy_(sums[name])
        d_projection = None
        if noise.projection is not None and dx is not None:
            a = noise.projection.to(dtype)
            wide = zeros(needed.noise_projection, *a.shape)
            for r in spans(n, tile.rows):
                if wide is not None:
                    wide.addmm_(dx[r].t(), row_block(hidden, rows, r, dtype))
                if dh is not None:
                    dh[r].addmm_(dx[r], a)
            d_projection = None if wide is None else wide.to(noise.projection.dtype)

    d_hidden = None
    if dh is not None:
        d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=device)
        write_rows(d_hidden, rows, slice(0, n), dh)
    return NoisyGradients(
        hidden=d_hidden,
        noise_projection=d_projection,
        **{
            name: of_vocabulary.get(name)
            for name in ("weight", "bias", "noise_weight", "noise_bias")
        },
    )


def _project(
    hidden: Tensor, rows: Tensor, noise: Noise, tile: Tile, dtype: torch.dtype
) -> Tensor | None:
    """x (n, R) of a generator of low rank, None of one of full rank, whose x is h."""
    if noise.projection is None:
        return None
    a = noise.projection.to(dtype).t()
    x = hidden.new_empty((rows.numel(), a.shape[1]), dtype=dtype)
    for r in spans(rows.numel(), tile.rows):
        torch.mm(row_block(hidden, rows, r, dtype), a, out=x[r])
    return x
