"""The largest micro-step that the settings of a run allow, laid out by the run's own collator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fastpo.data import PackedCollator, PreferenceCollator

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
        scored: share of the labels in it that are scored.
    """

    sequences: int
    length: int
    batch: dict[str, Tensor]
    scored: float


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
    if config.packs_rows:
        collator = PackedCollator(
            0, prefix_sharing=config.prefix_sharing, one_row=not holds_masks(config)
        )
        return MicroStep(2 * pairs, length, collator(rows), 1.0)
    return MicroStep(2 * pairs, length, PreferenceCollator(0)(rows), len(answer) / length)
