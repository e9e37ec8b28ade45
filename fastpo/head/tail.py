"""What a model does to its logits after the head, found out by feeding it known ones.

Most models do nothing, some scale, some cap, all of which is u ↦ softcap·tanh(scale·u/softcap) or u ↦ scale·u,
which the operation computes itself. The model's own forward is run once on a few tokens with its head replaced
by a function that returns known logits over the whole vocabulary; what comes out tells the constants and
whether the form holds for every vocabulary entry.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

TOKENS = 3  # two rows of moderate logits, one of huge ones
HUGE = 1e6  # saturates any softcap
RELATIVE_TOLERANCE = 1e-5


class Tail(NamedTuple):
    """z = softcap·tanh(scale·u/softcap), or scale·u without a softcap, for the head's product u."""

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, u: Tensor) -> Tensor:
        """z, for any shape; differentiable."""
        if self.softcap is None:
            return u if self.scale == 1.0 else u * self.scale
        return self.softcap * torch.tanh(u * (self.scale / self.softcap))


class Probe(NamedTuple):
    """What the probe found."""

    vocab: int  # logits per token
    tail: Tail | None  # None: of another form
    output_class: type[ModelOutput] | None  # None: the tail failed on the known logits


_PROBED: WeakKeyDictionary[PreTrainedModel, tuple[Any, Probe]] = WeakKeyDictionary()


def probe_tail(model: nn.Module, core: PreTrainedModel, head: nn.Module) -> Probe:
    """Probe ``core``, called through ``model``; what was found is kept until the configuration changes.

    The run is without gradient, dropout, cache or trace in the random generators; hooks on the model's modules
    fire as in any forward.

    Raises:
        RuntimeError: the forward failed, as it does on a model whose parameters are sharded elsewhere, or it
            does not call its head exactly once.
        TypeError: its outputs are tuples.
        ValueError: the model's parameters are on the meta device.
    """
    state = _fingerprint(core)
    known = _PROBED.get(core)
    if known is None or known[0] != state:
        known = (state, _run(model, core, head))
        _PROBED[core] = known
    return known[1]


def _fingerprint(core: PreTrainedModel) -> Any:
    """Everything a tail is made of in practice: the configuration, scalars on the model, the code."""
    scalars = {
        name: value
        for name, value in vars(core).items()
        if isinstance(value, (int, float, str)) and name != "training"
    }
    return core.config.to_json_string(use_diff=False), scalars, type(core).forward


def _run(model: nn.Module, core: PreTrainedModel, head: nn.Module) -> Probe:
    device, name, original = core.device, type(core).__name__, head.forward
    if device.type == "meta":
        raise ValueError(
            f"model: {name} is on the meta device, expected one with its weights loaded"
        )
    made: list[torch.Size] = []  # shapes of the logits that the head would have made

    def known_head(*args: Any, **kwargs: Any) -> Tensor:
        made.append(original(*args, **kwargs).shape)
        # Gradients are recorded from here on: a result that has one comes from a tail with weights of its own.
        torch.set_grad_enabled(True)
        return _known_logits(made[-1], device)

    inputs: dict[str, Any] = {"input_ids": torch.arange(TOKENS, device=device)[None]}
    if "use_cache" in inspect.signature(core.forward).parameters:
        inputs["use_cache"] = False
    output, failure = None, None
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng([device.index] if device.type == "cuda" else []))
        stack.enter_context(evaluating(model))
        stack.enter_context(_attention_of_a_cpu(core))
        stack.enter_context(_forward_replaced(head, known_head))
        try:
            output = model(**inputs)
        except Exception as error:
            failure = error
    if not made:
        reason = (
            f"failed with {type(failure).__name__}: {failure}"
            if failure
            else "did not call its head"
        )
        raise RuntimeError(
            f"model: {name} could not be probed, its forward on {TOKENS} tokens {reason}. If it is sharded "
            "(FSDP, DeepSpeed), construct FusedHead before it is wrapped."
        ) from failure
    vocab = made[0][-1]
    if made != [(1, TOKENS, vocab)]:
        raise RuntimeError(
            f"model: {name} makes logits of shapes {[tuple(shape) for shape in made]} from {TOKENS} tokens, "
            f"expected (1, {TOKENS}, V) once"
        )
    if failure:
        return Probe(vocab, None, None)
    if not isinstance(output, ModelOutput):
        raise TypeError(
            f"model: {name} returns a {type(output).__name__}, expected a ModelOutput with logits "
            "(config.return_dict=True)"
        )
    logits = output.logits
    if logits.shape != made[0] or logits.requires_grad:
        return Probe(vocab, None, type(output))
    return Probe(vocab, _fit(_known_logits(made[0], device)[0], logits.double()[0]), type(output))


def _known_logits(shape: torch.Size, device: torch.device) -> Tensor:
    """(…, TOKENS, V) float64: every vocabulary entry sees two moderate values and a huge one."""
    column = torch.arange(shape[-1], dtype=torch.float64, device=device)
    sign = 1 - 2 * (column % 2)
    # 0.01 … 20, spread by the golden ratio
    moderate = sign * 0.01 * 2000 ** ((column * 0.6180339887498949) % 1.0)
    return torch.stack([moderate, -moderate.flip(0), sign * HUGE]).expand(shape).clone()


def _fit(fed: Tensor, seen: Tensor) -> Tail | None:
    """The tail that maps ``fed`` to ``seen``, both (TOKENS, V) float64, if there is one."""
    limit = float(seen[-1, 0] / fed[-1, 0]) * HUGE  # ±softcap, or scale·HUGE
    smallest = int(fed[0].abs().argmin())
    u, z = float(fed[0, smallest]), float(seen[0, smallest])
    for tail in (_linear(limit), _capped(limit, u, z)):
        if tail is not None:
            expected = tail.apply(fed)
            if torch.allclose(
                seen, expected, rtol=RELATIVE_TOLERANCE, atol=RELATIVE_TOLERANCE * abs(tail.scale)
            ):
                return tail
    return None


def _linear(limit: float) -> Tail | None:
    scale = limit / HUGE
    return Tail(scale) if scale == scale and 0 < abs(scale) < float("inf") else None


def _capped(limit: float, u: float, z: float) -> Tail | None:
    softcap = abs(limit)
    if not (0 < softcap < float("inf") and abs(z) < softcap and z != 0.0):
        return None
    scale = softcap * float(torch.atanh(torch.tensor(z / softcap, dtype=torch.float64))) / u
    return Tail(scale, softcap)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off. The flags are set directly: ``train()`` of some modules does more."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _attention_of_a_cpu(core: PreTrainedModel) -> Iterator[None]:
    """Plain attention for a model on a CPU that is to use a GPU's, as where FSDP or DeepSpeed will place it."""
    name = getattr(core.config, "_attn_implementation", None) or ""
    if core.device.type != "cpu" or not name.startswith("flash"):
        yield
        return
    core.config._attn_implementation = "eager"
    try:
        yield
    finally:
        core.config._attn_implementation = name


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    previous = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous  # type: ignore[method-assign]
