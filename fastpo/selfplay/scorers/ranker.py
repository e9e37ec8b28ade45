"""Rankers: models that read two answers to a prompt and say which is better; PairRM among them.

With f(A, B) the log of the odds that the first answer is the better one, the score of answer i of k is

    s_i = (1/k) Σ_j [f(i, j) − f(j, i)] ,   f(i, i) = 0

so every pair is read in both orders, and what a position is worth to the model cancels. For two answers
s_A − s_B = f(A, B) − f(B, A): the comparison, both orders added. These are the numbers of llm-blender (Jiang et
al., "LLM-Blender", ACL 2023, arXiv 2306.02561; GitHub yuchenlin/LLM-Blender): s_i is what its ``rank`` returns
with ``return_scores=True``, s_A − s_B what ``compare`` returns with ``return_logits=True``, so a published
threshold on PairRM scores can be used as it is. Half of it is the mean of the two orders. Dividing by k, not
k − 1, keeps the difference of two answers' scores the same however many others there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from math import fsum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpo.selfplay.manifest import model_revision
from fastpo.trainer.model import checked_model_name

from .base import Candidates
from .checks import check_scores
from .classifier import Classifier, load_config
from .prompt_text import prompt_text
from .sequences import Ids, check_settings, score_inputs, without_beginning

PAIRRM = "DebertaV2PairRM"  # the architecture in config.json of llm-blender/PairRM-hf
MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
PAIRRM_LENGTH = 2048  # tokens it was trained with,
PAIRRM_SOURCE = 1224  # of which the prompt has at most so many


class PairwiseRanker:
    """Scores by comparing the answers of a prompt in pairs; see the formula at the top of this file.

    Args:
        model: checkpoint directory or Hub name: of PairRM (``llm-blender/PairRM-hf`` or another of its
            architecture), or of a sequence classifier with one label, the log of the odds that the first answer
            is better, or with two, the first answer's and the second's.
        batch_size: sequences in one forward, and rows that are scored together.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16.
        device: cpu, cuda, …; None: an accelerator if there is one.
        max_length: tokens of prompt and both answers; None: 2048 for PairRM, else what model and tokenizer
            allow.
        trust_remote_code: run Python code that comes with the model.

    PairRM reads ``[CLS] <|source|> prompt [SEP] [CLS] <|candidate1|> A [SEP] [CLS] <|candidate2|> B [SEP]``. A
    classifier reads ``CLS prompt SEP A SEP B SEP``, with BOS and EOS where its tokenizer has no CLS and SEP, in
    one segment. Special tokens that a text spells out become spaces. k answers take k (k − 1) sequences; one
    alone gets 0.

    The prompt is text, or the content of a single user's message, or ``ROLE: content`` in paragraphs. What is
    too long loses the beginning of the prompt (``prompt_shortened``) and the end of the answers
    (``answer_shortened``): PairRM keeps 1224 tokens of 2048 for the prompt, and the answers share what is left;
    other models shorten answers only where the prompt is down to half of the length.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: no checkpoint, or a classifier with more than two labels.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 16,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_settings(batch_size, max_length)
        self.name, self.batch_rows = checked_model_name(model, "scorer.model"), batch_size
        config = load_config(self.name, trust_remote_code)
        self.is_pairrm = PAIRRM in (config.architectures or ())
        if not self.is_pairrm and config.num_labels not in (1, 2):
            raise ValueError(
                f"scorer.model: {self.name} is a classifier with {config.num_labels} labels, expected one that "
                f"compares two answers, with 1 or 2, or a {PAIRRM}"
            )
        self.dtype, self.device, self.max_length = dtype, device, max_length
        self.trust_remote_code = trust_remote_code
        self._layout: _CrossEncoder | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "ranker",
            "model": model_revision(self.name),
            "dtype": self.dtype,
            "max_length": self.max_length,
        }

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        for batch in batches:
            ids = {row.number: self._row_ids(row, counts) for row in batch}
            compared = score_inputs(
                (sequence for pairs in ids.values() for sequence in pairs.values()),
                self.batch_rows,
                self._compare,
            )
            for row in batch:
                n = len(row.responses)
                f = {pair: compared[sequence] for pair, sequence in ids[row.number].items()}
                scores = [fsum(f[i, j] - f[j, i] for j in range(n) if j != i) / n for i in range(n)]
                yield row.number, check_scores(row.where, scores, n)

    def close(self) -> None:
        self._layout = None

    @property
    def _loaded(self) -> _CrossEncoder:
        if self._layout is None:
            layout = _PairRMLayout if self.is_pairrm else _CrossEncoder
            self._layout = layout(
                self.name,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                max_length=self.max_length,
            )
        return self._layout

    def _compare(self, sequences: Sequence[Ids]) -> Tensor:
        return self._loaded.compare(sequences)

    def _row_ids(self, row: Candidates, counts: Counter[str]) -> dict[tuple[int, int], Ids]:
        """The token sequence of each ordered pair of responses."""
        if len(row.responses) < 2:
            return {}
        layout, prompt = self._loaded, prompt_text(row.prompt)
        shortened = [False, False]
        sequences = {}
        for i, j in permutations(range(len(row.responses)), 2):
            whole = layout.parts(prompt, row.responses[i], row.responses[j])
            kept = layout.fitted(whole)
            shortened[0] |= len(kept.prompt) < len(whole.prompt)
            shortened[1] |= len(kept.first) + len(kept.second) < len(whole.first + whole.second)
            sequences[i, j] = (*kept.prompt, *kept.first, *kept.second)
        for name, happened in zip(("prompt_shortened", "answer_shortened"), shortened, strict=True):
            if happened:
                counts[name] += 1
        return sequences


class PairRM(DebertaV2PreTrainedModel):
    """PairRM: an encoder, and a head on its output at the prompt's marker beside that at an answer's.

        f(A, B) = mean over tasks of  head([h_source; h_candidate1]) − head([h_source; h_candidate2])

    The head is Linear(2H → H), tanh, Linear(H → tasks). Modules have the names of the published weights.
    """

    MARKER_FIELDS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
    base_model_prefix = "pretrained_model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(size, config.n_tasks),
        )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (n, T), each marker once in every row
        attention_mask: Tensor,  # (n, T)
    ) -> SequenceClassifierOutput:
        """``logits`` (n,): f of every row."""
        hidden = self.pretrained_model(input_ids, attention_mask=attention_mask).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)
        source, first, second = (
            hidden[rows, (input_ids == getattr(self.config, field)).int().argmax(dim=1)]
            for field in self.MARKER_FIELDS
        )
        left, right = (self.head_layer(torch.cat([source, h], dim=1)) for h in (first, second))
        return SequenceClassifierOutput(logits=(left - right).mean(dim=1))


class _Parts(NamedTuple):
    """Token ids of one comparison."""

    prompt: list[int]
    first: list[int]
    second: list[int]


class _CrossEncoder:
    """``CLS prompt SEP A SEP B SEP`` for a sequence classifier with one label or two."""

    loader: Any = AutoModelForSequenceClassification
    default_length: int | None = None
    prompt_head = 1  # ids at the beginning of the prompt that it keeps

    def __init__(self, name: str, *, max_length: int | None, **options: Any) -> None:
        self.classifier = Classifier(
            name, max_length=max_length or self.default_length, loader=self.loader, **options
        )
        self.tokenizer = self.classifier.tokenizer
        self.max_length = self.classifier.max_length
        special = {*self.tokenizer.all_special_tokens, *MARKERS}
        self._special = sorted(special, key=len, reverse=True)

    def parts(self, prompt: str, first: str, second: str) -> _Parts:
        """Their ids, of any length."""
        tokenizer = self.tokenizer
        start = _either(tokenizer.cls_token_id, tokenizer.bos_token_id)
        end = _either(tokenizer.sep_token_id, tokenizer.eos_token_id)
        texts = [self.plain(text) for text in (prompt, first, second)]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return _Parts(
            *([*before, *i, *end] for before, i in zip((start, [], []), ids, strict=True))
        )

    def fitted(self, parts: _Parts) -> _Parts:
        """At most ``max_length`` ids."""
        limit = self.max_length
        if limit is None:
            return parts
        prompt = without_beginning(parts.prompt, self.prompt_room(parts, limit), self.prompt_head)
        room = (limit - len(prompt)) // 2
        return _Parts(prompt, *(_without_end(ids, room) for ids in (parts.first, parts.second)))

    def prompt_room(self, parts: _Parts, limit: int) -> int:
        """Ids that the prompt may have beside these answers."""
        return max(limit - 2 * max(len(parts.first), len(parts.second)), limit // 2)

    def compare(self, sequences: Sequence[Ids]) -> Tensor:
        """(n, 1) float32: log of the odds that the first answer is better."""
        logits = self.classifier.logits(sequences)
        return logits[:, :1] - logits[:, 1:] if logits.shape[1] == 2 else logits

    def plain(self, text: str) -> str:
        """``text`` without special tokens: what it says must not end an answer, or begin another."""
        for token in self._special:
            text = text.replace(token, " ")
        return text


class _PairRMLayout(_CrossEncoder):
    """PairRM's input, as its model card makes it."""

    loader = PairRM
    default_length = PAIRRM_LENGTH
    prompt_head = 2  # [CLS] <|source|>

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        config = self.classifier.model.config
        for marker, field in zip(MARKERS, PairRM.MARKER_FIELDS, strict=True):
            known, id_ = self.tokenizer.convert_tokens_to_ids(marker), getattr(config, field)
            if known != id_:
                raise ValueError(
                    f"scorer.model: {name} has {field} {id_}, but its tokenizer reads {marker} as {known}"
                )

    def parts(self, prompt: str, first: str, second: str) -> _Parts:
        texts = [
            marker + self.plain(text)
            for marker, text in zip(MARKERS, (prompt, first, second), strict=True)
        ]
        return _Parts(*self.tokenizer(texts, verbose=False)["input_ids"])

    def prompt_room(self, parts: _Parts, limit: int) -> int:
        return limit * PAIRRM_SOURCE // PAIRRM_LENGTH


def _either(*ids: int | None) -> list[int]:
    """The first id that there is, or nothing."""
    return [id_ for id_ in ids if id_ is not None][:1]


def _without_end(ids: list[int], limit: int) -> list[int]:
    """At most ``limit`` ids, the last one (a separator) among them."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]
