"""One training run of tests/trainer/test_many_devices.py, by one process or as one rank of several.

Started as a program it forks the ranks of one process group after another, each of which does several runs.
What a run gives is compared as it lies on disk: log lines, the gradient of every parameter before every
optimiser step, and the weights at the end, put together from their shards.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import ParallelismConfig
from cpu_sharding import allow_sharding_on_cpu, keep_deepspeed_to_gloo
from ranks import fork_ranks
from safetensors.torch import save_file
from tiny import tiny_llama, tokenized_pairs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from fastpo.demo.model import build_tokenizer
from fastpo.trainer import PreferenceConfig, PreferenceTrainer
from fastpo.trainer.model import add_adapter


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 may have spread over the processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable weights of a model, by the names they have without wrappers."""
    import deepspeed

    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sharded = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext():
                weights[plain_name(name)] = whole(parameter.detach()).cpu().clone()
    return weights


def plain_name(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


class Gradients(TrainerCallback):
    """Keeps every trainable parameter's whole gradient of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed is None:
            self.keep(kwargs["model"], lambda p: whole(p.grad))

    def watch_engine(self, engine: Any) -> None:
        """DeepSpeed's step is part of its backward: look right before it."""
        from deepspeed.utils import safe_get_full_grad

        step = engine.step

        def look_and_step(*args: Any, **kwargs: Any) -> Any:
            self.keep(engine.module, safe_get_full_grad)
            return step(*args, **kwargs)

        engine.step = look_and_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.deepspeed is not None:
            self.watch_engine(self.trainer.deepspeed)

    def keep(self, model: nn.Module, gradient: Callable[[nn.Parameter], Tensor]) -> None:
        self.steps.append(
            {
                plain_name(name): gradient(parameter).detach().cpu().float().clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )


# ---- What goes wrong ----


class Kill(TrainerCallback):
    """Kills some of the processes after an optimiser step."""

    def __init__(self, step: int, ranks: list[int]) -> None:
        self.step, self.ranks = step, ranks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)


class NoAllReduce(TrainerCallback):
    """DDP that keeps each process's gradient to itself."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def keep(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, but no strings
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        self.trainer.model_wrapped.register_comm_hook(None, keep)


class NoReduceScatter(TrainerCallback):
    """FSDP2 whose processes each take their part of their own gradient."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for module in kwargs["model"].modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(OwnPart())


class OwnPart:
    """In the place of FSDP2's reduce-scatter."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, *others: Any, **options: Any
    ) -> None:
        parts = input_tensor.chunk(torch.distributed.get_world_size(group))
        output_tensor.copy_(parts[torch.distributed.get_rank(group)])


def own_group() -> Any:
    """A process group of this process alone."""
    ranks = range(torch.distributed.get_world_size())
    groups = [torch.distributed.new_group([rank]) for rank in ranks]
    return groups[torch.distributed.get_rank()]


# ---- A run ----


def run(directory: Path, name: str, spec: dict[str, Any], world: int) -> PreferenceTrainer:
    """Train as ``spec`` says, and write what came out under ``directory / name``.

    ``spec``: ``settings`` of the configuration, those of one process in ``single``; ``model`` and
    ``reference``, directories of models (no reference: a copy of the model, or the base of an adapter);
    ``lora``, an adapter's settings; ``load_first``: models are loaded before the configuration exists, so that
    DeepSpeed has no part in it; ``layout`` ``"root"``: one FSDP2 unit for the whole model, of policy and
    reference; ``context_parallel``: accelerate's ``cp_size``; ``plant``: a fault; ``output``: the run whose
    output directory this one has, to go on with it; ``kill``: the optimiser step after which processes are
    killed, and which; ``refused``: the error of ``train`` is what comes out; ``save``: write the trained model
    to ``saved``, too.
    """
    launched = "WORLD_SIZE" in os.environ
    output = directory / spec.get("output", name) / "output"
    notes = directory / name / f"of-{world}"

    def load(key: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory / spec[key], dtype="float32")

    def models() -> tuple[Any, Any]:
        model = load("model")
        if spec.get("lora"):
            torch.manual_seed(5)
            model = add_adapter(model, spec["lora"])
            with torch.no_grad():  # B starts at 0, and so would the gradients of A
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.normal_(std=0.1)
        return model, load("reference") if spec.get("reference") else None

    loaded = models() if spec.get("load_first") else None
    settings = spec["settings" if launched else "single"]
    sharded = {"fsdp", "deepspeed"} & set(settings)
    if launched and "context_parallel" in spec:
        size = spec["context_parallel"]
        parallelism = ParallelismConfig(cp_size=size, dp_shard_size=world // size)
        settings = {**settings, "parallelism_config": parallelism}
    config = PreferenceConfig(
        output_dir=str(output),
        use_cpu=not sharded,
        ddp_backend="gloo" if launched else None,
        **settings,
    )
    model, reference = loaded or models()
    if spec.get("layout") == "root" and reference is not None and launched:
        fully_shard(reference)
    pairs = datasets.load_from_disk(str(directory / "train"))
    gradients = Gradients()
    fault = {"no all-reduce": NoAllReduce, "no reduce-scatter": NoReduceScatter}.get(
        spec.get("plant")
    )
    faults = [fault()] if fault else []
    if "kill" in spec:
        faults.append(Kill(*spec["kill"]))
    trainer = PreferenceTrainer(
        model,
        config,
        train_dataset=pairs,
        eval_dataset=pairs.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
        ref_model=reference,
        callbacks=[gradients, *faults],
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (Gradients, NoAllReduce)):
            callback.trainer = trainer
    if spec.get("layout") == "root" and launched:
        fully_shard(trainer.model)
    if spec.get("plant") == "local gamma":
        trainer.loss_module.margin.group = own_group()
    notes.mkdir(parents=True, exist_ok=True)
    rank = config.process_index
    if spec.get("refused"):
        try:
            trainer.train()
        except ValueError as error:
            (notes / f"refused-{rank}.txt").write_text(str(error))
        return trainer
    trainer.train()
    parameter = next(
        trainer.model.parameters()
    )  # before an evaluation leaves some of them gathered
    evaluation = trainer.evaluate()
    seen = {
        "log": trainer.state.log_history,
        "eval": evaluation,
        "ranks": config.world_size,
        "parameters": type(parameter).__name__ if not hasattr(parameter, "ds_id") else "ZeRO-3",
        "units": sorted(
            key or "root"
            for key, module in trainer.model.named_modules()
            if isinstance(module, FSDPModule)
        ),
        "reference": reference_numbers(trainer.ref_model),
        "noise": noise_numbers(trainer),
    }
    (notes / f"seen-{rank}.json").write_text(json.dumps(seen))
    flat = {f"{k}.{key}": t for k, step in enumerate(gradients.steps) for key, t in step.items()}
    weights = whole_weights(trainer.model)
    state = {k: v.contiguous() for k, v in trainer._state_tensors().items()}
    save_file(flat, notes / f"gradients-{rank}.safetensors")
    save_file(weights, notes / f"weights-{rank}.safetensors")
    save_file(state, notes / f"loss-{rank}.safetensors")
    if spec.get("save"):
        trainer.save_model(str(directory / name / "saved"))
    return trainer


def reference_numbers(reference: nn.Module | None) -> list[int] | None:
    """Numbers of the reference that this process holds at rest, and those of the whole."""
    if reference is None:
        return None
    held = total = 0
    for parameter in reference.parameters():
        if hasattr(parameter, "ds_id"):
            held += parameter.ds_tensor.numel() if parameter.numel() == 0 else parameter.numel()
            total += parameter.ds_numel
        else:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            held, total = held + local.numel(), total + parameter.numel()
    return [held, total]


def noise_numbers(trainer: PreferenceTrainer) -> list[int] | None:
    """Numbers of the noise's generator and of its optimiser that this process holds at rest, and the whole."""
    if trainer._noise is None:
        return None
    tensors = list(trainer._noise.generator.parameters())
    for state in trainer._noise.optimizer.state.values():
        tensors += [value for value in state.values() if value.dim()]
    held = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return [sum(t.numel() for t in each) for each in (held, tensors)]


def tiny_models(directory: Path, seed: int = 3) -> None:
    """Write what the runs read: a model, one with a tied head, a reference and 16 tokenised pairs."""
    tokenizer = build_tokenizer()
    model = tiny_llama(len(tokenizer), seed)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tied = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True}))
    with torch.no_grad():
        tied.lm_head.weight.mul_(20)
    for name, each in {"model": model, "reference": reference, "tied": tied}.items():
        each.save_pretrained(directory / name)
    tokenizer.save_pretrained(directory / "model")
    tokenized_pairs(16, len(tokenizer), seed).save_to_disk(directory / "train")


def forget() -> None:
    """What accelerate and transformers remember from one run to the next."""
    from accelerate.state import AcceleratorState, GradientState

    unset_hf_deepspeed_config()
    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for key in list(os.environ):
        if key.startswith(("ACCELERATE_", "FSDP_")):
            del os.environ[key]


def main(directory: Path) -> None:
    """Do the jobs of ``jobs.json``: each is a group of ``world`` processes and ``runs`` by name.

    Where the job ``dies`` that must happen, else it must not.
    """
    torch.set_num_threads(1)
    allow_sharding_on_cpu()
    keep_deepspeed_to_gloo()
    for job in json.loads((directory / "jobs.json").read_text()):

        def work(job: dict[str, Any] = job) -> None:
            for name, spec in job["runs"].items():
                run(directory, name, spec, job["world"])
                forget()

        codes = fork_ranks(work, job["world"])
        if any(codes) != job.get("dies", False):
            sys.exit(f"{list(job['runs'])} on {job['world']} processes ended with {codes}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
