"""How a batch of pairs lies in memory, padded or packed, and what a model is called with for it.

Everything behind the call (labels, losses, metrics) sees the same: log-probs (2B, T), chosen answers first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpo.data import PackedCollator, PreferenceCollator
from fastpo.head.packed_attention import PackedAttention

if TYPE_CHECKING:
    from .config import PreferenceConfig


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch comes from :class:`fastpo.data.PackedCollator`."""
    return "hidden_index" in batch


class Layout:
    """The layout that a configuration asks for, made ready for the models that will see it.

    Args:
        config: whose ``padding_free`` and ``prefix_sharing`` decide.
        pad_token_id: fills rows.
        models: policy and, where one is run, reference; packed rows are tried on each of them.

    Raises:
        ValueError: a model that does not give packed rows what it gives their sequences.
    """

    def __init__(self, config: PreferenceConfig, pad_token_id: int, *models: nn.Module) -> None:
        self.packed = config.padding_free or config.prefix_sharing
        self._shares = config.prefix_sharing
        self._attention: list[tuple[nn.Module, PackedAttention]] = []
        self.collator: PreferenceCollator | PackedCollator = PreferenceCollator(pad_token_id)
        if not self.packed:
            return
        for model in models:
            attention = PackedAttention(model, prefix_sharing=config.prefix_sharing)
            self._attention.append((model, attention))
        self.collator = PackedCollator(
            pad_token_id,
            prefix_sharing=config.prefix_sharing,
            one_row=self._attention[0][1].one_row,
        )

    def round_up(self, multiple: int) -> None:
        """Make rows of a multiple of so many tokens."""
        self.collator = replace(self.collator, pad_to_multiple_of=multiple)

    def add_copy(self, model: nn.Module) -> None:
        """Make ready for a copy of the first model."""
        if self.packed:
            self._attention.append((model, self._attention[0][1]))

    def tokens(self, rows: Iterable[Mapping[str, Any]]) -> list[int]:
        """What each row takes of a batch; of a padded one what its longer sequence takes, twice."""
        taken = []
        for row in rows:
            prompt, *answers = (len(row[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected"))
            if not self.packed:
                taken.append(2 * (prompt + max(answers)))
            else:
                taken.append((1 if self._shares and prompt else 2) * prompt + sum(answers))
        return taken

    def inputs(
        self, model: nn.Module, batch: Mapping[str, Tensor], rejected_only: bool = False
    ) -> dict[str, Any]:
        """Keywords of ``model``'s forward under a fused head.

        Args:
            model: one of those that this layout was made for, or what wraps it.
            batch: of :attr:`collator`.
            rejected_only: score the rejected answers alone. In a padded batch the others are then not run.
        """
        labels = batch["completion_labels"]
        first = len(labels) // 2 if rejected_only else 0
        inputs: dict[str, Any] = {"labels": labels[first:], "use_cache": False}
        if not is_packed(batch):
            return inputs | {name: batch[name][first:] for name in ("input_ids", "attention_mask")}
        where = (batch[name] for name in ("input_ids", "position_ids", "groups", "branches"))
        attention = self._attention_of(model)
        return inputs | attention.inputs(*where) | {"hidden_index": batch["hidden_index"][first:]}

    def _attention_of(self, model: nn.Module) -> PackedAttention:
        first = self._attention[0][1]
        if any(attention is not first for _, attention in self._attention):
            inside = set(map(id, model.modules()))
            return next(a for known, a in self._attention if id(known) in inside)
        return first


def label_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """(2B, T) int64: of the token that scores each label, in its sequence."""
    if is_packed(batch):
        return batch["position_ids"].flatten()[batch["hidden_index"]]
    labels = batch["completion_labels"]
    return torch.arange(labels.shape[1], device=labels.device).expand_as(labels)


def sequence_width(batch: Mapping[str, Tensor]) -> int:
    """Tokens that a sequence of the batch may have."""
    if is_packed(batch):
        return int(batch["position_ids"].max()) + 1
    return batch["input_ids"].shape[1]


def tokens_read(batch: Mapping[str, Tensor]) -> Tensor:
    """() int64: tokens of the batch that are not padding; a prompt that stands once counts once."""
    if is_packed(batch):
        return (batch["groups"] >= 0).sum()
    return batch["attention_mask"].sum()


def token_shares(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the layout saves and wastes: tokens that sharing left out, of all that the sequences have, and
    places of the batch that are padding. () each, on the batch's device.
    """
    read = tokens_read(batch)
    whole = batch["sequence_tokens"] if is_packed(batch) else read
    return {
        "tokens/shared": 1 - read / whole,
        "tokens/padding": 1 - read / batch["input_ids"].numel(),
    }
