"""Certified backward of ``noisy_linear_logprobs`` in PyTorch: gradients on the columns that carry probability.

The forward is that of ``certified_torch``, with σ∘ε added to each chunk of logits before its softmax, so the
nuclei are those of the noisy distribution p̃. The backward walks their blocks and columns as ``certified_torch``
does (``certified_groups_torch``) and makes on them logits, σ and ε again (z̃, dz̃ and dσ = dz̃∘ε are those of
``noisy_linear_logprobs_torch``). With dz̃ zero outside each block's union, for every token

    ‖error of dz̃‖₁ ≤ tol·|c|        ‖error of dσ‖₁ ≤ tol·|c|·max|ε|

Cost: in the forward 2 products and a draw; in the backward ρ times (2 products, a draw, and a product for every
gradient), ρ the share of (row, column) pairs that is made. Gathered columns are drawn one by one, four counters
where neighbours share one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import certified_torch
from .certified_groups_torch import Group, Piece, column_pieces, keep_needed, make_groups
from .chunking import plan_certified_backward, plan_noisy_tile, spans
from .linear_logprobs_torch import logit_tile, vocabulary_slice
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
from .noisy_linear_logprobs_torch import RunningSums
from .nucleus import Nuclei, block_rows
from .philox_torch import normal_columns, normal_tile
from .precision import accumulation_dtype, full_precision

TILES = 3  # held at a time: logits, ε, and σ or another temporary


def forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,) int64 in [0, V)
    rows: Tensor,  # (n,) int64 into hidden
    transform: LogitTransform,
    noise: Noise,
    want_clean: bool,
    tol: float,  # > 0
) -> tuple[NoisyForward, Nuclei]:
    """What ``noisy_linear_logprobs_torch.forward`` returns, and the nuclei for ``tol``."""
    dtype = accumulation_dtype(hidden.dtype)
    n, (vocab, width) = labels.numel(), weight.shape
    clean = RunningSums(n, hidden, dtype) if want_clean else None
    with full_precision(hidden.device):
        projected = project(hidden, rows, noise)

    def add_noise(z: Tensor, h: Tensor, places: slice) -> None:
        cols = plan_noisy_tile(len(z), vocab, width, h.device, dtype).cols
        tiles = Tiles(2, len(z) * min(cols, vocab), dtype, h.device)
        x = h if projected is None else projected[places]
        for v in spans(vocab, cols):
            draw, free = tiles.of(len(z), v.stop - v.start)
            if clean is not None:
                clean.add(z[:, v], labels, places, v, free)
            u, s = vocabulary_slice(noise.weight, noise.bias, v, dtype)
            normal_tile(noise.seed, noise.tokens[places], v.start, v.stop, draw)
            z[:, v].addcmul_(logit_tile(x, u, s, IDENTITY, free), draw)

    result, nuclei = certified_torch.forward(
        hidden, weight, bias, labels, rows, transform, False, tol, add_noise
    )
    clean_logps = None if clean is None else clean.finish()[0]
    return NoisyForward(result.logps, result.lse, clean_logps), nuclei


def backward(
    grad: Tensor,  # (n,) d loss / d noisy log-prob; rows here and below, and noise.tokens, in block order
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (n,)
    rows: Tensor,  # (n,) int64 into hidden, each at most once
    lse: Tensor,  # (n,)
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    transform: LogitTransform,
    noise: Noise,
    needed: Needed,
) -> NoisyGradients:
    """Gradients in the dtypes of the inputs, from each block's columns.

    Those of hidden and x are summed up in float32 whole, those of the vocabulary in place, or, where they have
    a lower precision, for a slice of it.
    """
    dtype = accumulation_dtype(hidden.dtype)
    device, vocab = hidden.device, weight.shape[0]
    gradients = GradientSums(hidden, weight, bias, rows, noise, needed)
    plan = plan_certified_backward(
        vocab, weight.shape[1] + noise.weight.shape[1], block_rows(device), device, dtype, TILES
    )
    grad = grad.to(dtype)
    groups = make_groups(grad, counts, vocab, plan)
    piece = min(vocab, plan.piece_cols)
    tiles = Tiles(TILES, min(rows.numel(), plan.group_rows) * piece, dtype, device)
    gathered = _Gathered(piece, weight, bias, noise, gradients)
    with full_precision(device):
        projected = project(hidden, rows, noise)
        for v in gradients.slices(plan.slice_cols):
            sums = gradients.of_slice(v)
            for group in groups:
                places = group.places
                h = hidden[rows[places]].to(dtype)
                x = h if projected is None else projected[places]
                dh, dx = (
                    None if total is None else torch.zeros_like(like)
                    for total, like in ((gradients.dh, h), (gradients.dx, x))
                )
                of_group = Rows(h, x, lse[places], grad[places], dh, dh if x is h else dx)
                for p in column_pieces(labels[places], columns, counts, vocab, v, group, piece):
                    of_piece = gathered.take(p.columns, v, sums)
                    drawn = noise._replace(tokens=noise.tokens[places])
                    _add_piece(
                        p, of_piece, group, of_group, p.columns + v.start, drawn, transform, tiles
                    )
                    gathered.put_back(p.columns, of_piece, sums)
                if gradients.dh is not None and dh is not None:
                    gradients.dh.index_add_(0, places, dh)
                if noise.projection is not None and gradients.dx is not None and dx is not None:
                    gradients.dx.index_add_(0, places, dx)
            gradients.end_slice(v, sums)
            del sums  # a name would keep the sums of this slice until those of the next are made
        return gradients.finish()


def _add_piece(
    piece: Piece,
    columns: Columns,
    group: Group,
    rows: Rows,  # of the group
    entries: Tensor,  # (C,) int64: the piece's columns in the vocabulary
    noise: Noise,  # its tokens those of the group
    transform: LogitTransform,
    tiles: Tiles,
) -> None:
    """What a group's blocks have of the gradients on a piece of their columns."""
    for first, last in piece.runs:
        r = slice(group.starts[first], group.starts[last])
        room, draw, free = tiles.of(r.stop - r.start, len(entries))
        if group.dense:  # the columns come in their own order: neighbours share a counter
            start = int(entries[0])
            normal_tile(noise.seed, noise.tokens[r], start, start + len(entries), draw)
        else:
            normal_columns(noise.seed, noise.tokens[r], entries, draw)
        keep = functools.partial(keep_needed, piece=piece, group=group, first=first, last=last)
        add_tile_gradients(
            rows.part(r),
            columns,
            piece.label[r],
            piece.inside[r],
            transform,
            draw,
            room,
            free,
            keep,
        )


class _Gathered:
    """Gathers a piece's columns, and the sums they add to, which it puts back.

    The room is kept: taken anew for each piece, its pages would cost more than the gather.
    """

    def __init__(
        self,
        length: int,
        weight: Tensor,
        bias: Tensor | None,
        noise: Noise,
        gradients: GradientSums,
    ) -> None:
        self.dtype = gradients.dtype
        inputs = zip(OF_VOCABULARY, (weight, bias, noise.weight, noise.bias), strict=True)
        self.inputs = dict(inputs)
        self.room = {
            name: torch.empty((length, *t.shape[1:]), dtype=t.dtype, device=t.device)
            for name, t in self.inputs.items()
            if t is not None
        }
        self.sums = {
            name: torch.empty((length, *t.shape[1:]), dtype=self.dtype, device=t.device)
            for name, t in gradients.whole.items()
        }

    def take(self, c: Tensor, v: slice, sums: dict[str, Tensor]) -> Columns:
        """Columns ``c`` of the slice v of the vocabulary."""
        values = (
            None
            if tensor is None
            else torch.index_select(tensor[v], 0, c, out=self.room[name][: len(c)]).to(self.dtype)
            for name, tensor in self.inputs.items()
        )
        parts = (
            torch.index_select(sums[name], 0, c, out=self.sums[name][: len(c)])
            if name in sums
            else None
            for name in OF_VOCABULARY
        )
        return Columns(*values, *parts)  # type: ignore[arg-type]

    def put_back(self, c: Tensor, columns: Columns, sums: dict[str, Tensor]) -> None:
        parts = (columns.dw, columns.db, columns.du, columns.ds)
        for name, part in zip(OF_VOCABULARY, parts, strict=True):
            if part is not None:
                sums[name].index_copy_(0, c, part)
