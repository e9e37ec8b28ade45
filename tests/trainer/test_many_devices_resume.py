"""Runs that are killed and go on, on as many processes or on others; models that they save at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device_run import tiny_models
from ranks import finish, start
from safetensors.torch import load_file
from test_many_devices import METHODS, OF_THE_RUN, PAIRS, SHARED, fsdp, zero
from transformers import AutoModelForCausalLM

STEPS, SAVED_AFTER, KILLED_AFTER = 6, 2, 3
SETTINGS: dict[str, Any] = {
    **SHARED, "max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_AFTER,
    "resume_from_checkpoint": "auto", "train_sampling_strategy": "random",
}  # fmt: skip
QUEUE = {"reference": "reference", "margin": "gamma", "gamma_tau": 0.3,
         "gamma_queue_size": 24, "gamma_sample_size": 8}  # fmt: skip
SHARED_SEQUENCES = {"sequence_parallel_size": 2, "logging_steps": 3}
PARTS = fsdp(state_dict_type="SHARDED_STATE_DICT")
TIMES = ("runtime", "second", "flos")


def spec_of(*parts: dict[str, Any], world: int = 2, **more: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"model": "model"}
    for each in parts:
        chosen |= each
    run = {name: chosen.pop(name) for name in OF_THE_RUN if name in chosen}
    readers = world // chosen.get("sequence_parallel_size", 1)
    settings = {"per_device_train_batch_size": PAIRS // readers, **SETTINGS, **chosen}
    return {**run, **more, "settings": settings}


class Runs:
    """Groups of processes in one directory, and what came out of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.jobs: list[dict[str, Any]] = []
        tiny_models(directory)

    def add(self, name: str, spec: dict[str, Any], world: int = 2, **job: Any) -> None:
        self.jobs.append({"world": world, "runs": {name: spec}, **job})

    def add_killed(self, name: str, *settings: dict[str, Any], ranks: list[int]) -> None:
        """A run that is not disturbed, and one of which some ranks are killed."""
        self.add(f"{name}-whole", spec_of(*settings, save=True))
        self.add(name, spec_of(*settings, kill=[KILLED_AFTER, ranks]), dies=True)

    def add_resumed(
        self, name: str, *settings: dict[str, Any], world: int = 2, of: str = "", **more: Any
    ) -> None:
        spec = spec_of(*settings, world=world, output=of or name, **more)
        self.add(f"{name}-resumed", spec, world)

    def do(self) -> None:
        (self.directory / "jobs.json").write_text(json.dumps(self.jobs))
        cache = self.directory / "cache"
        finish([start("device_run.py", self.directory, FASTPO_CACHE=cache)])

    def log(self, name: str, world: int) -> list[dict[str, float]]:
        lines = json.loads((self.directory / name / f"of-{world}" / "seen-0.json").read_text())[
            "log"
        ]
        return [
            {k: v for k, v in line.items() if not any(part in k for part in TIMES)}
            for line in lines
            if "loss" in line
        ]

    def check_saved(self, name: str) -> None:
        """Raise AssertionError unless ``from_pretrained`` loads the weights that were trained."""
        saved = AutoModelForCausalLM.from_pretrained(self.directory / name / "saved")
        trained = load_file(self.directory / name / "of-2" / "weights-0.safetensors")
        assert trained.keys() == dict(saved.named_parameters()).keys()
        for key, parameter in saved.named_parameters():
            assert torch.equal(parameter, trained[key]), key

    def check(self, name: str, world: int = 2, whole: str = "", rel: float = 1e-6) -> None:
        """Raise AssertionError unless the run that went on ended like the one that was not disturbed."""
        whole = f"{whole or name}-whole"
        gradients = load_file(
            self.directory / f"{name}-resumed" / f"of-{world}" / "gradients-0.safetensors"
        )
        steps = {int(key.split(".")[0]) for key in gradients}
        assert len(steps) == STEPS - SAVED_AFTER  # it did go on, and did not start again
        lines, expected = self.log(f"{name}-resumed", world), self.log(whole, 2)
        assert [line["step"] for line in lines] == [line["step"] for line in expected]
        assert expected[-1]["step"] == STEPS
        for line, wanted in zip(lines, expected, strict=True):
            for metric in (
                "loss",
                "grad_norm",
                "rewards/margins",
                "num_tokens",
                "gamma/max",
                "loss/noise",
            ):
                if metric in wanted:
                    assert line[metric] == pytest.approx(wanted[metric], rel=rel, abs=rel), (
                        name, wanted["step"], metric,
                    )  # fmt: skip
        for rank in range(world):
            for kind in ("weights", "loss"):
                found, wanted = (
                    load_file(self.directory / run / f"of-{n}" / f"{kind}-{r}.safetensors")
                    for run, n, r in ((f"{name}-resumed", world, rank), (whole, 2, 0))
                )
                assert found.keys() == wanted.keys()
                for key, tensor in wanted.items():
                    torch.testing.assert_close(
                        found[key], tensor, rtol=1e-5, atol=2e-6, msg=f"{name} {key}"
                    )


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_killed_runs_go_on(runs: Runs) -> None:
    runs.add_killed("full", fsdp(), QUEUE, ranks=[0, 1])
    runs.add_resumed("full", fsdp(), QUEUE, save=True)
    runs.add_killed("parts", PARTS, METHODS["dnpo"], ranks=[1])
    runs.add_resumed("parts", PARTS, METHODS["dnpo"], save=True)
    runs.add_killed("sequence", QUEUE, SHARED_SEQUENCES, ranks=[1])
    runs.add_resumed("sequence", QUEUE, SHARED_SEQUENCES)
    runs.do()
    for name in ("full", "parts"):
        runs.check(name)
        runs.check_saved(f"{name}-resumed")
    runs.check("sequence")


@pytest.mark.slow
def test_runs_go_on_on_other_numbers_of_processes(runs: Runs) -> None:
    runs.add_killed("full-4", fsdp(), QUEUE, ranks=[0])
    runs.add_resumed("full-4", fsdp(), QUEUE, world=4)
    runs.add_killed("parts-4", PARTS, METHODS["dnpo"], ranks=[0])
    runs.add_resumed("parts-4", PARTS, METHODS["dnpo"], world=4)
    runs.add_killed("parts-1", PARTS, QUEUE, ranks=[0])
    runs.add_resumed("parts-1", PARTS, QUEUE, world=1)
    runs.add_killed("ddp-1", {}, QUEUE, ranks=[1])
    runs.add_resumed("ddp-1", {}, QUEUE, world=1)
    runs.add_killed("ddp-4", {}, METHODS["dnpo"], ranks=[1])
    runs.add_resumed("ddp-4", {}, METHODS["dnpo"], world=4)
    runs.add_killed("sequence-1", QUEUE, SHARED_SEQUENCES, ranks=[0])
    runs.add_resumed("sequence-1", QUEUE, {"logging_steps": 3}, world=1)
    runs.add_killed("sequence-4", QUEUE, SHARED_SEQUENCES, ranks=[0])
    runs.add_resumed("sequence-4", QUEUE, SHARED_SEQUENCES, world=4)
    runs.do()
    for name in ("full-4", "parts-4", "parts-1", "ddp-1", "ddp-4", "sequence-1", "sequence-4"):
        runs.check(name, world=int(name[-1]), rel=1e-5)


@pytest.mark.slow
def test_zero_goes_on_and_is_saved_whole(runs: Runs) -> None:
    runs.add_killed("zero", zero(3), QUEUE, ranks=[0, 1])
    runs.add_resumed("zero", zero(3), QUEUE, save=True)
    runs.add("tied", spec_of(zero(3), {"model": "tied"}, save=True))
    runs.do()
    runs.check("zero")
    runs.check_saved("zero-resumed")
    runs.check_saved("tied")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "zero"])
def test_adapters_are_saved_whole(runs: Runs, parallel: str) -> None:
    sharding = zero(3)
    if parallel == "fsdp":
        sharding = fsdp(state_dict_type="SHARDED_STATE_DICT", cpu_offload=True)
        sharding["gradient_checkpointing"] = True
    runs.add("lora", spec_of(sharding, METHODS["lora"], save=True))
    runs.do()
    saved = load_file(runs.directory / "lora" / "saved" / "adapter_model.safetensors")
    trained = load_file(runs.directory / "lora" / "of-2" / "weights-0.safetensors")
    assert len(saved) == len(trained) > 0
    for key, tensor in trained.items():
        assert torch.equal(saved[key.replace(".default.", ".")], tensor), key


@pytest.mark.slow
def test_what_cannot_go_on_is_refused(runs: Runs) -> None:
    runs.add("fsdp", spec_of(fsdp(), QUEUE, kill=[KILLED_AFTER, [0]]), dies=True)
    runs.add("zero", spec_of(zero(2), QUEUE, kill=[KILLED_AFTER, [0]]), dies=True)
    refused = {
        "plain": (1, spec_of({}, QUEUE, world=1, output="fsdp", refused=True)),
        "more": (4, spec_of(zero(2), QUEUE, world=4, output="zero", refused=True)),
        "batch": (1, spec_of(fsdp(), QUEUE, world=2, output="fsdp", refused=True)),
    }
    for name, (world, spec) in refused.items():
        runs.add(name, spec, world)
    runs.do()
    said = {
        name: (runs.directory / name / f"of-{world}" / "refused-0.txt").read_text()
        for name, (world, _) in refused.items()
    }
    assert "saved by 2 processes with FSDP and cannot be read without sharding" in said["plain"]
    assert "cuts the optimiser's state for that number; got 4 processes, expected 2" in said["more"]
    assert (
        "set per_device_train_batch_size to 4 and gradient_accumulation_steps to 2" in said["batch"]
    )
