"""The largest micro-step that the settings of a run allow, laid out by the run's own collator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastpo.data import PackedCollator, PreferenceCollator
from fastpo.data.collator import IGNORE_INDEX

if TYPE_CHECKING:
    from .config import EstimateConfig

# Beginnings of the names of attention implementations that read lengths or blocks and hold no mask.
_WITHOUT_MASK = ("flash", "flex")


class MicroStep(NamedTuple):
    """A batch of pairs of equal size.

    Attributes:
        sequences: prompt + answer, twice the pairs.
        length: tokens of a sequence.
        batch: what the collator makes of them.
        scored: share of ``labels`` that are scored.
        labels: what one device scores: all of the batch's, or those in the part that has most of them.
        hidden_index: where in its rows the hidden states are that score them; None: in the labels' places.
    """

    sequences: int
    length: int
    batch: dict[str, Tensor]
    scored: float
    labels: Tensor
    hidden_index: Tensor | None


def holds_masks(config: EstimateConfig) -> bool:
    """Whether the attention implementation holds a mask of all pairs of positions."""
    return not (config.attn_implementation or "").startswith(_WITHOUT_MASK)


def largest_micro_step(config: EstimateConfig) -> MicroStep:
    """``per_device_train_batch_size`` pairs of ``max_length`` tokens, or as many as ``tokens_per_batch`` takes.

    Under a budget the pairs are as long as they may be and yet fill it.

    Raises:
        ValueError: a budget below a prompt and two tokens, or shared prompts with an attention that cannot.
    """
    implementation = config.attn_implementation or ""
    if config.prefix_sharing and implementation.startswith("flash"):
        raise ValueError(
            f"prefix_sharing: got True with attn_implementation {implementation!r}, which knows no mask; "
            "expected flex_attention or sdpa"
        )
    prompt, length = config.prompt_length, config.max_length or 0
    once = prompt if config.prefix_sharing else 0
    pairs, budget = config.per_device_train_batch_size, config.tokens_per_batch
    if budget is not None:
        pairs = -(-budget // (2 * length - once))
        length = min(length, (budget // pairs + once) // 2)
        if length <= prompt:
            raise ValueError(
                f"tokens_per_batch: got {budget}, expected at least {2 * prompt + 2 - once} for a pair whose "
                f"prompt has {prompt} tokens"
            )
    answer = [1] * (length - prompt)
    rows = [
        {"prompt_ids": [1] * prompt, "chosen_ids": answer, "rejected_ids": answer, "row": k}
        for k in range(pairs)
    ]
    size = config.sequence_parallel_size
    if config.packs_rows:
        collator = PackedCollator(
            0,
            prefix_sharing=config.prefix_sharing,
            one_row=not holds_masks(config),
            pad_to_multiple_of=size,
        )
        batch = collator(rows)
        labels, index = batch["completion_labels"], batch["hidden_index"]
        if size > 1:
            labels, index = _most_labels(labels, index, batch["input_ids"].shape[1] // size, size)
        return MicroStep(2 * pairs, length, batch, 1.0, labels, index)
    batch = PreferenceCollator(0, pad_to_multiple_of=size)(rows)
    labels = batch["completion_labels"]
    labels = max(labels.chunk(size, dim=1), key=lambda part: int((part != IGNORE_INDEX).sum()))
    scored = float((labels != IGNORE_INDEX).float().mean())
    return MicroStep(2 * pairs, length, batch, scored, labels, None)


def _most_labels(labels: Tensor, index: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """(n,) labels and places in its rows, of the rank that has most of those in rows of ``size · count``."""
    row, at = index // (count * size), index % (count * size)
    shares = [(labels != IGNORE_INDEX) & (at // count == rank) for rank in range(size)]
    own = max(shares, key=lambda share: int(share.sum()))
    return labels[own], (row * count + at % count)[own]
