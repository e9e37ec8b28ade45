"""Time of a training step against the prompt's share of a pair: padded, packed, and with shared prompts.

    python -m fastpo.benchmarks.prefix_sharing           # → results/prefix_sharing-cpu.json
    python -m fastpo.benchmarks.prefix_sharing --report  # → the table in docs/long-context.md

One step is the forward and backward of a Llama with a fused head and DPO's loss without its reference, on pairs
whose two answers have the same length. The three layouts take turns within a round; each round's ratios count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastpo
from fastpo.data import PackedCollator, PreferenceCollator
from fastpo.head import FusedHead
from fastpo.head.packed_attention import PackedAttention

from .study_page import fill

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/prefix_sharing-cpu.json"
PAGE = ROOT / "docs/long-context.md"
SEQUENCE, PAIRS, VOCAB = 512, 4, 8000
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
LAYOUTS = ("padded", "packed", "shared")


def rows(share: float, seed: int) -> list[dict[str, Any]]:
    """Pairs of sequences of ``SEQUENCE`` tokens, of which the prompt has the given share (at least one)."""
    draw = torch.Generator().manual_seed(seed)
    prompt = max(1, round(share * SEQUENCE))

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

    return [
        {
            "prompt_ids": ids(prompt),
            "chosen_ids": ids(SEQUENCE - prompt),
            "rejected_ids": ids(SEQUENCE - prompt),
            "row": k,
        }
        for k in range(PAIRS)
    ]


def steps(model: LlamaForCausalLM, pairs: list[dict[str, Any]]) -> dict[str, tuple[Any, int]]:
    """By layout a function that runs one step and gives its loss, and the tokens it runs through the model."""
    loss_fn = fastpo.PreferenceLoss("simpo", beta=2.0)
    made: dict[str, tuple[Any, int]] = {}
    for layout in LAYOUTS:
        if layout == "padded":
            batch = PreferenceCollator(0)(pairs)
            inputs: dict[str, Any] = {n: batch[n] for n in ("input_ids", "attention_mask")}
        else:
            sharing = layout == "shared"
            batch = PackedCollator(0, prefix_sharing=sharing)(pairs)
            attention = PackedAttention(model, prefix_sharing=sharing)
            where = (batch[n] for n in ("input_ids", "position_ids", "groups", "branches"))
            inputs = attention.inputs(*where) | {"hidden_index": batch["hidden_index"]}
        labels = batch["completion_labels"]

        def step(inputs: dict[str, Any] = inputs, labels: torch.Tensor = labels) -> float:
            model.zero_grad()
            out = model(**inputs, labels=labels, use_cache=False)
            loss = loss_fn.from_token_logps(out.log_probs, labels).loss
            loss.backward()
            return loss.item()

        made[layout] = step, batch["input_ids"].numel()
    return made


def measure(rounds: int) -> list[dict[str, Any]]:
    """Of every share: tokens, median seconds and median ratio to the padded layout of the same round."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    FusedHead(model).install()
    found = []
    for share in SHARES:
        made = steps(model, rows(share, seed=1))
        losses = {layout: step() for layout, (step, _) in made.items()}  # the first one warms up
        seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        for _ in range(rounds):
            for layout, (step, _) in made.items():
                began = time.perf_counter()
                step()
                seconds[layout].append(time.perf_counter() - began)
        ratios = {
            layout: statistics.median(
                b / a for a, b in zip(seconds["padded"], seconds[layout], strict=True)
            )
            for layout in LAYOUTS
        }
        found.append(
            {
                "prompt_share": share,
                "tokens": {layout: tokens for layout, (_, tokens) in made.items()},
                "seconds": {layout: statistics.median(s) for layout, s in seconds.items()},
                "ratio": ratios,
                "loss": losses,
            }
        )
        print(line(found[-1]), flush=True)
    return found


def line(entry: dict[str, Any]) -> str:
    parts = [
        f"{layout} {entry['tokens'][layout]} tokens {entry['seconds'][layout] * 1e3:.0f} ms "
        f"({entry['ratio'][layout]:.2f})"
        for layout in LAYOUTS
    ]
    return f"prompt {entry['prompt_share']:.0%}: {', '.join(parts)}"


def table(document: dict[str, Any]) -> str:
    """By share of the prompt: tokens of each layout, and its time over the padded one's."""
    rows = [
        "| prompt's share | tokens padded | tokens shared | time packed / padded | time shared / padded |",
        "|---" * 5 + "|",
    ]
    for entry in document["shares"]:
        tokens, ratio = entry["tokens"], entry["ratio"]
        rows.append(
            f"| {entry['prompt_share']:.0%} | {tokens['padded']} | {tokens['shared']} "
            f"| {ratio['packed']:.2f} | {ratio['shared']:.2f} |"
        )
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="fill the page's table from it")
    arguments = parser.parse_args(argv)
    if arguments.report:
        fill(PAGE, {"sharing": table(json.loads(arguments.out.read_text("utf-8")))})
        return
    document = {
        "fastpo": fastpo.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "sequence": SEQUENCE,
        "pairs": PAIRS,
        "shares": measure(arguments.rounds),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
