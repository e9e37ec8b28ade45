"""Token log-probabilities under noisy logits, in PyTorch, one tile at a time: the noise of DNPO.

    z̃ = z + σ∘ε        σ = U x + s        x = h, or A h for a generator of low rank
    log p_y = z̃_y − lse(z̃)

z is the logit of ``linear_logprobs``, ε a pure function of (seed, token index, vocabulary index)
(``philox_torch``), so the backward makes the noise of the forward again. The gradients are in
``noisy_gradients_torch``.

Shapes: n tokens with a label, hidden (N, H), weight (V, H), U (V, R), A (R, H), R = H without A. Neither
logits nor σ nor ε exist beyond a tile; σ, and in the forward ε, are made a quarter of one at a time, x of a low
rank once. The sign of σ is free, as ε is symmetric.
Cost: 2 products and a draw in the forward; in the backward these again, and a product for every gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunking import plan_noisy_tile, plan_tile, spans
from .linear_logprobs_torch import (
    LEAST_EXPONENT,
    labels_in_tile,
    logit_tile,
    pick_labels,
    row_block,
    vocabulary_slice,
)
from .logit_transform import IDENTITY, LogitTransform
from .noise import Needed, Noise, NoisyForward, NoisyGradients
from .noisy_gradients_torch import (
    OF_VOCABULARY,
    Columns,
    GradientSums,
    Rows,
    Tiles,
    add_tile_gradients,
    project,
)
from .philox_torch import normal_tile
from .precision import accumulation_dtype, full_precision


class RunningSums:
    """log Σ exp of rows whose entries come a tile at a time."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        # Finite, so that the first decay is exp(−∞) = 0 and not NaN.
        self.peak = like.new_full((n,), torch.finfo(dtype).min, dtype=dtype)
        self.total = like.new_zeros(n, dtype=dtype)
        self.label_logit = like.new_zeros(n, dtype=dtype)

    def add(self, z: Tensor, labels: Tensor, r: slice, v: slice, room: Tensor) -> None:
        """A tile z of rows r and vocabulary entries v; ``room``, as large or z itself, is overwritten."""
        pick_labels(z, labels[r], v, self.label_logit[r])
        peak = torch.maximum(self.peak[r], z.amax(dim=1))
        shifted = torch.sub(z, peak.unsqueeze(1), out=room).clamp_(min=LEAST_EXPONENT[z.dtype])
        self.total[r] = torch.exp(self.peak[r] - peak) * self.total[r] + shifted.exp_().sum(dim=1)
        self.peak[r] = peak

    def finish(self) -> tuple[Tensor, Tensor]:
        log_total = self.total.log()
        return (self.label_logit - self.peak) - log_total, self.peak + log_total


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor,  # (n,) int64 into hidden, ascending
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
) -> NoisyForward:
    """Log-probs under the noise; slices of the vocabulary outside, blocks of rows inside."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    gathered = None if n == len(hidden) else rows
    tile = plan_tile(n, vocab, width, hidden.device, dtype)
    noisy = RunningSums(n, hidden, dtype)
    clean = RunningSums(n, hidden, dtype) if want_clean else None
    parts = plan_noisy_tile(n, vocab, width, hidden.device, dtype)
    whole = Tiles(2 if want_clean else 1, tile.rows * tile.cols, dtype, hidden.device)
    spare = Tiles(2, tile.rows * parts.cols, dtype, hidden.device)
    with full_precision(hidden.device):
        projected = project(hidden, rows, noise)
        for v in spans(vocab, tile.cols):
            w, b = vocabulary_slice(weight, bias, v, dtype)
            u, s = vocabulary_slice(noise.weight, noise.bias, v, dtype)
            for r in spans(n, tile.rows):
                h = row_block(hidden, gathered, r, dtype)
                x = h if projected is None else projected[r]
                room, *copy = whole.of(len(h), v.stop - v.start)
                z = logit_tile(h, w, b, transform, room)
                # Whole tiles are summed, as in ``linear_logprobs``: without noise both give the same bits.
                if clean is not None:
                    clean.add(z, labels, r, v, *copy)
                for c in spans(v.stop - v.start, parts.cols):
                    draw, free = spare.of(len(h), c.stop - c.start)
                    entries = slice(v.start + c.start, v.start + c.stop)
                    normal_tile(noise.seed, noise.tokens[r], entries.start, entries.stop, draw)
                    sigma = logit_tile(x, u[c], None if s is None else s[c], IDENTITY, free)
                    z[:, c].addcmul_(sigma, draw)
                noisy.add(z, labels, r, v, room)
    return NoisyForward(*noisy.finish(), None if clean is None else clean.finish()[0])


def backward(
    grad: Tensor,  # (n,) d loss / d noisy log-prob
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,  # ascending
    lse: Tensor,  # (n,) of the forward
    transform: LogitTransform,
    noise: Noise,
    needed: Needed,
) -> NoisyGradients:
    """Exact gradients; a product not needed is not made."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    gathered = None if n == len(hidden) else rows
    tile = plan_tile(n, vocab, width, hidden.device, dtype)
    grad = grad.to(dtype)
    parts = plan_noisy_tile(n, vocab, width, hidden.device, dtype)
    tiles = Tiles(2, tile.rows * tile.cols, dtype, hidden.device)
    spare = Tiles(1, tile.rows * parts.cols, dtype, hidden.device)
    gradients = GradientSums(hidden, weight, bias, rows, noise, needed)
    with full_precision(hidden.device):
        projected = project(hidden, rows, noise)
        for v in spans(vocab, tile.cols):
            sums = gradients.of_slice(v)
            columns = Columns(
                *vocabulary_slice(weight, bias, v, dtype),
                *vocabulary_slice(noise.weight, noise.bias, v, dtype),
                *(sums.get(name) for name in OF_VOCABULARY),
            )
            for r in spans(n, tile.rows):
                h = row_block(hidden, gathered, r, dtype)
                x = h if projected is None else projected[r]
                dh, dx = (None if t is None else t[r] for t in (gradients.dh, gradients.dx))
                room, draw = tiles.of(len(h), v.stop - v.start)
                (free,) = spare.of(len(h), min(parts.cols, v.stop - v.start))
                normal_tile(noise.seed, noise.tokens[r], v.start, v.stop, draw)
                add_tile_gradients(
                    Rows(h, x, lse[r], grad[r], dh, dx), columns,
                    *labels_in_tile(labels[r], v), transform, draw, room, free,
                )  # fmt: skip
            gradients.end_slice(v, sums)
        return gradients.finish()
