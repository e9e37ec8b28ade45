"""Which tokens of a packed row see which, told to a transformers model in the form that it takes.

A packed row holds sequences one after another, each a *group*; with shared prompts a group is
[prompt | chosen | rejected], three *branches* 0, 1, 2, whose answers both begin right after the prompt in
position and do not see each other. A token sees what stands before it in its group, in its own branch or the
prompt; a sliding window is counted in positions.

========================  ==================================================================================
attention of the model    what it is given
========================  ==================================================================================
sdpa                      a boolean mask (R, 1, L, L), of models with several kinds of layers one for each
eager                     the same as numbers to be added
flex_attention            a block mask, likewise
flash_attention_*         the bounds of the sequences (varlen); shared prompts are no sequences and refused
========================  ==================================================================================

Position ids alone are not enough: without a mask the answers see each other, and nothing tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.utils import logging

from fastpo.head.causal_lm import find_causal_lm
from fastpo.head.tail import evaluating
from fastpo.packed_rows import lay_out, pieces_of_pair

FULL, SLIDING = "full_attention", "sliding_attention"
PROBE_WINDOW = 3  # while probing, so that a window shows in a few tokens
# Root mean square difference of the log-probs over their spread that rounding explains: in float32, in 16 bits.
# Without a mask, or with a wrong window, it is a few tenths.
EXACT, ROUNDED = 1e-5, 0.06

logger = logging.get_logger(__name__)


class PackedAttention:
    """What a model is called with so that packed rows give what their sequences give one by one.

    Args:
        model: a transformers causal LM, bare or wrapped; probed here (a few forwards on some ten tokens), so
            construct this before the parameters are sharded.
        prefix_sharing: whether rows will hold branches.
        trial: False: believe the model's configuration, as for a model without numbers.

    Raises:
        ValueError: an attention that cannot do it, or a model whose packed rows give other log-probs, such as
            one with recurrent layers.
    """

    def __init__(self, model: nn.Module, *, prefix_sharing: bool, trial: bool = True) -> None:
        self.core, _ = find_causal_lm(model)
        self.option = "prefix_sharing" if prefix_sharing else "padding_free"
        self.implementation = getattr(self.core.config, "_attn_implementation", None) or "eager"
        self.varlen = self.implementation.startswith("flash_attention")
        if self.varlen and prefix_sharing:
            raise ValueError(
                f"prefix_sharing: got True with attn_implementation {self.implementation!r}, which knows no "
                "mask; expected flex_attention (on a GPU) or sdpa"
            )
        if not self.varlen and self.implementation not in ("sdpa", "eager", "flex_attention"):
            raise ValueError(
                f"{self.option}: got True with attn_implementation {self.implementation!r}, expected sdpa, "
                "flex_attention, eager or flash_attention_2"
            )
        config = self.core.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self._config = config
        # By kind where the model says of which kind each layer is, else one for all; the probe decides.
        self._by_kind = bool(kinds)
        unknown = kinds - {FULL, SLIDING}
        if unknown:
            raise ValueError(
                f"{self.option}: {type(self.core).__name__} has layers of the kind "
                f"{', '.join(sorted(unknown))}, expected {FULL} and {SLIDING}"
            )
        if trial and self.varlen and self.core.device.type == "cpu":
            # Where FSDP or DeepSpeed will place it. Sequences' bounds are no mask that a model could ignore.
            logger.info(
                f"{self.option}: not tried on the model, which {self.implementation} cannot run yet"
            )
        elif trial:
            self._probe(model, prefix_sharing)

    @property
    def one_row(self) -> bool:
        """Whether all sequences of a batch best stand in one row: the work does not grow with its square."""
        return self.varlen or self.implementation == "flex_attention"

    def inputs(
        self,
        input_ids: Tensor,  # (R, L) int64
        position_ids: Tensor,  # (R, L) int64
        groups: Tensor,  # (R, L) int, −1 on padding
        branches: Tensor,  # (R, L) int
    ) -> dict[str, Any]:
        """Keywords of the model's forward for packed rows."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
        if self.varlen:
            return inputs | _sequence_bounds(groups)
        where = position_ids, groups, branches
        window = getattr(self._config, "sliding_window", None)
        if self._by_kind:
            masks = {FULL: self._mask(*where, None)}
            if window:
                masks[SLIDING] = self._mask(*where, window)
            return inputs | {"attention_mask": masks}
        # Such a model slides in all layers or in none.
        return inputs | {"attention_mask": self._mask(*where, window)}

    def _mask(
        self, positions: Tensor, groups: Tensor, branches: Tensor, window: int | None
    ) -> Tensor | BlockMask:
        rows, length = groups.shape

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            branch = branches[row, key]
            seen = (
                (query >= key)
                & (groups[row, query] == groups[row, key])
                & ((branch == 0) | (branch == branches[row, query]))
            )
            if window:
                seen = seen & (positions[row, query] - positions[row, key] < window)
            return seen

        if self.implementation == "flex_attention":
            # Compiled, or it would make all length² entries first.
            device = groups.device
            return create_block_mask(
                sees, rows, None, length, length, device=str(device), _compile=device.type == "cuda"
            )
        at = torch.arange(length, device=groups.device)
        row = torch.arange(rows, device=groups.device)[:, None, None]
        seen = sees(row, row, at[:, None], at)[:, None]
        if self.implementation == "sdpa":
            return seen
        dtype = self.core.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    def _probe(self, model: nn.Module, prefix_sharing: bool) -> None:
        """Compare packed rows with their sequences one by one, and choose the form of the mask."""
        name = type(self.core).__name__
        failures = []
        for by_kind in (self._by_kind, not self._by_kind):
            self._by_kind = by_kind
            try:
                with ExitStack() as stack:
                    stack.enter_context(torch.no_grad())
                    stack.enter_context(evaluating(model))
                    stack.enter_context(small_window(self.core))
                    difference = _difference(self, model, prefix_sharing)
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if difference <= (EXACT if self.core.dtype.itemsize >= 4 else ROUNDED):
                return
            failures.append(f"log-probs differ by {difference:.2g} of their spread")
        raise ValueError(
            f"{self.option}: {name} does not give a packed row what it gives its sequences one by one "
            f"({failures[0]}); expected False for this model"
        )


def _difference(attention: PackedAttention, model: nn.Module, prefix_sharing: bool) -> float:
    """Of the log-probs where answers are scored, packed and in single sequences: root mean square, in units of
    their own spread."""
    core = attention.core
    device = core.get_input_embeddings().weight.device
    vocab = core.config.get_text_config().vocab_size
    lengths = ((7, 4, 6), (5, 6, 3))  # prompt, chosen, rejected
    total = sum(map(sum, lengths))
    ids = torch.arange(1, total + 1) * 7919 % (vocab - 1) + 1
    pairs = [
        part.split(list(n))
        for part, n in zip(ids.split([*map(sum, lengths)]), lengths, strict=True)
    ]
    pieces = [
        piece
        for k, (prompt, *answers) in enumerate(pairs)
        for piece in pieces_of_pair(k, prompt, answers, prefix_sharing)
    ]
    *laid, scored = lay_out(pieces, pad_token_id=0, one_row=True)
    row = [part.to(device) for part in laid]
    together = model(**attention.inputs(*row), use_cache=False).logits[0].double().log_softmax(-1)
    squares, spread = [], []
    for (side, pair), (_, places) in scored.items():
        prompt, answer = pairs[pair][0], pairs[pair][1 + side]
        tokens = torch.cat([prompt, answer])[None].to(device)
        alone = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        alone = alone.double().log_softmax(-1)
        squares.append((together[places.to(device)] - alone).square().mean())
        spread.append(alone.var(dim=-1).mean())
    return (torch.stack(squares).mean() / torch.stack(spread).mean()).sqrt().item()


def _sequence_bounds(groups: Tensor) -> dict[str, Any]:
    """What flash-attn's varlen kernels want to know of one row (1, L) of groups."""
    _, counts = torch.unique_consecutive(groups.reshape(-1), return_counts=True)
    bounds = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest = int(counts.max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@contextmanager
def small_window(core: PreTrainedModel) -> Iterator[None]:
    """The model's sliding window, if it has one, of a few tokens: in its configuration and in its layers."""
    holders = [core.config.get_text_config(), *core.modules()]
    windows = [
        (holder, holder.sliding_window)
        for holder in holders
        if isinstance(getattr(holder, "sliding_window", None), int) and holder.sliding_window
    ]
    for holder, _ in windows:
        holder.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        for holder, window in windows:
            holder.sliding_window = window
