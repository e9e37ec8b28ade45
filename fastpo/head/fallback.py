"""Log-probs from logits, for heads and tails that the operation cannot compute itself.

Only rows with a label are taken, a chunk at a time, and a chunk's logits are recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpo.head.tail import Tail
from fastpo.kernels.chunking import budget_bytes, spans
from fastpo.kernels.precision import accumulation_dtype
from fastpo.ops.linear_logprobs import TokenStats, exact_statistics

LOGIT_COPIES = 4  # logits as they come, in float32, their log-softmax and its gradient


def chunked_logprobs(
    to_logits: Callable[[Tensor], Tensor],  # (m, K) → (m, V)
    source: Tensor,  # (n, K): a row for each kept label
    labels: Tensor,  # (B, T)
    rows: Tensor,  # (n,) flat positions of the kept labels
    vocab: int,
    tail: Tail,
    temperature: float,
    want_stats: bool,
) -> tuple[Tensor, TokenStats | None]:
    """(B, T) log-probs, 0 where no label is, and statistics, as from ``fastpo.linear_logprobs``."""
    wanted = labels.reshape(-1)[rows]

    def chunk_logprobs(block: Tensor, block_labels: Tensor) -> tuple[Tensor, ...]:
        logits = to_logits(block)
        logits = tail.apply(logits.to(accumulation_dtype(logits.dtype))) / temperature
        all_logps = torch.log_softmax(logits, dim=-1)
        logps = all_logps.gather(1, block_labels[:, None]).squeeze(1)
        if not want_stats:
            return (logps,)
        with torch.no_grad():
            entropy = torch.special.entr(all_logps.exp()).sum(1)
            return logps, entropy, logits.argmax(1) == block_labels, logits.mean(1)

    step = max(1, budget_bytes(source.device) // (4 * LOGIT_COPIES * vocab))
    # One chunk at least: with no label at all the result still belongs to the graph.
    parts = [
        checkpoint(chunk_logprobs, source[r], wanted[r], use_reentrant=False)
        for r in list(spans(len(rows), step)) or [slice(0, 0)]
    ]

    def per_token(values: tuple[Tensor, ...]) -> Tensor:
        flat = torch.cat(values)
        return flat.new_zeros(labels.numel()).index_copy(0, rows, flat).view(labels.shape)

    logps, *stats = (per_token(values) for values in zip(*parts, strict=True))
    if not want_stats:
        return logps, None
    entropy, top1, logit_mean = (values.detach() for values in stats)
    per_call = exact_statistics(len(rows), source)
    return logps, TokenStats(entropy, top1, logit_mean, *per_call)
