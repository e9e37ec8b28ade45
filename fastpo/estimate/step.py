"""One optimiser step of a run on fake tensors, with every allocation in a ledger.

The step is not the first: the optimizer's state is there before it begins. Its micro-step is as large as they
come (:mod:`fastpo.estimate.micro_step`). With gradient accumulation there are two micro-steps, as the second
finds the gradients of the first.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from fastpo.head.packed_attention import PackedAttention
from fastpo.head.sequence_attention import part_of
from fastpo.kernels import chunking, products_torch
from fastpo.trainer.model import disable_dropout, is_peft_model, router_coefficient
from fastpo.trainer.noise import NoisePlayer, make_generator
from fastpo.trainer.reference import base_model

from .fake_model import (
    ScoringHead,
    allocate,
    enable_checkpointing,
    make_model,
    read_model_config,
    with_adapter,
)
from .ledger import GRADIENTS, NOISE, OPTIMIZER, REFERENCE, WEIGHTS, Ledger
from .loss_layer import workspace_bytes
from .micro_step import MicroStep, holds_masks, largest_micro_step
from .optimizer import make_optimizer
from .sequence_part import SequencePart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import EstimateConfig


class Simulation(NamedTuple):
    """What a step on fake tensors shows, on one device that holds everything.

    Attributes:
        timeline: (moments, parts) int64, bytes alive per part of ``ledger.PARTS``.
        units: bytes of what a sharded policy gathers at once: (largest block of layers, everything else).
        reference_units: the same of a live reference, (0, 0) without one.
        generator: bytes of a noise generator's parameters, 0 without one.
        micro_step: what ran.
        plain_head: whether the head is a linear layer, or plain LoRA on one.
        parameters, trained: of the policy, how many numbers.
        name: of the model's class.
        dtype: of its weights in the step.
        adapted: whether an adapter is trained, which has a dtype of its own.
    """

    timeline: np.ndarray
    units: tuple[int, int]
    reference_units: tuple[int, int]
    generator: int
    micro_step: MicroStep
    plain_head: bool
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
    micro_step = largest_micro_step(config)
    ledger = Ledger(functools.partial(workspace_bytes, device, micro_step.scored))
    step = _Step(config, ledger, device, micro_step, policy_config, reference_config)
    try:
        with _as_on(device), FakeTensorMode(allow_non_fake_inputs=True), ledger:
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
        (0, 0) if step.reference is None else _units(step.reference),
        sum(p.nbytes for p in step._generator()),
        micro_step,
        step.head.is_plain,
        sum(p.numel() for p in policy.parameters()),
        sum(p.numel() for p in policy.parameters() if p.requires_grad),
        type(find_causal_lm(policy)[0]).__name__,
        next(policy.parameters()).dtype,
        is_peft_model(policy),
    )


@contextmanager
def _as_on(device: torch.device) -> Iterator[None]:
    """Fake tensors are a CPU's: what asks them for the budget of a device or its libraries is told the run's.

    A CPU's library makes a product in many parts, which would take minutes one by one.
    """
    before = products_torch.onednn_is_faster, chunking.CPU_BUDGET_BYTES
    if device.type != "cpu":
        products_torch.onednn_is_faster = lambda: False  # type: ignore[assignment]
        chunking.CPU_BUDGET_BYTES = chunking.budget_bytes(device)
    try:
        yield
    finally:
        products_torch.onednn_is_faster, chunking.CPU_BUDGET_BYTES = before  # type: ignore[assignment]


class _Step:
    """The pieces of a run and the step they make."""

    def __init__(
        self,
        config: EstimateConfig,
        ledger: Ledger,
        device: torch.device,
        micro_step: MicroStep,
        policy_config: Any,
        reference_config: Any,
    ) -> None:
        self.config, self.ledger, self.device, self.largest = config, ledger, device, micro_step
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
            self.reference = make_model(
                config, reference_config, dtype if config.shards_reference else None
            )
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
        if self.router and config.packs_rows:
            raise ValueError(
                f"router_aux_loss_coef: got {self.router:g} with packed rows, expected 0: transformers takes "
                "the load-balancing loss over padded rows"
            )
        self.part: SequencePart | None = None
        if config.sequence_parallel_size > 1:
            if self.router:
                raise ValueError(
                    f"router_aux_loss_coef: got {self.router:g} with sequence_parallel_size "
                    f"{config.sequence_parallel_size}, expected 0: transformers takes the load-balancing loss "
                    "over whole rows"
                )
            models = [self.policy] if self.reference is None else [self.policy, self.reference]
            self.part = SequencePart(config.sequence_parallel_size, *models)
        enable_checkpointing(self.policy, config, ledger)
        self.policy.train()
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        for part, parameters in ((GRADIENTS, self.trained), (NOISE, self._generator())):
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, part=part: self.ledger.move(p.grad, part)
                )
        self.update = make_optimizer(config, self.trained, self.device.type == "cuda")

    def run(self) -> None:
        """One step that makes the optimizer's state and is forgotten, and the one that counts."""
        for parameter in self._all_parameters():
            parameter.grad = torch.empty_like(parameter)
        self._optimizer_step()
        gc.collect()  # what is held by cycles alone is no memory of the run
        self.ledger.history.clear()
        with nullcontext() if self.part is None else self.part.active():
            for _ in range(min(2, self.config.gradient_accumulation_steps)):
                self._micro_step()
        self._optimizer_step()

    def _generator(self) -> list[nn.Parameter]:
        return [] if self.noise is None else list(self.noise.generator.parameters())

    def _all_parameters(self) -> list[nn.Parameter]:
        return [*self.trained, *self._generator()]

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

    def _inputs(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Keywords of a forward beside the labels, masks included; of one rank's part of the tokens."""
        inputs = self._whole_inputs(model, batch)
        return inputs if self.part is None else part_of(inputs, 0, self.part.size)

    def _whole_inputs(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        if not self.config.packs_rows:
            mask = batch["attention_mask"] if holds_masks(self.config) else None
            return {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
        if not holds_masks(self.config):
            # Positions alone would have transformers look into them for the bounds of the sequences.
            return {"input_ids": batch["input_ids"], "use_cache": False}
        attention = PackedAttention(model, prefix_sharing=self.config.prefix_sharing, trial=False)
        where = (batch[name] for name in ("input_ids", "position_ids", "groups", "branches"))
        return {**attention.inputs(*where), "use_cache": False}

    def _micro_step(self) -> None:
        batch = {name: torch.zeros_like(t) for name, t in self.largest.batch.items()}
        labels = torch.zeros_like(self.largest.labels)
        index = self.largest.hidden_index
        where = None if index is None else torch.zeros_like(index)
        reference_loss: Tensor | None = None
        if self.scores_reference:
            reference_loss = self._score_reference(batch, labels, where)
        further = {"output_router_logits": True} if self.router else {}
        inputs = self._inputs(self.policy, batch)
        call = functools.partial(self.policy, **inputs, **further)
        with self._autocast():
            output = self.head.score(call, labels, where)
        assert self.head.log_probs is not None
        loss = self.head.log_probs.double().sum()
        if self.router:
            loss = loss + output.aux_loss
        if reference_loss is not None:
            loss = loss + reference_loss
        del output
        self.head.hidden = self.head.log_probs = None
        loss.backward()

    def _score_reference(
        self, batch: dict[str, Tensor], labels: Tensor, where: Tensor | None
    ) -> Tensor | None:
        """Run the reference; under method dnpo the noise's part of the loss."""
        model = self.policy if self.reference is None else self.reference
        without = base_model(self.policy) if self.reference is None else nullcontext()
        call = functools.partial(model, **self._inputs(model, batch))
        with torch.no_grad(), self._autocast(), without:
            self.reference_head.score(call, None if self.noise else labels, where)
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
        rows = rows[: round(self.largest.scored * len(rows))]
        with torch.enable_grad():
            kept = hidden[half:].reshape(-1, hidden.shape[-1])[: len(rows)].clone()
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
