"""The ranks of test_vocab_parallel_training.py: a model whose head is spread over some ranks trains on a grid.

python grid_ranks_worker.py RANKS OUT. Every rank also trains the whole model on all pairs by itself, and writes
how far the losses, gradients and weights of the two are apart.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers as hf
from ranks import gloo_ranks
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

import fastpo
from fastpo.head import FusedHead
from fastpo.trainer.sequence_parallel import SequenceParallel

VOCAB, STEPS, MICRO_STEPS, PAIRS, TOKENS = 40, 3, 2, 4, 12


class Grid(NamedTuple):
    """How the ranks of a run share the work."""

    data: ProcessGroup | None = None  # ranks with other pairs
    vocab: ProcessGroup | None = None  # ranks with other rows of the head
    sequence: SequenceParallel | None = None  # ranks with other tokens of the same sequences


def tiny() -> Any:
    torch.manual_seed(2)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def rows_of_head(group: ProcessGroup | None) -> slice:
    """This rank's: the first has fewer than the others."""
    if group is None:
        return slice(0, VOCAB)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    bounds = [0, *(VOCAB * k // size - 3 for k in range(1, size)), VOCAB]
    return slice(bounds[rank], bounds[rank + 1])


def batches() -> list[tuple[Tensor, Tensor]]:
    """(2·PAIRS, TOKENS) ids and shifted labels of every micro-step, chosen first; prompts of many lengths."""
    torch.manual_seed(3)
    made = []
    for _ in range(STEPS * MICRO_STEPS):
        ids = torch.randint(3, VOCAB, (2 * PAIRS, TOKENS))
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        for row, prompt in enumerate(torch.randint(1, TOKENS - 2, (2 * PAIRS,)).tolist()):
            labels[row, : prompt - 1] = -100
        made.append((ids, labels))
    return made


def share_of(batch: tuple[Tensor, Tensor], group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """This rank's pairs."""
    if group is None:
        return batch
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = torch.arange(PAIRS).chunk(size)[rank]
    return tuple(part[torch.cat([mine, mine + PAIRS])] for part in batch)  # type: ignore[return-value]


def train(grid: Grid, fault: str | None = None) -> dict[str, Any]:
    """Losses of every micro-step, whole gradients of every step, weights at the end."""
    model = tiny()
    mine = rows_of_head(grid.vocab)
    if grid.vocab is not None:
        shard = nn.Linear(16, mine.stop - mine.start, bias=False)
        shard.weight = nn.Parameter(model.lm_head.weight.detach()[mine].clone())
        model.lm_head = shard
    FusedHead(model, vocab_group=grid.vocab, backward="exact").install()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    margin = fastpo.DynamicMargin(tau=0.3, scope="batch", group=grid.data or alone)
    loss_fn = fastpo.PreferenceLoss("simpo", beta=2.0, margin=margin, group=grid.data or alone)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, gradients = [], []
    for number, batch in enumerate(batches()):
        ids, labels = share_of(batch, grid.data)
        run = model if grid.sequence is None else grid.sequence.around(model)
        logps = run(input_ids=ids, labels=labels, use_cache=False).log_probs
        loss = loss_fn.from_token_logps(logps, labels).loss
        (loss / MICRO_STEPS).backward()
        if grid.data is not None:
            loss = loss.detach().clone()
            dist.all_reduce(loss, group=grid.data)
            loss /= dist.get_world_size(grid.data)
        losses.append(loss.item())
        if (number + 1) % MICRO_STEPS:
            continue
        for name, parameter in model.named_parameters():
            if fault == "no all-reduce" and name == "model.embed_tokens.weight":
                continue
            averaged(parameter.grad, grid)
        gradients.append({n: whole(n, p.grad, grid) for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: whole(n, p.detach(), grid) for n, p in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights}


def averaged(gradient: Tensor, grid: Grid) -> None:
    """Over the ranks whose gradients differ, as DDP does; those of a vocabulary group have the same."""
    groups = [grid.data, None if grid.sequence is None else grid.sequence.group]
    for group in filter(None, groups):
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)


def whole(name: str, tensor: Tensor, grid: Grid) -> Tensor:
    """The head's put together from its ranks."""
    if grid.vocab is None or name != "lm_head.weight":
        return tensor.clone()
    padded = tensor.new_zeros(VOCAB, tensor.shape[1])
    padded[rows_of_head(grid.vocab)] = tensor
    dist.all_reduce(padded, group=grid.vocab)
    return padded


def apart(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The largest differences, in units of each tensor's largest entry, and the smallest gradient's size."""

    def distance(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / a.abs().max()).item()

    steps = list(zip(one["gradients"], other["gradients"], strict=True))
    return {
        "losses": max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True)),
        "gradients": max(distance(a[n], b[n]) for a, b in steps for n in a),
        "weights": max(distance(one["weights"][n], other["weights"][n]) for n in one["weights"]),
        "smallest gradient": min(a[n].abs().max().item() for a, _ in steps for n in a),
    }


def grids(ranks: int) -> dict[str, Grid]:
    if ranks == 2:
        return {"vocabulary": Grid(vocab=dist.group.WORLD)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = mesh.get_group("outer"), mesh.get_group("inner")
    parts = SequenceParallel(2, torch.device("cpu"), tiny())  # the inner dimension
    return {
        "vocabulary": Grid(vocab=dist.group.WORLD),
        "data × vocabulary": Grid(data=outer, vocab=inner),
        "data × sequence": Grid(data=outer, sequence=parts),
        "vocabulary × sequence": Grid(vocab=outer, sequence=parts),
    }


def main(ranks: int, out: Path) -> None:
    alone = train(Grid())
    found = {}
    for name, grid in grids(ranks).items():
        for fault in (None, "no all-reduce"):
            if fault and (grid.data or grid.sequence) is None:
                continue
            if grid.sequence is None:
                trained = train(grid, fault)
            else:
                with grid.sequence.training():
                    trained = train(grid, fault)
            found[f"{name}, {fault}" if fault else name] = apart(alone, trained)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))


if __name__ == "__main__":
    count, out = int(sys.argv[1]), Path(sys.argv[2])
    sys.exit(gloo_ranks(lambda: main(count, out), count))
