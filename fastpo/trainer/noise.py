"""The noise generator's side of a DNPO run: when it plays, what seeds its noise, how it is trained and saved.

The generator has an optimiser of its own, so that nothing that wraps or shards the policy's has to know of it.
Its gradient is averaged over the ranks here, once per optimiser step. Each rank then steps its own share of the
numbers, of which alone it holds the optimiser's state, and hands them to the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from fastpo.head.causal_lm import find_causal_lm, linear_layers
from fastpo.head.lora import is_plain_lora
from fastpo.noise import NoiseGenerator
from fastpo.ops.philox import SEEDS

if TYPE_CHECKING:
    from .config import PreferenceConfig

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
UNLIMITED_LENGTH = 2**32  # positions per data row where max_length is None
_GENERATOR, _OPTIMIZER = "noise.", "noise_optimizer."  # prefixes in a checkpoint
_WARNED_SHARES = (0.125, 0.25, 0.5)  # of the limit

logger = logging.get_logger(__name__)


def noise_seed(run_seed: int, step: int) -> int:
    """Seed of the noise of an optimiser step (counted from 0), in [0, 2⁶⁴): a hash of both."""
    digest = hashlib.sha256(f"fastpo noise {run_seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") % SEEDS


def token_index(rows: Tensor, positions: Tensor, longest: int, max_length: int | None) -> Tensor:
    """(B, T) int64: data-set row · max_length + position, of data rows (B,) and positions (B, T).

    Args:
        rows, positions: int64.
        longest: tokens that a sequence of the batch may have.
        max_length: that a sequence of the run may have; None: 2³².

    Raises:
        ValueError: sequences longer than ``max_length``, whose tokens would share the noise of others.
    """
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"max_length: got {max_length}, expected at least {longest}, the tokens of a row of the data set"
        )
    return (rows * (UNLIMITED_LENGTH if max_length is None else max_length))[:, None] + positions


def make_generator(model: nn.Module, config: PreferenceConfig) -> NoiseGenerator:
    """A float32 generator for the head of a reference, alike on all ranks: a function of the run's seed.

    Raises:
        ValueError: the head, without LoRA on it, is not a plain linear layer.
    """
    core, head = find_causal_lm(model)
    layers = linear_layers(head.base_layer if is_plain_lora(head) else head)  # type: ignore[arg-type]
    if layers is None:
        raise ValueError(
            f"method: got 'dnpo', expected 'preference': the head of {type(core).__name__} is a "
            f"{type(head).__name__}, not a plain linear layer"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise_seed(config.seed, -1) % 2**63)
        return NoiseGenerator(
            layers[0].in_features,
            layers[0].out_features,
            rank=config.noise_rank,
            device="cpu",
            dtype=torch.float32,
        )


class NoisePlayer(TrainerCallback):
    """The second player of a run with ``method: dnpo``; as a callback it steps right after the policy.

    Args:
        generator: on its device, where it stays.
        config: the run's settings.
        ranks: that train together, of the default process group; each holds the whole generator.

    Attributes:
        optimizer: of this rank's share of the generator: of the class that ``optim`` names where that is one of
            ``OPTIMIZERS``, all of which treat each number by itself, else AdamW; without weight decay, which
            the penalty stands for.
        mean_tokens: scored rejected tokens per micro-step of this optimiser step, on average over ranks.
        hidden: the reference's hidden states of the last micro-step's scored rejected tokens.
    """

    def __init__(self, generator: NoiseGenerator, config: PreferenceConfig, ranks: int = 1) -> None:
        self.generator = generator
        self.config = config
        self.ranks = ranks
        self._shares = {
            name: _Share(parameter, ranks) for name, parameter in generator.named_parameters()
        }
        self.optimizer = self._make_optimizer()
        self.mean_tokens = torch.ones((), device=config.device)
        self.hidden: Tensor | None = None
        self._first_sigma: float | None = None
        self._warned = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optim in OPTIMIZERS:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(config)
        else:
            betas = (config.adam_beta1, config.adam_beta2)
            kind, settings = torch.optim.AdamW, {"betas": betas, "eps": config.adam_epsilon}
        settings = {**settings, "lr": config.noise_learning_rate, "weight_decay": 0.0}
        optimizer: torch.optim.Optimizer = kind(
            [share.own for share in self._shares.values()], **settings
        )
        return optimizer

    # ---- An optimiser step ----

    def turn(self, step: int) -> str:
        """Who plays in an optimiser step, counted from 0: ``"both"``, ``"noise"`` or ``"model"``."""
        if self.config.noise_schedule == "joint":
            return "both"
        steps = self.config.noise_steps
        return "noise" if step % (steps + 1) < steps else "model"

    def count_tokens(self, batches: list[dict[str, Tensor]]) -> None:
        """Set :attr:`mean_tokens` from the micro-steps of an optimiser step; all ranks must call."""
        counts = [(b["completion_labels"].chunk(2)[1] != -100).sum() for b in batches]
        total = torch.stack(counts).double().to(self.config.device).mean()
        if self.ranks > 1:
            dist.all_reduce(total)
        self.mean_tokens = total / self.ranks

    def finish_gradient(self) -> float:
        """Average the gradient over ranks and clip it by its own norm to ``max_grad_norm``.

        Returns:
            Its norm before clipping; 0 where the generator is frozen.
        """
        parameters = list(self.generator.parameters())
        if all(p.grad is None for p in parameters):
            return 0.0
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.ranks > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.ranks
        limit = self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        return float(norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The generator's step, its learning rate scaled as the scheduler has scaled the policy's."""
        policy = kwargs["optimizer"].param_groups[0]
        base = policy.get("initial_lr", args.learning_rate)  # a scheduler notes where it began
        share = policy["lr"] / base if base else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.noise_learning_rate * share
        for share in self._shares.values():
            share.take_gradient()
        self.optimizer.step()
        for share in self._shares.values():
            share.exchange()
        self.forget_gradient()

    def forget_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.generator.zero_grad(set_to_none=True)

    # ---- σ ----

    def excess(self, sigma: float) -> str | None:
        """What is wrong with a peak of σ (``noise/sigma_peak``); None if it is below the limit."""
        limit = self.config.noise_sigma_limit
        if not sigma >= limit:
            return None
        return (
            f"the noise has grown to σ = {sigma:.4g} (root mean square of a vocabulary entry, in units of "
            f"logits), noise_sigma_limit is {limit:g}; raise noise_alpha or lower noise_learning_rate"
        )

    def watch(self, sigma: float, step: int) -> None:
        """Warn where the peak of σ passes an eighth, a quarter and a half of the limit."""
        limit = self.config.noise_sigma_limit
        first = self._first_sigma = sigma if self._first_sigma is None else self._first_sigma
        passed = sum(sigma >= share * limit for share in _WARNED_SHARES)
        if passed > self._warned:
            self._warned = passed
            logger.warning(
                f"the noise has grown: σ = {sigma:.4g} (noise/sigma_peak) in optimiser step {step}, "
                f"{first:.4g} at the start; training stops at noise_sigma_limit = {limit:g}"
            )

    # ---- Checkpoints ----

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's tensors, under the names of a checkpoint, as if one rank had held them all.

        All ranks must call.
        """
        return {
            f"{_OPTIMIZER}{name}.{key}": share.whole(value)
            for name, share in self._shares.items()
            for key, value in self.optimizer.state[share.own].items()
            if isinstance(value, Tensor)
        }

    def check_checkpoint(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Raise ValueError unless a checkpoint's tensors hold a generator like this run's."""
        held = {
            name.removeprefix(_GENERATOR): tensor
            for name, tensor in tensors.items()
            if name.startswith(_GENERATOR)
        }
        if not held:
            raise ValueError(
                f"resume_from_checkpoint: {source} holds no noise generator: it was not saved by a run with "
                "method 'dnpo'; start a run of its own with model_name_or_path instead"
            )
        try:
            self.generator.check_state(held, source)
        except ValueError as error:
            raise ValueError(f"resume_from_checkpoint: {error}") from error

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load what :meth:`optimizer_state` gave; the other tensors of the checkpoint are returned."""
        others, states = dict(tensors), {}
        for index, (name, share) in enumerate(self._shares.items()):
            prefix = f"{_OPTIMIZER}{name}."
            mine = [key for key in others if key.startswith(prefix)]
            states[index] = {key.removeprefix(prefix): share.part(others.pop(key)) for key in mine}
        whole = self.optimizer.state_dict()
        whole["state"] = {index: state for index, state in states.items() if state}
        self.optimizer.load_state_dict(whole)
        return others


class _Share:
    """One rank's share of a parameter's numbers: a span of them in memory's order, as long as the others'.

    Args:
        parameter: contiguous.
        ranks: of the default process group, among which the numbers are dealt out; the last ones may get fewer.

    Attributes:
        own: what an optimiser is to step: the parameter itself where there is one rank, else a view of it.
    """

    def __init__(self, parameter: nn.Parameter, ranks: int) -> None:
        self.parameter = parameter
        numbers = parameter.numel()
        step = -(-numbers // ranks)
        self._spans = [
            slice(min(rank * step, numbers), min((rank + 1) * step, numbers))
            for rank in range(ranks)
        ]
        self.own = parameter
        if ranks > 1:
            self._mine = self._spans[dist.get_rank()]
            self.own = nn.Parameter(parameter.detach().view(-1)[self._mine])

    def take_gradient(self) -> None:
        """Give :attr:`own` its part of the parameter's gradient."""
        if self.own is not self.parameter:
            gradient = self.parameter.grad
            self.own.grad = None if gradient is None else gradient.view(-1)[self._mine]

    def exchange(self) -> None:
        """After a step: hand out :attr:`own` and take what the others have, if there was a gradient."""
        if self.own is not self.parameter and self.own.grad is not None:
            self._fill(self.parameter.detach().view(-1))

    def whole(self, state: Tensor) -> Tensor:
        """A tensor of the optimiser's state; in the parameter's shape where it has a number for each of its."""
        if self.own is self.parameter or state.shape != self.own.shape:
            return state
        flat = state.new_empty(self.parameter.numel())
        flat[self._mine] = state
        self._fill(flat)
        return flat.view_as(self.parameter)

    def part(self, state: Tensor) -> Tensor:
        """The inverse of :meth:`whole`."""
        if self.own is self.parameter or state.shape != self.parameter.shape:
            return state
        return state.reshape(-1)[self._mine].clone()

    def _fill(self, flat: Tensor) -> None:
        for rank, span in enumerate(self._spans):
            if span.start < span.stop:
                dist.broadcast(flat[span], src=rank)
