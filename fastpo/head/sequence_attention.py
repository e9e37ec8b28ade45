"""Attention of sequences whose tokens are spread over the ranks of a group.

Every layer but attention works token by token, so that a rank can run a model on its own part of each
sequence. Around attention the ranks change places (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509):
from all heads of t of the n·t tokens to h/n heads of all tokens, by all-to-alls before attention and one after
it. In between the model's own attention function runs as it always does, on whole sequences, so that any mask,
sliding windows and flash-attn's sequence bounds keep their meaning.

The functions are replaced in transformers' registry, for all models and threads, while
:meth:`SequenceAttention.active` lasts: a checkpointed layer is run again in the backward, on CUDA by a thread
of autograd's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastpo.head.causal_lm import find_causal_lm
from fastpo.head.packed_attention import EXACT, FULL, ROUNDED, SLIDING, small_window
from fastpo.head.tail import evaluating

PROBE_TOKENS = 4  # per rank


class SequenceAttention:
    """The exchange around attention, for models that run on parts of sequences.

    Args:
        group: ranks over which the tokens of a sequence are spread, equally many on each, in rank order.
        models: transformers causal LMs, bare or wrapped, the same on all ranks.

    Raises:
        ValueError: a number of heads that the group cannot share, an attention that is not in transformers'
            registry (``eager``), or layers that look at the length or the positions of what they are given.
    """

    def __init__(self, group: ProcessGroup, *models: nn.Module) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self._rank = dist.get_rank(group)
        self._masks: dict[tuple[str, int | None], tuple[int, Any]] = {}
        self._implementations = {served_attention(model, self.size) for model in models}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, every attention of the models' kind sees queries, keys and values of this rank's tokens."""
        # The registry's own entries hide the shared ones; those that somebody else made must come back.
        entries = ALL_ATTENTION_FUNCTIONS._local_mapping
        before = dict(entries)
        for name in self._implementations:
            inner = ALL_ATTENTION_FUNCTIONS[name]
            entries[name] = partial(self._attend, inner, name)
        try:
            yield
        finally:
            entries.clear()
            entries.update(before)

    def _attend(
        self,
        inner: Any,
        name: str,
        module: nn.Module,
        query: Tensor,  # (B, heads, t, D), of this rank's t tokens
        key: Tensor,  # (B, key-value heads, t, D)
        value: Tensor,  # (B, key-value heads, t, D)
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(B, t, heads, D), as ``inner`` would return it."""
        if kwargs.get("s_aux") is not None:
            raise ValueError("sequence_parallel_size: attention sinks are not served, expected 1")
        length = self.size * query.shape[2]
        repeats = max(1, self.size // key.shape[1])
        if repeats > 1:  # fewer key-value heads than ranks: neighbours share one
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        query, key, value = (self._gather_tokens(x) for x in (query, key, value))
        if _length(attention_mask) != length:
            # Made by the model for the part alone.
            attention_mask = self._causal_mask(
                name, length, kwargs.get("sliding_window"), query.device
            )
        if (
            "position_ids" in kwargs
        ):  # of the part; flash-attn would look for packed sequences in them
            kwargs["position_ids"] = None
        groups = query.shape[1] // key.shape[1]
        if getattr(module, "num_key_value_groups", groups) != groups:
            module = _Grouped(module, groups)  # type: ignore[assignment]
        output, _ = inner(module, query, key, value, attention_mask, *args, **kwargs)
        return self._gather_heads(output), None

    def _causal_mask(
        self, name: str, length: int, window: int | None, device: torch.device
    ) -> Tensor | BlockMask | None:
        """The mask of whole sequences; the last of each kind is kept, for the other layers."""
        known, mask = self._masks.get((name, window), (0, None))
        if known != length:
            mask = _causal_mask(name, length, window, device)
            self._masks[name, window] = length, mask
        return mask

    def _gather_tokens(self, x: Tensor) -> Tensor:
        """(B, h, t, D) → (B, h/n, n·t, D)."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)  # to each rank its heads
        parts = self._exchange(parts.contiguous())  # from each rank its tokens
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _gather_heads(self, x: Tensor) -> Tensor:
        """(B, n·t, h/n, D) → (B, t, h, D)."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)
        parts = self._exchange(parts.contiguous())
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, parts: Tensor) -> Tensor:
        """(n, …) → (n, …): part k to rank k of the group, and rank k's part for this one in its place."""
        return _Exchange.apply(parts, self.group)  # type: ignore[no-any-return]

    # ---- Trial ----

    def try_on(self, model: nn.Module, device: torch.device, *, exact: bool) -> None:
        """Compare the logits of parts with those of the whole on a few tokens; all ranks must call.

        Args:
            model: one of those that this was made for, ready to run, sharded or not.
            device: that it runs on.
            exact: whether it computes in float32; else rounding explains more.

        Raises:
            ValueError: on all ranks, if they are not the same, as of a model with recurrent layers.
        """
        core, _ = find_causal_lm(model)
        name = type(core).__name__
        length = self.size * PROBE_TOKENS
        vocab = core.config.get_text_config().vocab_size
        ids = (torch.arange(1, 2 * length + 1, device=device) * 7919 % (vocab - 1) + 1).view(2, -1)
        part = slice(self._rank * PROBE_TOKENS, (self._rank + 1) * PROBE_TOKENS)
        positions = torch.arange(length, device=device)[part].expand(2, -1)
        problem, difference = "", torch.zeros((), dtype=torch.float64, device=device)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(model))
            stack.enter_context(small_window(core))
            try:
                whole = model(input_ids=ids, use_cache=False).logits[:, part]
                whole = whole.double().log_softmax(-1)
                with self.active():
                    own = model(input_ids=ids[:, part], position_ids=positions, use_cache=False)
                own = own.logits.double().log_softmax(-1)
                spread = whole.var(dim=-1).mean()
                difference = ((own - whole).square().mean() / spread).sqrt()
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                problem = f"{type(error).__name__}: {error}"
        self._masks.clear()
        # A flag, as the largest of some numbers and a NaN is not the same everywhere.
        bad = torch.tensor(bool(problem) or not difference.isfinite(), device=device)
        found = torch.stack([difference.nan_to_num(), bad.double()])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        worst, failed = found.tolist()
        if failed or worst > (EXACT if exact else ROUNDED):
            raise ValueError(
                f"sequence_parallel_size: {name} does not give the parts of a sequence what it gives the whole "
                f"({problem or f'log-probs differ by {worst:.2g} of their spread'}); expected 1 for this model"
            )


class _Exchange(torch.autograd.Function):
    """The all-to-all, and in the backward the same the other way."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        sent = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(sent, grad.contiguous(), group=ctx.group)
        return sent, None


class _Grouped:
    """An attention layer with another number of query heads per key-value head."""

    def __init__(self, module: nn.Module, groups: int) -> None:
        self._module = module
        self.num_key_value_groups = groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def served_attention(model: nn.Module, size: int) -> str:
    """The registered name of a model's attention; ValueError where its heads cannot be spread."""
    core, _ = find_causal_lm(model)
    name = getattr(core.config, "_attn_implementation", None) or "eager"
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"sequence_parallel_size: got {size} with attn_implementation {name!r}, expected sdpa, "
            "flex_attention or flash_attention_2"
        )
    config = core.config.get_text_config()
    looks = _looks_at_lengths(config)
    if looks:
        raise ValueError(
            f"sequence_parallel_size: got {size}, expected 1 for {type(core).__name__}: {looks}"
        )
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (shared % size and size % shared):
        raise ValueError(
            f"sequence_parallel_size: got {size}, expected a divisor of the {heads} attention heads of "
            f"{type(core).__name__} that divides its {shared} key-value heads or is a multiple of them"
        )
    return str(name)


def _looks_at_lengths(config: Any) -> str | None:
    """What in a model depends on more of a sequence than a part of it shows; None where nothing is known to.

    A trial on a few tokens would not find it: it begins with thousands.
    """
    other = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if other:
        return f"it has layers of the kind {', '.join(sorted(other))}"
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    by_layer = rope.values() if isinstance(rope, dict) else ()
    for each in (rope, *by_layer):
        kind = each.get("rope_type", each.get("type")) if isinstance(each, dict) else None
        if kind in ("longrope", "dynamic"):
            return (
                f"its rotary embedding ({kind}) depends on the longest position of what it is given"
            )
    for name in ("attention_chunk_size", "attn_temperature_tuning", "index_topk"):
        if getattr(config, name, None):
            return f"its {name} depends on where a sequence begins"
    return None


def _length(mask: Any) -> int | None:
    """Keys that a mask is over."""
    return mask.shape[-1] if isinstance(mask, (Tensor, BlockMask)) else None


def _causal_mask(
    name: str, length: int, window: int | None, device: torch.device
) -> Tensor | BlockMask | None:
    """What attention ``name`` is given for whole sequences padded on the right; None where it needs no mask."""
    window = window if window and window < length else None

    def sees(row: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return query >= key if window is None else (query >= key) & (query - key < window)

    if name == "flex_attention":
        # Compiled, or it would make all length² entries first.
        return create_block_mask(
            sees, None, None, length, length, device=str(device), _compile=device.type == "cuda"
        )
    if window is None or name != "sdpa":  # flash-attn takes the window as a number
        return None
    at = torch.arange(length, device=device)
    return sees(None, None, at[:, None], at)[None, None]


def part_of(inputs: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """A rank's part of a model's inputs (B, n·t): tokens and their positions; masks stay whole.

    ``attention_mask`` (B, n·t) of padding on the right is left out: what is causal never looks at it.
    """
    ids = inputs["input_ids"]
    if ids.shape[1] % size:
        raise ValueError(f"input_ids: got {ids.shape[1]} tokens, expected a multiple of {size}")
    count = ids.shape[1] // size
    here = slice(rank * count, (rank + 1) * count)
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    mask = inputs.get("attention_mask")
    rest = {k: v for k, v in inputs.items() if k != "attention_mask"}
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        rest["attention_mask"] = mask
    return {**rest, "input_ids": ids[:, here], "position_ids": positions[:, here]}
