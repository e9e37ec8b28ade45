"""The noise generator's side of a DNPO run: when it plays, what seeds its noise, how it is trained and saved.

The generator has an optimiser of its own, so that nothing that wraps or shards the policy's has to know of it.
Of several ranks each holds a part of its parameters, of their gradient and of the optimiser's state: the
generator is an FSDP2 module of its own, whole while log-probs under noise and their gradient are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from fastpo.head.causal_lm import find_causal_lm, linear_layers
from fastpo.head.lora import is_plain_lora
from fastpo.noise import NoiseGenerator
from fastpo.ops.philox import SEEDS

from .sharded import free_gathered, whole_tensors

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
        generator: on its device, where it stays, alike on all ranks.
        config: the run's settings.
        ranks: that train together, of the default process group; the generator is cut over them.

    Attributes:
        optimizer: of the generator: of the class that ``optim`` names where that is one of ``OPTIMIZERS``, all
            of which treat each number by itself, else AdamW; without weight decay, which the penalty stands
            for.
        mean_tokens: scored rejected tokens per micro-step of this optimiser step, on average over ranks.
        hidden: the reference's hidden states of the last micro-step's scored rejected tokens.
    """

    def __init__(self, generator: NoiseGenerator, config: PreferenceConfig, ranks: int = 1) -> None:
        self.generator = generator
        self.config = config
        self.ranks = ranks
        if ranks > 1:
            _cut(generator, config.device, ranks)
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
        optimizer: torch.optim.Optimizer = kind(self.generator.parameters(), **settings)
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
        """Clip the gradient by its own norm, that of all ranks together, to ``max_grad_norm``.

        Returns:
            Its norm before clipping; 0 where the generator is frozen.
        """
        parameters = list(self.generator.parameters())
        if all(p.grad is None for p in parameters):
            return 0.0
        limit = self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The generator's step, its learning rate scaled as the scheduler has scaled the policy's."""
        policy = kwargs["optimizer"].param_groups[0]
        base = policy.get("initial_lr", args.learning_rate)  # a scheduler notes where it began
        share = policy["lr"] / base if base else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.noise_learning_rate * share
        self.optimizer.step()
        self.forget_gradient()

    def forget_gradient(self) -> None:
        self.generator.zero_grad(set_to_none=True)

    # ---- σ ----

    def sigma_max(self) -> Tensor | None:
        """:meth:`NoiseGenerator.sigma_max` on :attr:`hidden`, None without; all ranks must call."""
        if self.hidden is None:
            return None
        largest = self.generator.sigma_max(self.hidden)
        free_gathered(self.generator)
        return largest

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

    def state(self) -> dict[str, Tensor]:
        """Generator and optimiser under the names of a checkpoint, whole and on the CPU.

        All ranks must call.
        """
        tensors: dict[str, Tensor] = {
            _GENERATOR + name: parameter for name, parameter in self.generator.named_parameters()
        }
        for name, parameter in self.generator.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{name}.{key}"] = value
        return {name: tensor.to("cpu", copy=True) for name, tensor in whole_tensors(tensors)}

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

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Load the optimiser's part of what :meth:`state` gave; returns the rest, for ``load_state_dict``."""
        others, states = dict(tensors), {}
        for index, (name, parameter) in enumerate(self.generator.named_parameters()):
            others[_GENERATOR + name] = _cut_alike(others[_GENERATOR + name], parameter)
            prefix = f"{_OPTIMIZER}{name}."
            mine = [key for key in others if key.startswith(prefix)]
            states[index] = {
                key.removeprefix(prefix): _cut_alike(others.pop(key), parameter) for key in mine
            }
        whole = self.optimizer.state_dict()
        whole["state"] = {index: state for index, state in states.items() if state}
        self.optimizer.load_state_dict(whole)
        return others


def _cut(generator: NoiseGenerator, device: torch.device, ranks: int) -> None:
    """Spread the generator's parameters over the ranks, each cut along its first dimension."""
    # Kept whole from its log-probs to its penalty; NoisyHead lets go of them then.
    fully_shard(
        generator, mesh=init_device_mesh(device.type, (ranks,)), reshard_after_forward=False
    )
    for method in ("penalty_and_peak", "sigma_max"):
        register_fsdp_forward_method(generator, method)


def _cut_alike(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor of a checkpoint as the parameter is; as it is where it has not its shape (a count of steps)."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(
        tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None
    )
