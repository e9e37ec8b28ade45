"""The promise of the certified backward, checked against probabilities computed once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastpo.kernels.chunking import plan_tile, spans
from fastpo.kernels.linear_logprobs_torch import LEAST_EXPONENT, logit_tile, vocabulary_slice
from fastpo.kernels.logit_transform import IDENTITY, LogitTransform
from fastpo.kernels.noise import Noise
from fastpo.kernels.noisy_gradients_torch import project
from fastpo.kernels.nucleus import block_rows, column_mask
from fastpo.kernels.philox_torch import normal_tile
from fastpo.kernels.precision import accumulation_dtype, full_precision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SLACK = 1e-3  # of tol, beside what rounding does to a sum of probabilities


def dropped_masses(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor,  # (n,) int64 into hidden, in block order
    lse: Tensor,  # (n,)
    columns: Tensor,  # (blocks, words) int32
    counts: Tensor,  # (blocks,) int32
    transform: LogitTransform,
    noise: Noise | None = None,
) -> Tensor:  # (n,)
    """Probability of each row outside its block's columns: a pass over all logits, in tiles.

    With ``noise``, whose tokens are in block order, that of the noisy logits.
    """
    dtype = accumulation_dtype(hidden.dtype)
    vocab, height = weight.shape[0], block_rows(hidden.device)
    dropped = hidden.new_zeros(rows.numel(), dtype=dtype)
    with full_precision(hidden.device):
        for block, places in enumerate(spans(rows.numel(), height)):
            h = hidden[rows[places]].to(dtype)
            x = None if noise is None else project(hidden, rows[places], noise)
            left_out = ~column_mask(columns[block : block + 1], vocab)
            left_out &= counts[block] < vocab
            step = plan_tile(h.shape[0], vocab, h.shape[1], hidden.device, dtype).cols
            for v in spans(vocab, step):
                b = None if bias is None else bias[v].to(dtype)
                z = logit_tile(h, weight[v].to(dtype), b, transform)
                if noise is not None:
                    u, s = vocabulary_slice(noise.weight, noise.bias, v, dtype)
                    sigma = logit_tile(h if x is None else x, u, s, IDENTITY)
                    draw = torch.empty_like(z)
                    z.addcmul_(
                        sigma,
                        normal_tile(noise.seed, noise.tokens[places], v.start, v.stop, draw),
                    )
                z.sub_(lse[places].unsqueeze(1)).clamp_(min=LEAST_EXPONENT[dtype])
                dropped[places] += z.exp_().mul_(left_out[:, v]).sum(dim=1)
    return dropped


def check_certificate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    lse: Tensor,
    columns: Tensor,
    counts: Tensor,
    transform: LogitTransform,
    tol: float,
    noise: Noise | None = None,
    group: ProcessGroup | None = None,
) -> None:
    """Raise unless every row's dropped mass is at most ``tol``; arguments as ``dropped_masses`` has them.

    Over the ranks of ``group``, which hold shards of the vocabulary, masses are summed up, and all ranks raise.
    Rows whose lse is not finite promise nothing: their gradient is not finite either.

    Raises:
        RuntimeError: a row loses more; it is named with its mass.
    """
    dropped = dropped_masses(hidden, weight, bias, rows, lse, columns, counts, transform, noise)
    if group is not None:  # whose ranks have the rows in orders of their own
        per_row = dropped.new_zeros(hidden.shape[0]).index_copy_(0, rows, dropped)
        dist.all_reduce(per_row, group=group)
        dropped = per_row[rows]
    dropped = torch.where(lse.isfinite(), dropped, 0.0)
    if dropped.numel() and float(dropped.max()) > tol * (1 + SLACK) + 1e-6:
        place = int(dropped.argmax())
        raise RuntimeError(
            f"certified backward: row {int(rows[place])} loses {float(dropped[place]):.3e} of its probability, "
            f"more than tol {tol:.3e}"
        )
