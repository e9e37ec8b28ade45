"""recipes/accelerate: accelerate reads every file, sets what it promises, and the sharded ones train."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import launched_ranks
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
FILES = sorted((RECIPES / "accelerate").glob("*.yaml"))
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
EXPECTED: dict[str, dict[str, str]] = {
    "ddp-1x8": {},
    "fsdp2-1x8": FSDP2,
    "fsdp2-2x8": {
        **FSDP2,
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
    },
    "zero2-1x8": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3-1x8": ZERO3,
    "zero3-2x8": ZERO3,
}
RANKS = {"fsdp2-1x8": 2, "fsdp2-2x8": 4, "zero3-1x8": 2}
TRAINED = ["fsdp2-1x8", "zero3-1x8"]
Results = dict[str, list[tuple[int | None, float, str]]]

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=needs_deepspeed if "zero" in n else ()) for n in names]


def without_effect(path: Path) -> list[str]:
    """Entries of a file's sections that are no option of ``accelerate launch``, which passes over them."""
    options = {action.dest for action in launch_command_parser()._actions}
    sections = [v for v in yaml.safe_load(path.read_text()).values() if isinstance(v, dict)]
    return [key for section in sections for key in section if key not in options]


def test_there_is_a_file_for_each_kind_and_a_word_on_it() -> None:
    assert [path.stem for path in FILES] == sorted(EXPECTED)
    readme = (RECIPES / "accelerate" / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_takes_all_of_it(path: Path) -> None:
    load_config_from_file(str(path))  # raises for an unknown key
    assert without_effect(path) == []
    if "zero" in path.stem and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    arguments = launched_ranks.launch_arguments(path, "--main_process_port", "0")
    machines = int(path.stem[-3])
    made = launched_ranks.environment(arguments)
    assert EXPECTED[path.stem].items() <= made.items()
    assert made["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert arguments.nproc_per_node == "8"
    if machines > 1:
        assert (arguments.nnodes, arguments.node_rank, arguments.num_processes) == ("2", 0, 16)
        address, _ = arguments.rdzv_endpoint.split(":")
        assert address == yaml.safe_load(path.read_text())["main_process_ip"]
    assert arguments.multi_gpu == (path.stem == "ddp-1x8")


def test_a_key_that_accelerate_does_not_know_is_found(tmp_path: Path) -> None:
    text = (RECIPES / "accelerate" / "fsdp2-1x8.yaml").read_text()
    path = tmp_path / "planted.yaml"
    path.write_text(text + "num_proceses: 8\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(path))
    path.write_text(text.replace("fsdp_reshard_after_forward", "fsdp_reshard_after_backward"))
    assert without_effect(path) == ["fsdp_reshard_after_backward"]


def launched(folder: Path, checkpoint: Path, runs: list[tuple[str, bool]]) -> Results:
    """The Llama recipe on a tiny model: configuration → (status, seconds, stderr) of each rank.

    A run is a launch configuration and whether rank 1 gets a NaN, which is then in the name of its result.
    """
    draw = random.Random(3)
    with (folder / "train.jsonl").open("w") as file:
        for _ in range(32):
            a, b = draw.randrange(50), draw.randrange(50)
            row = {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 3)}
            file.write(json.dumps(row) + "\n")
    jobs = {}
    for config, poisoned in runs:
        if "zero" in config and find_spec("deepspeed") is None:
            continue
        name = f"{config}-poisoned" if poisoned else config
        words = ["train", "--config", str(RECIPES / "llama-3-8b-instruct-gamma-simpo.yaml")]
        for option in (
            f"model_name_or_path={checkpoint}", f"dataset={folder / 'train.jsonl'}", "dataset_split=null",
            "eval_dataset=null", "eval_strategy=no", "save_strategy=no", "max_length=60",
            "max_prompt_length=40", "max_steps=2", "gradient_accumulation_steps=2", "logging_steps=1",
            "plot_loss=false", "disable_tqdm=true", "learning_rate=1e-3", f"output_dir={folder / name}",
        ):  # fmt: skip
            words += [f"--{option}"]
        jobs[name] = [
            str(RECIPES / "accelerate" / f"{config}.yaml"),
            RANKS[config],
            words,
            poisoned,
        ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "rank_watch")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    script = Path(__file__).with_name("launched_ranks.py")
    command = [sys.executable, script, folder, folder / "jobs.json"]
    subprocess.run(command, env=environment, check=True, timeout=280)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def results(folder: Path, checkpoint: Path) -> Results:
    runs = [(name, False) for name in TRAINED] + [(name, True) for name in TRAINED]
    return launched(folder, checkpoint, runs)


def check_trained(name: str, ranks: list[tuple[int | None, float, str]], folder: Path) -> None:
    assert [status for status, _, _ in ranks] == [0] * RANKS[name], ranks[0][2]
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in history if "grad_norm" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    assert all(norm > 0 for norm in norms)


@pytest.mark.parametrize("name", marked(TRAINED))
def test_a_sharded_configuration_trains(name: str, results: Results, folder: Path) -> None:
    check_trained(name, results[name], folder)


@pytest.mark.slow
def test_a_hybrid_configuration_trains(tmp_path: Path, checkpoint: Path) -> None:
    results = launched(tmp_path, checkpoint, [("fsdp2-2x8", False)])
    check_trained("fsdp2-2x8", results["fsdp2-2x8"], tmp_path)


@pytest.mark.parametrize("name", marked(TRAINED))
def test_a_bad_number_is_blamed_on_its_rank(name: str, results: Results) -> None:
    """The gradient of all ranks is NaN then, and under a dynamic margin so is the loss of all."""
    for status, _, stderr in results[f"{name}-poisoned"]:
        assert status == 1, stderr
        last = stderr.strip().splitlines()[-1]
        assert "before optimiser step 2: rank 1: the loss is nan in micro-step 1 of 2" in last
        assert "rank 0" not in last
        assert "No weight was changed" in last
