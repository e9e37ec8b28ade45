"""Two ranks of ``fastpo train`` for each launch configuration of tests/trainer/test_launch_recipes.py.

    launched_ranks.py FOLDER ARGUMENTS.json

The JSON file says scenario → [launch configuration, number of ranks, arguments of fastpo, whether rank 1 gets
a NaN]. Ranks get the environment that ``accelerate launch`` makes of the configuration, and run on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from cpu_sharding import allow_sharding_on_cpu, keep_deepspeed_to_gloo
from forked import run_scenarios

from fastpo.cli import main
from fastpo.trainer import PreferenceTrainer

PATIENCE = 60.0


def launch_arguments(config: Path, *options: str) -> Namespace:
    """What ``accelerate launch --config_file config`` knows, just before it starts the processes."""
    words = ["--config_file", str(config), *options, "-m", "fastpo.cli", "train"]
    arguments, defaults, from_config = _validate_launch_command(
        launch_command_parser().parse_args(words)
    )
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_config else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    return arguments


def environment(arguments: Namespace) -> dict[str, str]:
    """The environment of the processes."""
    if arguments.use_deepspeed:
        return prepare_deepspeed_cmd_env(arguments)[1]
    return prepare_multi_gpu_env(arguments)


def poison(rank: int) -> None:
    """Spoil the last hidden states of rank 1 in the second step."""
    original = PreferenceTrainer._score
    calls = [0]

    def spoiled(trainer: PreferenceTrainer, model: torch.nn.Module, inputs: dict) -> object:
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            for module in model.modules():
                if type(module).__name__ == "LlamaRMSNorm":
                    last = module
            last.register_forward_hook(lambda m, a, h: h * float("nan"))
        return original(trainer, model, inputs)

    PreferenceTrainer._score = spoiled  # type: ignore[method-assign]


def scenario(config: str, ranks: int, words: list[str], poisoned: bool) -> Callable[[int], None]:
    options = [
        *("--num_processes", str(ranks), "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no"),
    ]
    if "dp_replicate_size" in Path(config).read_text():
        options += ["--parallelism_config_dp_shard_size", str(ranks // 2)]
    arguments = launch_arguments(Path(config), *options)
    variables = environment(arguments)

    def run(rank: int) -> None:
        os.environ.update(variables)
        os.environ["MASTER_PORT"] = str(arguments.main_process_port)
        torch.set_num_threads(1)
        allow_sharding_on_cpu()
        if arguments.use_deepspeed:
            keep_deepspeed_to_gloo()
        if poisoned:
            poison(rank)
        sys.exit(main(words))

    return run


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = json.loads(Path(sys.argv[2]).read_text())
    run_scenarios(
        {name: scenario(*job) for name, job in jobs.items()},
        folder,
        {name: job[1] for name, job in jobs.items()},
        patience=lambda name: PATIENCE,
        may_stay={},
        at_once=2,
    )
