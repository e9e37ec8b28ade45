"""One rank of tests/trainer/test_distributed.py, started by it: trains as told and writes down what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastpo.trainer import PreferenceConfig, PreferenceTrainer


class Poison(TrainerCallback):
    """Spoils the last hidden states of one rank in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if args.process_index == 1 and state.global_step == 1:
            kwargs["model"].model.norm.register_forward_hook(lambda m, a, h: h * float("nan"))


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    for name, run in json.loads((directory / "runs.json").read_text()).items():
        output = directory / name
        config = PreferenceConfig(
            output_dir=str(output), use_cpu=True, ddp_backend="gloo", **run["settings"]
        )
        trainer = PreferenceTrainer(
            AutoModelForCausalLM.from_pretrained(directory / "model", dtype="float32"),
            config,
            train_dataset=datasets.load_from_disk(str(directory / "train")),
            eval_dataset=datasets.load_from_disk(str(directory / "eval")),
            processing_class=AutoTokenizer.from_pretrained(directory / "model"),
            ref_model=AutoModelForCausalLM.from_pretrained(
                directory / "reference", dtype="float32"
            ),
            callbacks=[Poison()] if run["poison"] else None,
        )
        error = None
        try:
            trainer.train()
        except FloatingPointError as stopped:
            error = str(stopped)
        evaluation = None if error else trainer.evaluate()
        output.mkdir(exist_ok=True)
        rank = config.process_index
        seen = {
            "log": trainer.state.log_history,
            "eval": evaluation,
            "error": error,
            "ranks": config.world_size,
            "matplotlib": "matplotlib" in sys.modules,
        }
        (output / f"seen-{rank}.json").write_text(json.dumps(seen))
        weights = {k: v.contiguous() for k, v in trainer.model.state_dict().items()}
        save_file(weights, output / f"weights-{rank}.safetensors")
        state = {k: v.contiguous() for k, v in trainer._state_tensors().items()}
        save_file(state, output / f"loss-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
