"""Two and four gloo processes against one: losses, log-probs, every gradient of every step, and the weights.

DDP, FSDP2 in three layouts (accelerate's own, in which embedding and [norm, head] are units of their own;
every linear layer with the head among them a unit; one unit for all), ZeRO-2 and ZeRO-3, with a live reference
that is laid out like the policy, and with the tokens of each sequence spread over processes. A missing
reduction and a margin solved over one process's pairs are planted, and noticed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import device_run
import pytest
from device_run import tiny_models
from ranks import finish, start
from safetensors.torch import load_file

PAIRS = 4  # of a micro-step, over all processes
STEPS = 3
RTOL = 1e-5
SHARED: dict[str, Any] = {
    "max_steps": STEPS, "gradient_accumulation_steps": 2, "learning_rate": 5e-4, "optim": "adamw_torch",
    "adam_epsilon": 1e-3, "max_grad_norm": 1e6, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    "seed": 7, "train_sampling_strategy": "sequential", "beta": 0.5, "report_to": [],
}  # fmt: skip
METRICS = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "rewards/chosen",
    "logps/chosen",
    "logps/rejected",
)
OPTIONAL = ("gamma/min", "gamma/max", "gamma/mean", "loss/model", "loss/noise")


def fsdp(*layers: str, **settings: Any) -> dict[str, Any]:
    units = ["LlamaDecoderLayer", *layers]
    config = {"version": 2, "transformer_layer_cls_to_wrap": units, **settings}
    return {"fsdp": True, "fsdp_config": config}


def zero(stage: int) -> dict[str, Any]:
    auto = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    return {
        "deepspeed": {
            # Small weights stay whole on each device unless told otherwise.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            **dict.fromkeys((*auto, "gradient_clipping"), "auto"),
        }
    }  # fmt: skip


CONTEXT = {"fsdp_config": {**fsdp()["fsdp_config"], "activation_checkpointing": True}}
PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {},
    "tail": fsdp(),
    "head": fsdp("Linear"),
    "root": {**fsdp(), "layout": "root"},
    "offload": fsdp(cpu_offload=True, activation_checkpointing=True),
    "context": {**fsdp(), **CONTEXT, "context_parallel": 2},  # accelerate's cp_size
    "zero2": zero(2),
    "zero3": zero(3),
}
REFERENCE = {"reference": "reference"}
METHODS: dict[str, dict[str, Any]] = {
    "dpo": REFERENCE,
    "gamma": {**REFERENCE, "margin": "gamma", "gamma_scope": "batch", "gamma_tau": 0.3},
    "shared": {**REFERENCE, "prefix_sharing": True},
    "copied": {},  # the reference is a copy of the policy
    "precomputed": {"precompute_ref_log_probs": True},
    "tied": {"model": "tied"},
    "lora": {"lora": {"r": 4, "target_modules": ["q_proj", "up_proj", "lm_head"]}},
    "lora-precomputed": {
        "lora": {"r": 4, "target_modules": ["q_proj", "up_proj"]}, "precompute_ref_log_probs": True,
    },
    "dnpo": {
        **REFERENCE, "method": "dnpo", "noise_learning_rate": 0.05, "noise_sigma_limit": 1e9,
    },
    "sequence": {**REFERENCE, "sequence_parallel_size": 2},
    "sequence-gamma": {
        **REFERENCE, "sequence_parallel_size": 2, "margin": "gamma", "gamma_tau": 0.3,
        "gamma_queue_size": 10, "gamma_sample_size": 8,
    },
    "sequence-shared": {"sequence_parallel_size": 2, "prefix_sharing": True},
    "sequence-lora": {
        "sequence_parallel_size": 2, "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    },
    "dnpo-lora": {
        "lora": {"r": 4, "target_modules": ["q_proj", "lm_head"]}, "method": "dnpo",
        "noise_learning_rate": 0.05, "noise_sigma_limit": 1e9,
    },
}  # fmt: skip
OF_THE_RUN = (
    "model",
    "reference",
    "lora",
    "layout",
    "load_first",
    "plant",
    "context_parallel",
)  # the rest are settings

# (parallel, method, number of processes)
GATE = [
    ("ddp", "dpo", 2),
    ("tail", "dnpo", 2),
    ("tail", "lora", 2),
    ("head", "dnpo", 2),
    ("head", "gamma", 2),
    ("root", "shared", 2),
    ("offload", "copied", 2),
    ("tail", "precomputed", 2),
    ("head", "dnpo-lora", 2),
    ("zero2", "gamma", 2),
    ("zero3", "copied", 2),
    ("zero3", "lora", 2),
    ("tail", "tied", 4),
    ("zero3", "gamma", 4),
    ("ddp", "sequence", 2),
    ("tail", "sequence-gamma", 4),
    ("head", "sequence-shared", 4),
    ("zero3", "sequence-lora", 4),
    ("zero2", "sequence", 4),
    ("context", "dpo", 4),
]
FAULTS = {
    "no all-reduce": ("ddp", "dpo"),
    "no reduce-scatter": ("tail", "dpo"),
    "local gamma": ("tail", "gamma"),
}


def batches(pairs: int, evaluated: int) -> dict[str, int]:
    return {"per_device_train_batch_size": pairs, "per_device_eval_batch_size": evaluated}


def spec_of(parallel: str, method: str, world: int, **more: Any) -> dict[str, Any]:
    """What :func:`device_run.run` is told."""
    chosen = {"model": "model", **PARALLEL[parallel], **METHODS[method], **more}
    run = {name: chosen.pop(name) for name in OF_THE_RUN if name in chosen}
    together = ("fsdp", "fsdp_config", "deepspeed", "sequence_parallel_size")
    single = {k: v for k, v in chosen.items() if k not in together}
    readers = world // chosen.get("sequence_parallel_size", run.get("context_parallel", 1))
    return {
        **run,
        "settings": {**SHARED, **chosen, **batches(PAIRS // readers, PAIRS // world)},
        # One process has its reference live, also where several computed it beforehand.
        "single": {**SHARED, **single, **batches(PAIRS, PAIRS), "precompute_ref_log_probs": False},
    }  # fmt: skip


class Compared:
    """Runs of several processes beside those of one, which are done once for all that they are compared to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.singles: dict[str, Path] = {}
        tiny_models(directory)

    def do(self, *jobs: dict[str, Any]) -> None:
        """Do jobs as :func:`device_run.main` describes them."""
        (self.directory / "jobs.json").write_text(json.dumps(jobs))
        cache = self.directory / "cache"
        finish([start("device_run.py", self.directory, FASTPO_CACHE=cache)])

    def single(self, spec: dict[str, Any]) -> Path:
        alone = {k: v for k, v in spec.items() if k in ("single", "model", "reference", "lora")}
        key = json.dumps(alone, sort_keys=True)
        if key not in self.singles:
            name = f"single-{len(self.singles)}"
            device_run.run(self.directory, name, alone, 1)
            self.singles[key] = self.directory / name / "of-1"
        return self.singles[key]

    def check(self, name: str, spec: dict[str, Any], world: int) -> list[dict[str, Any]]:
        """Raise AssertionError unless all ranks of the run saw what one process sees; what they noted."""
        one, several = self.single(spec), self.directory / name / f"of-{world}"
        alone = json.loads((one / "seen-0.json").read_text())
        expected = alone["log"][:STEPS]
        notes = []
        for rank in range(world):
            seen = json.loads((several / f"seen-{rank}.json").read_text())
            notes.append(seen)
            assert seen["ranks"] == world
            for metric in ("eval_loss", "eval_rewards/margins", "eval_logps/rejected"):
                assert seen["eval"][metric] == pytest.approx(
                    alone["eval"][metric], rel=RTOL, abs=2e-6
                ), (name, metric)
            for step, (line, wanted) in enumerate(zip(seen["log"][:STEPS], expected, strict=True)):
                names = [*METRICS, *(name for name in OPTIONAL if name in wanted)]
                for metric in names:
                    assert line[metric] == pytest.approx(wanted[metric], rel=RTOL, abs=2e-6), (
                        name, step, metric,
                    )  # fmt: skip
                if "noise/grad_norm" in wanted:
                    # It follows small differences of large float32 sums.
                    assert wanted["noise/grad_norm"] > 0
                    assert line["noise/grad_norm"] == pytest.approx(
                        wanted["noise/grad_norm"], rel=1e-4
                    )
            for kind in ("gradients", "weights", "loss"):
                wanted, found = (
                    load_file(path / f"{kind}-{number}.safetensors")
                    for path, number in ((one, 0), (several, rank))
                )
                assert found.keys() == wanted.keys(), name
                for key, tensor in wanted.items():
                    size = tensor.double().norm()
                    assert size > 0 or kind != "gradients", (name, key)
                    difference = (found[key].double() - tensor.double()).norm()
                    assert difference <= RTOL * size, (name, kind, key, float(difference / size))
        return notes


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return Compared(tmp_path_factory.mktemp("devices"))


def test_many_processes_equal_one(compared: Compared) -> None:
    runs: dict[int, dict[str, dict[str, Any]]] = {2: {}, 4: {}}
    for parallel, method, world in GATE:
        runs[world][f"{parallel}-{method}"] = spec_of(parallel, method, world)
    faults = {
        name: spec_of(parallel, method, 2, plant=name)
        for name, (parallel, method) in FAULTS.items()
    }
    compared.do({"world": 2, "runs": {**runs[2], **faults}}, {"world": 4, "runs": runs[4]})
    for world, several in runs.items():
        for name, spec in several.items():
            check_layout(name, compared.check(name, spec, world), world)
    for name, spec in faults.items():
        with pytest.raises(AssertionError, match=name):
            compared.check(name, spec, 2)


def check_layout(name: str, notes: list[dict[str, Any]], world: int) -> None:
    """The run was spread as it should be, and its reference like it."""
    parallel, _, method = name.partition("-")
    expected = {"ddp": "Parameter", "zero2": "Parameter", "zero3": "ZeRO-3"}.get(
        parallel, "DTensor"
    )
    assert all(seen["parameters"] == expected for seen in notes), name
    units = notes[0]["units"]
    assert ("root" in units) == (expected == "DTensor")
    heads = [unit for unit in units if "lm_head" in unit]
    assert bool(heads) == (parallel in ("tail", "head", "offload", "context"))
    if "dnpo" in method:  # the generator and the two moments of AdamW
        held, whole = zip(*(seen["noise"] for seen in notes), strict=True)
        assert sum(held) == whole[0]
        assert max(held) < 1.1 * whole[0] / world
    if "lora" in method or "precomputed" in method:
        assert all(seen["reference"] is None for seen in notes)
        return
    held, whole = zip(*(seen["reference"] for seen in notes), strict=True)
    if expected == "Parameter":
        assert held == whole
    else:  # every weight is cut, and rows are added until they can be
        assert sum(held) < 1.1 * whole[0]
        assert max(held) < 1.3 * whole[0] / world


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world", [2, 4])
def test_every_method_in_every_layout(compared: Compared, world: int) -> None:
    runs = {
        f"{parallel}-{method}": spec_of(parallel, method, world)
        for parallel in PARALLEL
        for method in METHODS
        # DeepSpeed has no place for the noise, a head that is tied cannot be a unit beside its embedding, and
        # FSDP's own checkpointing keeps adapters from being saved.
        if not (parallel.startswith("zero") and "dnpo" in method)
        and (parallel, method) != ("head", "tied")
        # Processes that share sequences by cp_size must not be all there are, nor share packed rows or noise.
        and not (
            parallel == "context"
            and (world == 2 or any(part in method for part in ("sequence", "shared", "dnpo")))
        )
        and not (parallel in ("offload", "context") and "lora" in method)
    }
    compared.do({"world": world, "runs": runs})
    for name, spec in runs.items():
        check_layout(name, compared.check(name, spec, world), world)
