"""Hidden states and head of a small language model of source code, trained here in a few minutes.

    python -m fastpo.benchmarks.lm_states [--seed 0] [--out lm_states.safetensors]

How long a sparse method takes depends on how the probability of real softmaxes is spread, so the ``lm``
workload needs the states of a trained model. This one downloads nothing: its text is the Python code installed
on this machine, its tokenizer a byte-pair encoding learnt from that text, its trunk a GRU, and its head is
trained with :func:`fastpo.linear_logprobs`.

What costs time is the head: 32 000 columns per token. A step uses all columns that it knows to matter (the
most frequent tokens and the labels of the batch) and a uniform sample of the others, whose weight in the sum of
exponentials is made up by a bias of log(others / sample): an unbiased estimate of that sum.

A file holds ``hidden`` (rows, 320), the states of text that was not trained on, and ``weight`` (32000, 320),
both bfloat16; ids run from frequent to rare. It is a function of the seed and of the installed text, made in
one thread, so that neither the number of cores nor their load changes it, and kept in fastpo's cache directory.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastpo import linear_logprobs

from .workloads import QUANTILES, factor_for, nucleus_sizes_at, quantiles

# Nucleus sizes of a reference model of the same kind (4096 states, 32 000 columns):
# {mean entropy in nats: {tol: sizes at workloads.QUANTILES}}
# At tol 2^-10 the model of seed 0 has medians of 11, 154 and 6416 at the three entropies, and 90 % quantiles
# of 188, 4070 and 24740. Its flattest rows are less extreme, most of all at 0.9 nats (99 % quantile 584):
# nearly all of the reference's 60 flattest rows lie within one stretch of 256 tokens.
REFERENCE_NUCLEI: dict[float, dict[float, tuple[float, ...]]] = {
    0.9: {
        2**-8: (1, 2, 6, 21, 55, 1693),
        2**-10: (1, 3, 10, 41, 130, 5408),
        2**-12: (1, 5, 19, 78, 282, 10607),
    },
    1.6: {
        2**-8: (1, 7, 45, 206, 2477, 17357),
        2**-10: (1, 14, 158, 936, 7226, 25810),
        2**-12: (1, 31, 538, 3609, 12960, 30120),
    },
    2.5: {
        2**-8: (1, 39, 1429, 7249, 15957, 28512),
        2**-10: (2, 155, 5258, 14214, 24733, 30978),
        2**-12: (5, 793, 11020, 21779, 29755, 31704),
    },
}


@dataclass(frozen=True)
class Recipe:
    """Sizes of the text, the model and its training."""

    characters: int = 24_000_000
    width: int = 320
    vocab: int = 32_000
    rows: int = 16_384  # states kept
    steps: int = 300
    batch: int = 16  # sequences
    length: int = 128  # tokens of a sequence
    frequent: int = 1000  # columns of the head in every step
    sampled: int = 2000  # further columns drawn in every step
    learning_rate: float = 3e-3


RECIPE = Recipe()
HELD_OUT = 0.1  # of the files


class SourceModel(nn.Module):
    """Token ids (batch, length) → states (batch, length, width) that ``head`` (vocab, width) scores."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.core = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Parameter(0.02 * torch.randn(vocab, width))

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.norm(self.core(self.embedding(ids))[0])
        return states


def states_file(*, seed: int = 0, recipe: Recipe = RECIPE) -> Path:
    """Path of the cached states of ``seed``; they are made first if there are none."""
    # transformers, which the trainer imports, is not needed by the rest of the benchmarks
    from fastpo.trainer.checkpoint import write_atomically
    from fastpo.trainer.reference import cache_directory

    # This file's own text is part of the name: states of an older recipe are not taken for those of this one.
    key = hashlib.sha256(f"{recipe} {seed} {Path(__file__).read_text('utf-8')}".encode())
    path = cache_directory() / f"lm-states-{key.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(make_states(seed=seed, recipe=recipe)))
    return path


def make_states(*, seed: int = 0, recipe: Recipe = RECIPE) -> dict[str, Tensor]:
    """Train the model of ``seed`` and return its ``hidden`` and ``weight``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            documents = _encode(source_texts(recipe.characters, seed), recipe.vocab)
            held_out = max(1, round(HELD_OUT * len(documents)))
            while sum(map(len, documents[:held_out])) < recipe.rows < len(documents[held_out]):
                held_out += 1  # the first files were all but empty
            model = SourceModel(recipe.vocab, recipe.width)
            _train(model, torch.cat(documents[held_out:]), recipe)
            hidden = _states(model, torch.cat(documents[:held_out]), recipe)
    finally:
        torch.set_num_threads(threads)
    return {"hidden": hidden.bfloat16(), "weight": model.head.detach().bfloat16()}


def source_texts(characters: int, seed: int) -> list[str]:
    """Python files of this machine in an order drawn with ``seed``, none twice, up to so many characters.

    Two at the least, as one is held out.

    Those of the standard library come first: every machine with this version of Python has them. Installed
    packages fill up what a stripped library lacks.
    """
    texts: dict[str, None] = {}
    for place in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(place))
        paths = {path.relative_to(root) for path in root.rglob("*.py")}
        order = sorted(path for path in paths if "site-packages" not in path.parts)
        random.Random(seed).shuffle(order)
        for path in order:
            if characters <= 0 and len(texts) > 1:
                return list(texts)
            try:
                text = (root / path).read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text and text not in texts:
                texts[text] = None
                characters -= len(text)
    return list(texts)


def nuclei(
    hidden: Tensor, weight: Tensor, entropies: Sequence[float], tols: Sequence[float]
) -> dict[float, dict[float, tuple[float, ...]]]:
    """Quantiles of the nucleus sizes at each mean entropy (nats) and tol, in the form of REFERENCE_NUCLEI."""
    found = {}
    for entropy in entropies:
        sizes = nucleus_sizes_at(hidden * factor_for(entropy, hidden, weight), weight, tols)
        rows = zip(tols, sizes, strict=True)
        found[entropy] = {tol: tuple(quantiles(size).values()) for tol, size in rows}
    return found


def _encode(texts: Sequence[str], vocab: int) -> list[Tensor]:
    """Token ids of every text, by a byte-pair encoding learnt from them; frequent merges have low ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise ValueError(
            f"recipe: the installed Python code gives {tokenizer.get_vocab_size()} tokens, "
            f"expected a vocabulary of {vocab}"
        )
    return [torch.tensor(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts)]


def _train(model: SourceModel, ids: Tensor, recipe: Recipe) -> None:
    """Next-token prediction on random windows of ``ids``."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    window = torch.arange(recipe.length + 1)
    for step in range(recipe.steps):
        rate = min(1.0, 10 * (step + 1) / recipe.steps, 2 * (1 - step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * rate
        starts = torch.randint(len(ids) - recipe.length, (recipe.batch, 1))
        tokens = ids[starts + window]
        labels = tokens[:, 1:].flatten()
        columns, bias = _columns(labels, recipe)
        logps = linear_logprobs(
            model(tokens[:, :-1]).flatten(0, 1),
            nn.functional.embedding(columns, model.head),
            torch.searchsorted(columns, labels),
            bias,
            backward="exact",
        )
        optimizer.zero_grad()
        (-logps.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _columns(labels: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The columns of a step, in order, and their bias: log(1 / probability of being drawn)."""
    bias = torch.full((recipe.vocab,), -torch.inf)
    bias[: recipe.frequent] = 0
    bias[labels] = 0
    others = bias.isinf().nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others))[: recipe.sampled]]
    bias[drawn] = math.log(max(1, len(others)) / max(1, len(drawn)))
    columns = bias.isfinite().nonzero().squeeze(1)
    return columns, bias[columns]


@torch.no_grad()
def _states(model: SourceModel, ids: Tensor, recipe: Recipe) -> Tensor:
    """(rows, width): the states of random windows of ``ids``."""
    windows = -(-recipe.rows // recipe.length)
    starts = torch.randint(len(ids) - recipe.length + 1, (windows, 1))
    tokens = ids[starts + torch.arange(recipe.length)]
    return model(tokens).flatten(0, 1)[: recipe.rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="copy the file to this path")
    args = parser.parse_args()
    path = states_file(seed=args.seed)
    if args.out:
        shutil.copyfile(path, args.out)
    print(args.out or path)
    tensors = load_file(path)
    # every fourth row, as many as the reference has
    hidden, weight = tensors["hidden"][::4].float(), tensors["weight"].float()
    print(f"{'entropy':>7} {'tol':>6} {'quantiles':<10}" + "".join(f"{q:>8g}" for q in QUANTILES))
    for entropy, reference in REFERENCE_NUCLEI.items():
        found = nuclei(hidden, weight, [entropy], list(reference))[entropy]
        for tol in reference:
            for name, row in (("here", found[tol]), ("reference", reference[tol])):
                cells = "".join(f"{size:>8.0f}" for size in row)
                print(f"{entropy:>7g} {f'2^{math.log2(tol):g}':>6} {name:<10}{cells}")


if __name__ == "__main__":
    main()
