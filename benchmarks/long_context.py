"""The longest pair that a model can be trained on, and the tokens per second on the way there: fastpo and TRL.

    python -m fastpo.benchmarks.long_context           # → results/long_context-<device>.json
    python -m fastpo.benchmarks.long_context --report --out FILE  # → the table in docs/long-context.md

A Llama of 8B parameters' shape with made-up weights trains with DPO and LoRA, one pair per step, the base
without its adapter as reference, gradient checkpointing on, half of each sequence its prompt. The length of the
sequences doubles until memory runs out. Every way of training is a process of its own, that makes the model
once, and runs ``STEPS`` optimiser steps per length through its library's own trainer; the first is not counted.

Random weights give flat distributions: the certified backward keeps every column, as the exact one does.
``--device cpu --model tiny`` is a dry run, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fastpo.demo.model import build_tokenizer
from fastpo.trainer import PreferenceConfig, PreferenceTrainer

from .bench import Budget, environment
from .study_page import fill
from .timing import reason

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/long-context.md"
STEPS = 3
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(shape: str, device: torch.device, attention: str) -> LlamaForCausalLM:
    """Made-up weights, in bfloat16 on a GPU."""
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=1 << 20, attn_implementation=attention,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def text_pairs(length: int) -> datasets.Dataset:
    """Pairs of strings whose sequences are ``length`` characters, each a token, with the EOS."""
    half = length // 2
    return datasets.Dataset.from_list(
        [
            {
                "prompt": "p" * half,
                "chosen": "c" * (length - half - 1),
                "rejected": "r" * (length - half - 1),
            }
        ]
        * STEPS
    )


class Clock(TrainerCallback):
    """Seconds of every optimiser step, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.began)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def settings(directory: str, device: torch.device) -> dict[str, Any]:
    """Of both libraries' trainers."""
    return {
        "output_dir": directory, "max_steps": STEPS, "per_device_train_batch_size": 1,
        "gradient_checkpointing": True, "learning_rate": 1e-5, "beta": 0.1, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": device.type == "cpu", "bf16": device.type == "cuda", "optim": "adamw_torch",
    }  # fmt: skip


def fastpo_trainer(**further: Any) -> Callable[..., Any]:
    def make(model: Any, length: int, directory: str, device: torch.device) -> Any:
        config = PreferenceConfig(**settings(directory, device), **further)
        return PreferenceTrainer(
            model, config, train_dataset=text_pairs(length), processing_class=build_tokenizer()
        )

    return make


def trl_trainer(**further: Any) -> Callable[..., Any]:
    def make(model: Any, length: int, directory: str, device: torch.device) -> Any:
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(**settings(directory, device), max_length=None, **further)
        return DPOTrainer(
            model, args=config, train_dataset=text_pairs(length), processing_class=build_tokenizer()
        )

    return make


# Name: how its trainer is made, and the attention on a GPU.
WAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "TRL": (trl_trainer(), "sdpa"),
    "TRL, Liger's loss": (trl_trainer(use_liger_kernel=True), "sdpa"),
    "fastpo": (fastpo_trainer(), "sdpa"),
    "fastpo, shared prompts": (fastpo_trainer(prefix_sharing=True), "flex_attention"),
}


def run_length(
    way: str, base: LlamaForCausalLM, length: int, device: torch.device, directory: str
) -> dict[str, Any]:
    """Seconds, peak bytes and loss of the steps on one length, with an adapter of its own."""
    make, _ = WAYS[way]
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock()
    torch.manual_seed(1)
    adapter = LoraConfig(r=16, target_modules=LAYERS, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    trainer = make(model, length, directory, device)
    trainer.add_callback(clock)
    trainer.train()
    model.unload()
    seconds = statistics.median(clock.seconds[1:])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {
        "length": length,
        "seconds": seconds,
        "tokens_per_second": 2 * length / seconds,
        "loss": losses,
    }
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def grow(
    lengths: Iterable[int], run: Callable[[int], dict[str, Any]], expired: Callable[[], bool]
) -> Iterable[dict[str, Any]]:
    """What ``run`` finds of one length after another, until it fails or the time is up."""
    for length in lengths:
        if expired():
            yield {"length": length, "not_run": "time is up"}
            return
        try:
            yield run(length)
        except Exception as error:  # the answer of a length that does not fit
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
            yield {
                "length": length,
                "error": "out of memory" if out_of_memory else reason(error),
            }
            return


def work(
    way: str, shape: str, device: torch.device, lengths: Sequence[int], seconds: float
) -> None:
    """A way's process: a line of JSON per length."""
    end = time.monotonic() + seconds
    attention = WAYS[way][1] if device.type == "cuda" else "sdpa"
    with tempfile.TemporaryDirectory() as directory:
        number = iter(range(len(lengths)))
        base = make_model(shape, device, attention)

        def run(length: int) -> dict[str, Any]:
            return run_length(way, base, length, device, f"{directory}/{next(number)}")

        for found in grow(lengths, run, lambda: time.monotonic() > end):
            print("found " + json.dumps(found), flush=True)


def measure(
    ways: Sequence[str],
    shape: str,
    device: torch.device,
    lengths: Sequence[int],
    minutes: float,
    keep: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All ways, each in its share of the time that is left; ``keep`` is told after every one."""
    budget, entries = Budget(minutes), []
    for number, way in enumerate(ways):
        seconds = max(0.0, budget.end - budget.clock()) / (len(ways) - number)
        command = [
            sys.executable, "-m", "fastpo.benchmarks.long_context", "--work", way, "--model", shape,
            "--device", device.type, "--lengths", *map(str, lengths), "--seconds", str(seconds),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
        entry: dict[str, Any] = {"way": way, "lengths": [json.loads(line[6:]) for line in lines]}
        if done.returncode:
            entry["error"] = (done.stderr.strip().splitlines() or ["no output"])[-1]
        entries.append(entry)
        keep(entries)
        print(f"{way}: {entry['lengths']} {entry.get('error', '')}", flush=True)
    return entries


def table(document: dict[str, Any]) -> str:
    """By length: tokens per second of every way, and the memory it took."""
    ways = [entry["way"] for entry in document["ways"]]
    lengths = sorted({one["length"] for entry in document["ways"] for one in entry["lengths"]})
    rows = [f"| tokens of a sequence | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for length in lengths:
        cells = []
        for entry in document["ways"]:
            one = next((one for one in entry["lengths"] if one["length"] == length), None)
            cells.append(_cell(one, entry.get("error")))
        rows.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(one: dict[str, Any] | None, failure: str | None) -> str:
    if one is None:
        return failure or "–"
    if "tokens_per_second" not in one:
        return str(one.get("error") or one["not_run"])
    memory = f", {one['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in one else ""
    return f"{one['tokens_per_second']:.0f}/s{memory}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 without the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(SHAPES), default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096 << k for k in range(8)], metavar="T"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--minutes", type=float, default=8.0, help="shared out among the ways")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", action="store_true", help="fill the page's table from --out")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.work:
        work(args.work, args.model, device, args.lengths, args.seconds)
        return 0
    if args.report:
        if args.out is None:
            parser.error("--report needs --out FILE")
        fill(PAGE, {"longest": table(json.loads(args.out.read_text("utf-8")))})
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("long_context: no CUDA device", file=sys.stderr)
        return 2
    document: dict[str, Any] = {
        "model": args.model,
        "steps": STEPS,
        "environment": environment(device),
        "ways": [],
    }
    name = document["environment"].get("gpu", "cpu-dry-run").lower().replace(" ", "-")
    out = args.out or ROOT / f"benchmarks/results/long_context-{name}.json"

    def keep(entries: list[dict[str, Any]]) -> None:
        out.write_text(json.dumps(document | {"ways": entries}, indent=1) + "\n", "utf-8")

    measure(args.ways, args.model, device, args.lengths, args.minutes, keep)
    print(table(json.loads(out.read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
