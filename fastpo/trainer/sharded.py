"""Models whose weights are spread over processes: laying out a frozen reference, forwards, whole weights.

The policy is sharded by accelerate when training begins. Here is what a trainer needs beside that: a reference
that is laid out as the policy will be, and forwards and digests of models that FSDP2 or ZeRO-3 have spread
already. Unless it is said otherwise, all processes must call a function together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from accelerate import Accelerator

# Parts of a DeepSpeed configuration that an engine without an optimiser goes by.
_INFERENCE = (
    "zero_optimization",
    "bf16",
    "fp16",
    "torch_autocast",
    "zero_allow_untested_optimizer",
)


# ---- What a model is; without communication ----


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only parts of a model's weights (FSDP2, ZeRO-3)."""
    return is_fsdp(model) or is_zero3(model)


def is_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 has spread weights of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread weights of a model, when it was loaded or later."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_wrapping(model: nn.Module, accelerator: Accelerator) -> None:
    """Raise ValueError where an adapter would be trained and not saved.

    PEFT finds an adapter's weights by the names of the modules, to which accelerate's checkpoint wrappers add a
    part that the names of the weights do not have.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.activation_checkpointing and hasattr(model, "disable_adapter"):
        raise ValueError(
            "fsdp_config: got activation_checkpointing with an adapter, whose weights peft would leave out of "
            "every checkpoint, expected False; set gradient_checkpointing: true instead"
        )


# ---- Whole weights ----


def whole_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names in their order and values, detached; sharded ones are put together.

    One at a time: a tensor is whole until the next one is asked for. ``tensors`` are those of a ``state_dict``
    with ``keep_vars=True``, without which ZeRO-3's cannot be told from empty ones.
    """
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, DTensor):
            # Offloaded parts have to be where the processes communicate.
            part: Any = tensor.detach().to(tensor.device_mesh.device_type)
            yield name, part.full_tensor()
        else:
            with _gathered([tensor]):
                yield name, tensor.detach()


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The ``state_dict`` of a sharded model on the CPU, its tensors whole; of a PEFT model what is trained.

    Args:
        model: of whose weights one at a time is whole on the device.
        keep: whether this process wants them; the others get an empty mapping.
    """
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not hasattr(model, "disable_adapter")
    }
    state: dict[str, Tensor] = {}
    same: dict[int, str] = {}  # tied weights are saved once
    for name, tensor in whole_tensors(tensors):
        if keep:
            first = same.setdefault(id(tensors[name]), name)
            state[name] = state[first] if first in state else tensor.cpu().clone()
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def _gathered(parameters: list[Any], modifier_rank: int | None = None) -> Any:
    """A context in which weights that ZeRO-3 has spread are whole; others are as ever."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)


@contextmanager
def whole_by_module(*models: nn.Module) -> Iterator[None]:
    """Lets models run whose weights ZeRO-3 spread when they were loaded, and which no engine serves yet.

    While a module runs its own weights are whole; the others stay as they are. Any other model just runs.
    """
    spread = [model for model in models if is_zero3(model)]
    if not spread:
        yield
        return
    running: dict[nn.Module, Any] = {}

    def gather(module: nn.Module, args: Any) -> None:
        running[module] = _gathered(list(module.parameters(recurse=False)))
        running[module].__enter__()

    def release(module: nn.Module, args: Any, output: Any) -> None:
        running.pop(module).__exit__(None, None, None)

    handles = []
    for module in (module for model in spread for module in model.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(gather))
            handles.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def free_gathered(model: nn.Module) -> None:
    """Let go of the weights that FSDP2 has gathered in a forward for a backward that does not come.

    Each process by itself; nothing for other models.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- A frozen reference ----


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model as it is now, sharded only where the model is: by ZeRO-3, when it was loaded.

    Raises:
        ValueError: a model that FSDP2 has spread already, or a PEFT model that ZeRO-3 has.
    """
    if is_fsdp(model):
        raise ValueError(
            "ref_model: got None with a model that is sharded by FSDP2 already, expected the reference: such "
            "a model cannot be copied (or leave the sharding to the trainer: fsdp and fsdp_config)"
        )
    if not is_zero3(model):
        return copy.deepcopy(model)
    if not hasattr(model, "_from_config"):
        raise ValueError(
            f"ref_model: got None with a {type(model).__name__} whose weights ZeRO-3 has spread, expected the "
            "reference: it cannot be copied"
        )
    # A deep copy would lose the parts. Made anew under the same configuration it is spread in the same way.
    kind: Any = type(model)
    made: nn.Module = kind._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    theirs = dict(model.named_parameters())
    for name, parameter in made.named_parameters():
        # All processes see both whole; what the first one writes is what all of them keep.
        with _gathered([parameter, theirs[name]], modifier_rank=0), torch.no_grad():
            parameter.copy_(theirs[name])
    buffers = dict(model.named_buffers())
    for name, buffer in made.named_buffers():
        buffer.copy_(buffers[name])
    return made


def place_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a frozen model where the run's policy will be: spread over the processes, or whole on each device.

    Args:
        model: in evaluation mode, no weight requires a gradient; its fused head is in place.
        accelerator: the run's. FSDP2: sharded by the same plugin, so into the same units; all of them free
            what they have gathered once they have run, also those that stay whole in a policy until its
            backward. ZeRO-3: inside an engine of the run's configuration that has no optimiser. Others (DDP,
            ZeRO-1 and 2, FSDP1): on the device, under DeepSpeed in the dtype of its configuration.

    Returns:
        What is to be called: the model itself, or an engine around it.

    Raises:
        ValueError: FSDP1 with ``cpu_ram_efficient_loading``, under which a process may have no weights.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1 and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_config: got version 1 with cpu_ram_efficient_loading, expected version 2 (in a configuration "
            "file of accelerate fsdp_version: 2): the reference's weights would be whole on one process alone"
        )
    if plugin is not None and plugin.fsdp_version == 2:
        model = fsdp2_prepare_model(accelerator, model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(True, recurse=False)
        return model
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return model.to(accelerator.device)  # type: ignore[no-any-return]
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"]["stage"] != 3:
        dtype = accelerator.state.deepspeed_plugin.hf_ds_config.dtype()
        model.to(accelerator.device)
        # As the engine casts the policy; a quantised model's own method would refuse.
        return model if dtype == torch.float32 else nn.Module.to(model, dtype=dtype)
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=inference_config(config))
    engine.eval()
    return engine  # type: ignore[no-any-return]


def inference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed configuration for ZeRO-3 without an optimiser, from that of a run.

    What is still ``auto`` is left to DeepSpeed's defaults: the trainer fills such entries for the policy alone.
    """
    kept = {name: copy.deepcopy(config[name]) for name in _INFERENCE if name in config}
    for name, part in kept.items():
        if isinstance(part, dict):
            kept[name] = {key: value for key, value in part.items() if value != "auto"}
    kept["zero_optimization"].pop("offload_optimizer", None)
    return kept | {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31}
