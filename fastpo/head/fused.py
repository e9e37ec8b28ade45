"""``fused_head``: a causal LM's own forward that ends in log-probabilities of labels instead of logits.

While a :class:`FusedHead` is installed, three things on the model are replaced, all of which do nothing in a
call without labels:

- the model's ``forward``: keeps the labels to itself, runs the original, puts the result into its output;
- the head's ``forward``: computes log-probs (B, T) where it would compute logits (B, T, V). It runs inside the
  head's module call, so hooks that gather the weight (FSDP, DeepSpeed) and those that wait for the gradient of
  the head's output work as ever;
- a forward hook on the head, after all others: takes the log-probs aside and lets a placeholder of one column
  go on through what the model does with its logits.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fastpo.head.causal_lm import find_causal_lm, linear_layers
from fastpo.head.fallback import chunked_logprobs
from fastpo.head.lora import is_lora, is_plain_lora, lora_logprobs
from fastpo.head.tail import Tail, probe_tail
from fastpo.ops.arguments import kept_rows
from fastpo.ops.linear_logprobs import TokenStats, linear_logprobs

# The model decides on scale and softcap; the labels come with each call.
OPTIONS = {
    name
    for name, parameter in inspect.signature(linear_logprobs).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
} - {"logit_scale", "softcap"}


class FusedHead:
    """The replaced head of one model: ``install()`` and ``remove()``, or a ``with`` block.

    Args:
        model: a transformers causal LM, bare or inside PEFT, DDP, FSDP2 or torch.compile. It is probed here
            (one forward on three tokens, once per model), so construct it before the parameters are sharded.
        operation: what the head's forward calls; it takes the arguments of :func:`fastpo.linear_logprobs`, the
            default, and returns what that returns. It sees the head's weight where FSDP has gathered it.
        op_kwargs: ``temperature``, ``ignore_index``, ``backward``, ``tol``, ``low_memory``, ``backend`` and
            ``return_stats`` of :func:`fastpo.linear_logprobs`.

    While installed, a call with ``labels`` (B, T), already shifted (:func:`fastpo.shift_labels`), returns the
    model's own output class (a subclass of it) with ``logits`` None, ``log_probs`` (B, T) float32 and, with
    ``return_stats=True``, ``token_stats`` (:class:`fastpo.TokenStats`); ``loss`` is None, as the labels never
    reach the model. A mixture of experts called with ``output_router_logits=True`` still returns its
    load-balancing loss as ``aux_loss``, not yet multiplied by ``router_aux_loss_coef``. A call without labels
    is as ever, so ``generate`` works.

    With ``hidden_index`` (int64, of any shape) labels have that shape, and each is scored from the hidden state
    of that number among the (B·T, H): rows in which several sequences stand, or share a prompt, are scored so,
    a hidden state as often as it is named. ``log_probs`` has the shape of the labels.

    ``method`` says how log-probs are made: ``"fused"`` by :func:`fastpo.linear_logprobs`, also for LoRA on the
    head (``lora.py``, with the memory it takes); ``"chunked"`` if the head is anything but linear layers (DoRA
    or another variant on it, quantised): by the head itself on chunks of labelled rows; ``"compact"`` if what
    follows the head is not softcap·tanh(scale·z/softcap): from the logits of all labelled
    rows. The last two warn on construction.

    Raises:
        TypeError: no transformers model, or an unknown option.
        ValueError: a model that is not served (encoder, encoder-decoder, multimodal, …), or an operation of
            one's own for a model whose head has to make its logits by itself.
        RuntimeError: a model that cannot be probed.
    """

    method: Literal["fused", "chunked", "compact"]

    def __init__(
        self,
        model: nn.Module,
        *,
        operation: Callable[..., Any] = linear_logprobs,
        **op_kwargs: Any,
    ) -> None:
        unknown = sorted(set(op_kwargs) - OPTIONS)
        if unknown:
            raise TypeError(f"op_kwargs: got {unknown}, expected some of {sorted(OPTIONS)}")
        self.model, self.head = find_causal_lm(model)
        self.options = {
            "temperature": 1.0,
            "ignore_index": -100,
            "return_stats": False,
            **op_kwargs,
        }
        self.vocab, tail, output_class = probe_tail(model, self.model, self.head)
        if output_class is not None:
            _with_log_probs(output_class)  # made here, not under torch.compile
        self.tail = tail or Tail()
        self.targets: list[nn.Module] = [self.head]  # whose forward makes the log-probs
        layers = linear_layers(self.head)
        name = type(self.model).__name__
        self.operation = operation
        lora = is_plain_lora(self.head)
        if operation is not linear_logprobs and (tail is None or (layers is None and not lora)):
            raise ValueError(
                f"operation: the head of {name} is a {type(self.head).__name__}"
                + (" whose logits the model changes" if tail is None else "")
                + ", expected a plain linear layer, with at most a factor and a tanh cap after it"
            )
        if tail is None:
            self.method = "compact"
            warnings.warn(
                f"{name} does something to its logits that is neither a factor nor a tanh cap: log-probs are "
                f"taken from the logits of all labelled rows, which need memory for rows × {self.vocab}",
                stacklevel=3,
            )
        elif layers is None and not lora:
            self.method = "chunked"
            warnings.warn(
                f"the head of {name} is a {type(self.head).__name__}, not a plain linear layer: log-probs are "
                "taken from its logits on labelled rows, chunk by chunk, which is slower",
                stacklevel=3,
            )
        else:
            self.method = "fused"
            self.targets = [*(layers or self.targets)]
        self._installed = 0

    def install(self) -> None:
        """Replace the head. May be nested, also with other FusedHeads of the model: the last one decides."""
        if not self._installed:
            patch = vars(self.model).get("forward")
            if not isinstance(patch, _Patch) or patch.modules != _patched_modules(self):
                patch = _Patch(self)
            patch.stack.append(self)
            self._patch = patch
        self._installed += 1

    def remove(self) -> None:
        """Undo one ``install()``."""
        if not self._installed:
            raise RuntimeError("FusedHead: remove() without install()")
        self._installed -= 1
        if not self._installed:
            self._patch.stack.remove(self)
            if not self._patch.stack:
                self._patch.undo()
            del self._patch

    def __enter__(self) -> FusedHead:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def fused_head(model: nn.Module, **op_kwargs: Any) -> FusedHead:
    """``with fused_head(model):``, in which calls with ``labels`` return log-probs; see :class:`FusedHead`."""
    return FusedHead(model, **op_kwargs)


def model_logprobs(
    model: nn.Module,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None,  # (B, T)
    labels: Tensor,  # (B, T), shifted
    op_kwargs: dict[str, Any] = {},  # noqa: B006 (read only)
    **model_kwargs: Any,
) -> Tensor | tuple[Tensor, TokenStats]:
    """(B, T) log-probs of ``labels`` under ``model``, in nats, 0 where a label is −100.

    ``op_kwargs`` as for :class:`FusedHead`, with ``return_stats=True`` the pair (log-probs,
    :class:`fastpo.TokenStats`); ``model_kwargs`` go to the model, ``use_cache=False`` unless given.
    """
    model_kwargs = {"use_cache": False, **model_kwargs}
    with FusedHead(model, **op_kwargs):
        out = model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, **model_kwargs
        )
    return (out.log_probs, out.token_stats) if op_kwargs.get("return_stats") else out.log_probs


@dataclass
class _Call:
    """One call with labels, while it is on its way through the model."""

    labels: Tensor  # (B, T), or shaped like hidden_index
    installed: FusedHead
    hidden_index: Tensor | None = None
    rows: Tensor | None = None  # of the labels, where a fallback takes them out
    log_probs: Tensor | None = None  # (B, T)
    token_stats: TokenStats | None = None


class _Patch:
    """What takes the place of ``forward`` on a model; it is itself the new ``forward``.

    An object and not a closure, so that a deep copy of the model calls the copy's modules. It has no
    ``__func__``, which accelerate would tear off and bind to the model.
    """

    def __init__(self, installed: FusedHead) -> None:
        self.stack: list[FusedHead] = []
        self.call: _Call | None = None
        self.head = installed.head
        self.modules = _patched_modules(installed)
        self.model = model = installed.model
        self.original = model.forward
        # inspect.signature follows it, and generate() reads the signature.
        self.__wrapped__ = self.original
        self.parameters = list(inspect.signature(self.original).parameters)
        self.replaced = [_Replaced(model, self)]
        self.replaced += [_Replaced(m, _HeadForward(self, m, m.forward)) for m in self.modules]
        self.hook = self.head.register_forward_hook(self._take_aside)
        self.hook_id = self.hook.id  # torch.compile cannot look into the handle

    def undo(self) -> None:
        self.hook.remove()
        for replaced in self.replaced:
            replaced.undo()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:  # accelerate's unwrap_model has bound it to the model
            args = args[1:]
        named = {**dict(zip(self.parameters, args)), **kwargs}  # noqa: B905 (trailing ones not given)
        labels = named.pop("labels", None)
        if labels is None or not self.stack:
            return self.original(*args, **kwargs)
        hidden_index = named.pop("hidden_index", None)
        _check_inputs(labels, hidden_index, named)
        call = _Call(labels, self.stack[-1], hidden_index)
        self._keep_hook_last()
        previous, self.call = self.call, call
        try:
            output = self.original(**named)
        finally:
            self.call = previous
        if not isinstance(output, ModelOutput):
            raise TypeError(
                f"return_dict: the model returned a {type(output).__name__}, expected a ModelOutput "
                "(return_dict=True)"
            )
        if call.installed.method == "compact":
            self._from_compact_logits(call, output.logits)
        if call.log_probs is None:
            raise RuntimeError(
                f"{type(call.installed.model).__name__} did not call its head, or the head has been exchanged "
                "since FusedHead was constructed"
            )
        fields = {name: value for name, value in output.items() if name != "logits"}
        return _with_log_probs(type(output))(
            **fields, log_probs=call.log_probs, token_stats=call.token_stats
        )

    def head_forward(
        self, module: nn.Module, original: Callable[..., Any], hidden: Tensor
    ) -> Tensor:
        """``forward`` of the head, or of a layer of it, in a call with labels."""
        call = self.call
        assert call is not None
        # As the model's own loss would: layers may be spread over devices.
        labels = call.labels = call.labels.to(hidden.device)
        options, tail = call.installed.options, call.installed.tail
        if call.hidden_index is not None:
            index = call.hidden_index.to(hidden.device)
            hidden = hidden.flatten(0, -2).index_select(0, index.flatten())
            hidden = hidden.unflatten(0, index.shape)
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, but {type(call.installed.model).__name__} gives its "
                f"head hidden states of shape {tuple(hidden.shape)}"
            )
        # Adapters come and go: one of another kind leaves the call to the chunks.
        lora = is_lora(module)
        if call.installed.method == "fused" and (not lora or is_plain_lora(module)):
            operation = call.installed.operation
            if lora:
                score = partial(lora_logprobs, module, operation, hidden, labels)
            else:
                score = partial(operation, hidden, module.weight, labels, module.bias)
            result = score(logit_scale=tail.scale, softcap=tail.softcap, **options)
            logps, call.token_stats = result if options["return_stats"] else (result, None)
            # Not a view: FSDP warns of those, as an in-place change of one would lose its hooks.
            return logps.clone()
        order, count = kept_rows(labels.reshape(-1), options["ignore_index"], call.installed.vocab)
        call.rows = order[:count]
        kept = hidden.reshape(-1, hidden.shape[-1])[call.rows]
        if call.installed.method == "compact":
            return original(kept[None])
        logps, call.token_stats = chunked_logprobs(
            lambda block: original(block[None])[0],
            kept,
            labels,
            call.rows,
            call.installed.vocab,
            tail,
            options["temperature"],
            options["return_stats"],
        )
        return logps

    def _take_aside(self, head: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        call = self.call
        if call is None or call.installed.method == "compact":
            return None
        if output.shape != call.labels.shape:
            raise RuntimeError(
                f"the head of {type(call.installed.model).__name__} has been exchanged since FusedHead was "
                "constructed"
            )
        call.log_probs = output
        return output.new_zeros((*output.shape, 1))

    def _from_compact_logits(self, call: _Call, logits: Tensor) -> None:
        if call.rows is None:
            return
        options = call.installed.options
        call.log_probs, call.token_stats = chunked_logprobs(
            lambda block: block,
            logits[0],
            call.labels,
            call.rows,
            logits.shape[-1],
            call.installed.tail,
            options["temperature"],
            options["return_stats"],
        )

    def _keep_hook_last(self) -> None:
        # Wrappers (FSDP, DeepSpeed) that came after the installation have put their hooks behind this one.
        hooks: OrderedDict[int, Any] = self.head._forward_hooks  # type: ignore[assignment]
        if next(reversed(hooks)) != self.hook_id:
            hooks.move_to_end(self.hook_id)


class _HeadForward:
    """The new ``forward`` of the head or of a layer of it."""

    def __init__(self, patch: _Patch, module: nn.Module, original: Callable[..., Any]) -> None:
        self.patch, self.module, self.fastpo_original = patch, module, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.patch.call
        if call is None or not any(self.module is target for target in call.installed.targets):
            return self.fastpo_original(*args, **kwargs)
        if "adapter_names" in kwargs:
            raise ValueError(
                f"adapter_names: got {kwargs['adapter_names']} for the head, expected none together with "
                "labels: one call scores all its rows under the same adapters"
            )
        return self.patch.head_forward(self.module, self.fastpo_original, *args, **kwargs)


class _Replaced:
    """``forward`` on one module, set here and taken back by ``undo``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward
        self.previous = vars(module).get("forward")
        module.forward = forward  # type: ignore[method-assign]

    def undo(self) -> None:
        if vars(self.module).get("forward") is not self.forward:
            return  # another wrapper stands on top of it, or has removed it; it does nothing any more
        if self.previous is None:
            del self.module.forward
        else:
            self.module.forward = self.previous  # type: ignore[method-assign]


def _patched_modules(installed: FusedHead) -> list[nn.Module]:
    """The head and the layers of it that compute the logits."""
    return list(dict.fromkeys([installed.head, *(linear_layers(installed.head) or [])]))


def _check_inputs(labels: Any, hidden_index: Any, named: dict[str, Any]) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: got {type(labels).__name__}, expected an int64 tensor (B, T)")
    if hidden_index is not None:
        if not isinstance(hidden_index, Tensor) or hidden_index.dtype != torch.int64:
            found = getattr(hidden_index, "dtype", type(hidden_index).__name__)
            raise TypeError(f"hidden_index: got {found}, expected an int64 tensor like labels")
        if hidden_index.shape != labels.shape:
            raise ValueError(
                f"hidden_index: got shape {tuple(hidden_index.shape)}, expected that of labels, "
                f"{tuple(labels.shape)}"
            )
    keep = named.get("logits_to_keep")
    if keep is not None and not (isinstance(keep, int) and keep == 0):
        raise ValueError(
            f"logits_to_keep: got {keep!r} together with labels, which say themselves what is computed; "
            "expected none"
        )
    for name, dims in (("input_ids", None), ("inputs_embeds", -1)):
        given = named.get(name)
        if given is not None and hidden_index is None and labels.shape != given.shape[:dims]:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}, expected {tuple(given.shape[:dims])} for {name} "
                f"of shape {tuple(given.shape)}"
            )


_OUTPUT_CLASSES: dict[type[ModelOutput], type[ModelOutput]] = {}


def _with_log_probs(cls: type[ModelOutput]) -> type[ModelOutput]:
    """``cls`` with two more fields: declared ones, so that wrappers which rebuild an output keep them."""
    if cls not in _OUTPUT_CLASSES:
        _OUTPUT_CLASSES[cls] = dataclasses.make_dataclass(
            f"{cls.__name__}WithLogProbs",
            [
                ("log_probs", torch.FloatTensor | None, None),
                ("token_stats", TokenStats | None, None),
            ],
            bases=(cls,),
        )
    return _OUTPUT_CLASSES[cls]
