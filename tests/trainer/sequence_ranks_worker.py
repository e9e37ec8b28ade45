"""The ranks of test_sequence_parallel.py: sequences in parts against whole ones, in one forking start.

python sequence_ranks_worker.py RANKS OUT: writes, per case, the largest differences found on any rank.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as hf
from ranks import gloo_ranks

from fastpo.data import PackedCollator, PreferenceCollator
from fastpo.head import FusedHead
from fastpo.head import sequence_attention as attention
from fastpo.head.packed_attention import PackedAttention
from fastpo.trainer import sequence_parallel
from fastpo.trainer.sequence_parallel import SequenceParallel

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW, CPU = 5, torch.device("cpu")
FAMILIES: dict[str, Callable[[], Any]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=WINDOW)),
    "Gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 7}, sliding_window=WINDOW)
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip
LAYOUTS = ("padded", "packed", "shared")
FAULTS = ("no exchange", "no window", "a mean without its factor", "a rank left out")


def rows() -> list[dict[str, Any]]:
    draw = random.Random(4)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(draw.randint(low, high))]

    return [
        {"prompt_ids": ids(4, 21), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9), "row": k}
        for k in range(3)
    ]


def batch_of(model: Any, layout: str, ranks: int) -> dict[str, torch.Tensor]:
    """Keywords of a forward on whole sequences."""
    if layout == "padded":
        batch = PreferenceCollator(0, pad_to_multiple_of=ranks)(rows())
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    else:
        shared = layout == "shared"
        batch = PackedCollator(0, prefix_sharing=shared, pad_to_multiple_of=ranks)(rows())
        where = [batch[n] for n in ("input_ids", "position_ids", "groups", "branches")]
        inputs = PackedAttention(model, prefix_sharing=shared).inputs(*where)
        inputs["hidden_index"] = batch["hidden_index"]
    return {**inputs, "labels": batch["completion_labels"], "use_cache": False}


def step(model: Any, run: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Log-probs, statistics and gradients of a loss that weighs every token otherwise."""
    model.zero_grad(set_to_none=True)
    output = run(**inputs)
    weights = torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)
    (output.log_probs * weights).sum().backward()
    stats = output.token_stats
    return {
        "log-probs": output.log_probs.detach(),
        "entropy": stats.entropy, "top1": stats.top1.float(), "logit mean": stats.logit_mean,
        "dense rows": stats.dense_rows.float(), "dropped": stats.dropped_mass_max,
        "active share": stats.active_fraction,
        **{f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()},
    }  # fmt: skip


def averaged(found: dict[str, torch.Tensor]) -> None:
    """What DDP makes of the gradients."""
    for name, value in found.items():
        if name.startswith("gradient"):
            dist.all_reduce(value)
            value /= dist.get_world_size()


def worst(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Differences by kind, in units of the largest value (at least 1 for what is no gradient)."""
    found: dict[str, float] = {}
    for name, value in whole.items():
        gradient = name.startswith("gradient")
        scale = value.abs().max().item() if gradient else max(1.0, value.abs().max().item())
        difference = (parts[name] - value).abs().max() / scale
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        kind = "gradient" if gradient else name
        found[kind] = max(found.get(kind, 0.0), difference.item())
        if gradient:
            assert scale > 0, name
    return found


@contextmanager
def planted(fault: str | None, rank: int) -> Iterator[None]:
    """One of FAULTS, after the trial that would refuse it."""
    kept = (
        attention.SequenceAttention._attend,
        attention._causal_mask,
        sequence_parallel._Sum.backward,
        sequence_parallel._Sum.forward,
    )
    if fault == "no exchange":
        attention.SequenceAttention._attend = lambda self, inner, name, *a, **k: inner(*a, **k)
    elif fault == "no window":
        attention._causal_mask = lambda name, length, window, device: None
    elif fault == "a mean without its factor":
        sequence_parallel._Sum.backward = staticmethod(lambda ctx, grad: (grad, None))
    elif fault == "a rank left out":
        forward = sequence_parallel._Sum.forward
        sequence_parallel._Sum.forward = staticmethod(
            lambda ctx, own, group: forward(ctx, own * float(dist.get_rank(group) != 1), group)
        )
    try:
        yield
    finally:
        attention.SequenceAttention._attend, attention._causal_mask = kept[:2]
        sequence_parallel._Sum.backward, sequence_parallel._Sum.forward = map(
            staticmethod, kept[2:]
        )


def case(
    family: str,
    layout: str,
    ranks: int,
    *,
    fault: str | None = None,
    checkpointing: bool = False,
    backward: str = "exact",
) -> dict[str, float]:
    torch.manual_seed(3)
    model = FAMILIES[family]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    inputs = batch_of(model, layout, ranks)
    sequence = SequenceParallel(ranks, CPU, model)
    FusedHead(model, return_stats=True, backward=backward).install()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sequence.try_on(model, exact=True)
    whole = step(model, model, inputs)
    with planted(fault, dist.get_rank()), sequence.training():
        parts = step(model, sequence.around(model), inputs)
    averaged(parts)
    values = {name: parts[name].item() for name in ("dropped", "active share")}
    return worst(whole, parts) | {f"{name} itself": value for name, value in values.items()}


def refusals(ranks: int) -> dict[str, str]:
    """Messages of models that cannot be served."""
    scaled = {"rope_theta": 1e4, "original_max_position_embeddings": 8}
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "factor": 32.0,
    }
    models = {
        "heads": {"hidden_size": 33, "num_attention_heads": 3, "num_key_value_heads": 3},
        "eager": {"attn_implementation": "eager"},
        "longrope": {"rope_parameters": {**longrope, **scaled}},
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **scaled}},
        "chunks": {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
    }  # fmt: skip
    found = {}
    for name, changes in models.items():
        config = hf.LlamaConfig(
            **{**SMALL, **{k: v for k, v in changes.items() if k != "layer_types"}}
        )
        model = hf.LlamaForCausalLM(config)
        if "layer_types" in changes:
            model.config.layer_types = changes["layer_types"]
        try:
            SequenceParallel(ranks, CPU, model)
        except ValueError as error:
            found[name] = str(error)
    recurrent = hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))
    recurrent.model.layers[1].self_attn.register_forward_hook(
        lambda module, args, output: (output[0].cumsum(1), *output[1:])
    )
    try:
        SequenceParallel(ranks, CPU, recurrent).try_on(recurrent, exact=True)
    except ValueError as error:
        found["recurrent"] = str(error)
    try:
        SequenceParallel(ranks + 1, CPU)
    except ValueError as error:
        found["ranks"] = str(error)
    return found


def main(ranks: int, out: Path) -> None:
    found: dict[str, Any] = {}
    for family in FAMILIES:
        for layout in LAYOUTS if ranks == 2 or family == "Llama" else LAYOUTS[:1]:
            found[f"{family} {layout}"] = case(family, layout, ranks)
    found["Mistral padded, checkpointing"] = case("Mistral", "padded", ranks, checkpointing=True)
    found["Llama shared, checkpointing"] = case("Llama", "shared", ranks, checkpointing=True)
    found["certified"] = case("Qwen3", "padded", ranks, backward="certified")
    for fault in FAULTS:
        found[fault] = case("Mistral", "padded", ranks, fault=fault)
    found["refusals"] = refusals(ranks)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    count, out = int(sys.argv[1]), Path(sys.argv[2])
    sys.exit(gloo_ranks(lambda: main(count, out), count))
