"""One optimiser step of a run on fake tensors, with every allocation in a ledger.

The step is not the first: the optimizer's state is there before it begins. Its micro-step is as large as they
come: every answer has ``max_length`` tokens, and all of them are scored. With gradient accumulation there are
two micro-steps, as the second finds the gradients of the first.
"""

from __future__ import annotations

import functools
import gc
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

import fastpo
from fastpo.head.causal_lm import find_causal_lm
from fastpo.trainer.model import disable_dropout, is_peft_model, router_coefficient
from fastpo.trainer.noise import NoisePlayer, make_generator
from fastpo.trainer.reference import base_model

from .fake_model import (
    ScoringHead,
    allocate,
    enable_checkpointing,
    holds_masks,
    make_model,
    read_model_config,
    with_adapter,
)
from .ledger import GRADIENTS, NOISE, OPTIMIZER, REFERENCE, WEIGHTS, Ledger
from .loss_layer import workspace_bytes
from .optimizer import make_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import EstimateConfig


class Simulation(NamedTuple):
    """What a step on fake tensors shows, on one device that holds everything.

    Attributes:
        timeline: (moments, parts) int64, bytes alive per part of ``ledger.PARTS``.
        units: bytes of what a sharded model gathers at once: (largest block of layers, everything else).
        parameters, trained: of the policy, how many numbers.
        name: of the model's class.
        dtype: of its weights in the step.
        adapted: whether an adapter is trained, which has a dtype of its own.
    """

    timeline: np.ndarray
    units: tuple[int, int]
    parameters: int
    trained: int
    name: str
    dtype: torch.dtype
    adapted: bool


def simulate(config: EstimateConfig) -> Simulation:
    """Run the step that ``config`` describes.

    Raises:
        FileNotFoundError, ValueError: a model configuration or an optimizer that cannot be used; a model whose
            work depends on the numbers in its tensors.
    """
    device = torch.device("cpu" if config.use_cpu else "cuda")
    policy_config = read_model_config(config, "model_name_or_path")
    reference_config = policy_config
    if config.ref_model_name_or_path and config.needs_reference:
        reference_config = read_model_config(config, "ref_model_name_or_path")
    ledger = Ledger(functools.partial(workspace_bytes, device))
    step = _Step(config, ledger, device, policy_config, reference_config)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), ledger:
            step.allocate()
            step.run()
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise ValueError(
            f"model_name_or_path: {config.model_name_or_path} cannot be estimated: what it does depends on the "
            f"numbers in its tensors ({' '.join(str(error).split())})"
        ) from error
    policy = step.policy
    return Simulation(
        ledger.timeline(),
        _units(policy),
        sum(p.numel() for p in policy.parameters()),
        sum(p.numel() for p in policy.parameters() if p.requires_grad),
        type(find_causal_lm(policy)[0]).__name__,
        next(policy.parameters()).dtype,
        is_peft_model(policy),
    )


class _Step:
    """The pieces of a run and the step they make."""

    def __init__(
        self,
        config: EstimateConfig,
        ledger: Ledger,
        device: torch.device,
        policy_config: Any,
        reference_config: Any,
    ) -> None:
        self.config, self.ledger, self.device = config, ledger, device
        # FSDP and DeepSpeed give the layers weights in the dtype they compute in, where autocast makes copies.
        dtype = config.compute_dtype if config.is_sharded else None
        self.policy = with_adapter(config, make_model(config, policy_config, dtype))
        precomputed = config.precompute_ref_log_probs or bool(config.ref_logps)
        self.scores_reference = config.needs_reference and not precomputed
        self.scores_reference |= config.method == "dnpo"
        self.reference: PreTrainedModel | None = None
        if self.scores_reference and (
            not is_peft_model(self.policy) or config.ref_model_name_or_path
        ):
            self.reference = make_model(config, reference_config, dtype)
            self.reference.eval().requires_grad_(False)
        self.noise: NoisePlayer | None = None
        self.kept: Tensor | None = None  # what the noise keeps of the last micro-step
        self.options: dict[str, Any] = {
            "backward": config.backward,
            "tol": config.tol,
            "low_memory": config.low_memory,
        }

    def allocate(self) -> None:
        """Weights, noise and optimizer, under the fake mode and the ledger."""
        config, ledger = self.config, self.ledger
        # What kind of layer a head is shows as long as its weight is no fake tensor.
        if config.method == "dnpo":
            with ledger.charging(NOISE):
                generator = make_generator(self.reference or self.policy, config)
                self.noise = NoisePlayer(generator, config)
        self.head = ScoringHead(self.policy, return_stats=True, **self.options)
        self.reference_head = self.head
        if self.reference is not None:
            self.reference_head = ScoringHead(self.reference, **self.options)
        with ledger.charging(WEIGHTS):
            allocate(self.policy)
        if self.reference is not None:
            with ledger.charging(REFERENCE):
                allocate(self.reference)
        if config.disable_dropout:
            disable_dropout(self.policy)
        core, _ = find_causal_lm(self.policy)
        self.router = router_coefficient(core, config.router_aux_loss_coef)
        enable_checkpointing(self.policy, config)
        self.policy.train()
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.ledger.move(p.grad, GRADIENTS)
            )
        self.update = make_optimizer(config, self.trained, self.device.type == "cuda")

    def run(self) -> None:
        """One step that makes the optimizer's state and is forgotten, and the one that counts."""
        for parameter in self._all_parameters():
            parameter.grad = torch.empty_like(parameter)
        self._optimizer_step()
        gc.collect()  # what is held by cycles alone is no memory of the run
        self.ledger.history.clear()
        for _ in range(min(2, self.config.gradient_accumulation_steps)):
            self._micro_step()
        self._optimizer_step()

    def _all_parameters(self) -> list[nn.Parameter]:
        generator = [] if self.noise is None else list(self.noise.generator.parameters())
        return [*self.trained, *generator]

    def _optimizer_step(self) -> None:
        with self.ledger.charging(OPTIMIZER):
            self.update()
        if self.noise is not None:
            with self.ledger.charging(NOISE):
                self.noise.optimizer.step()
        for parameter in self._all_parameters():
            parameter.grad = None

    def _autocast(self) -> Any:
        """Of a CPU also for a run on CUDA: the fake tensors are a CPU's."""
        dtype = self.config.compute_dtype
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)

    def _micro_step(self) -> None:
        config = self.config
        pairs, length = config.per_device_train_batch_size, config.max_length or 0
        ids = torch.zeros(2 * pairs, length, dtype=torch.int64)
        mask = torch.ones_like(ids)
        labels = torch.zeros_like(ids)
        inputs = {"input_ids": ids, "attention_mask": mask if holds_masks(config) else None}
        reference_loss: Tensor | None = None
        if self.scores_reference:
            reference_loss = self._score_reference(inputs, labels)
        further = {"output_router_logits": True} if self.router else {}
        call = functools.partial(self.policy, **inputs, use_cache=False, **further)
        with self._autocast():
            output = self.head.score(call, labels)
        assert self.head.log_probs is not None
        loss = self.head.log_probs.double().sum()
        if self.router:
            loss = loss + output.aux_loss
        if reference_loss is not None:
            loss = loss + reference_loss
        del output
        self.head.hidden = self.head.log_probs = None
        loss.backward()

    def _score_reference(self, inputs: dict[str, Any], labels: Tensor) -> Tensor | None:
        """Run the reference; under method dnpo the noise's part of the loss."""
        model = self.policy if self.reference is None else self.reference
        without = base_model(self.policy) if self.reference is None else nullcontext()
        call = functools.partial(model, **inputs, use_cache=False)
        with torch.no_grad(), self._autocast(), without:
            self.reference_head.score(call, None if self.noise else labels)
            if self.noise is None:
                return None
            return self._score_noise(self.noise, labels)

    def _score_noise(self, noise: NoisePlayer, labels: Tensor) -> Tensor:
        """Log-probs of the rejected answers under noise, and its penalty."""
        head = self.reference_head
        hidden, layer = head.hidden, head.frozen_layer
        assert hidden is not None
        half = len(labels) // 2
        fastpo.linear_logprobs(
            hidden[:half], layer.weight, labels[:half], layer.bias, **self.options
        )
        rows = labels[half:].reshape(-1)
        with torch.enable_grad():
            kept = hidden[half:].reshape(-1, hidden.shape[-1]).clone()
            self.kept = kept
            noisy, _ = noise.generator.forward(
                kept,
                layer.weight.detach(),
                rows,
                seed=0,
                token_index=torch.zeros_like(rows),
                return_clean=True,
                bias=None if layer.bias is None else layer.bias.detach(),
                backward=self.config.backward,
                tol=self.config.tol,
            )
            return noisy.double().sum() + noise.generator.penalty(kept)


def _units(model: nn.Module) -> tuple[int, int]:
    """Bytes of the largest block of a model, and of the weights that are in none.

    Blocks are the members of its longest list of modules: its layers.
    """
    lists: list[nn.ModuleList] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = max((list(each) for each in lists), key=len, default=[])
    sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    everything = sum(p.nbytes for p in model.parameters())
    return max(sizes, default=0), everything - sum(sizes)
