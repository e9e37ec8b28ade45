"""A language model's own opinion: the mean log-prob of an answer's tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

import fastpo
from fastpo.data.collator import IGNORE_INDEX, ExampleCollator
from fastpo.data.formats import parse_example
from fastpo.data.tokenization import RowTokenizer
from fastpo.selfplay.manifest import model_revision, text_sha256
from fastpo.trainer.model import checked_model_name, load_causal_lm, load_tokenizer_of

from .base import Candidates, ScorerError
from .checks import check_chat_template, check_scores
from .sequences import Ids, check_settings, pick_device, score_inputs, without_beginning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = tuple[Ids, Ids]  # of the prompt, and of the answer with its EOS


class LogprobScorer:
    """Scores by (1/|y|) Σ_t log p(y_t | x, y_<t), in nats per token, y's EOS among them; logits never exist.

    Args:
        model: checkpoint directory or Hub name of a causal LM.
        batch_size: sequences in one forward, and rows whose sequences are sorted by length together.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16.
        device: cpu, cuda, …; None: an accelerator if there is one.
        max_length: tokens of prompt and answer; None: what the model's positions allow.
        chat_template: Jinja text or a file that holds it; None: the tokenizer's own.
        trust_remote_code: run Python code that comes with the model.

    Prompt and answer become the ids that training on them would see, ``tools`` and ``chat_template_kwargs`` of
    the row included. What is too long loses the beginning of the prompt but for its BOS (``prompt_shortened``).
    A row has no scores, and its reason is counted, where training would drop it: ``too_long`` (an answer does
    not fit beside one token of its prompt), ``empty_answer``, ``template_error``, ….

    Raises:
        FileNotFoundError: no such directory.
        ValueError: a directory that is no checkpoint.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 16,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_settings(batch_size, max_length)
        self.name, self.batch_rows = checked_model_name(model, "scorer.model"), batch_size
        self.dtype, self.device, self.max_length = dtype, device, max_length
        self.chat_template, self.trust_remote_code = chat_template, trust_remote_code
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "logprob",
            "model": model_revision(self.name),
            "dtype": self.dtype,
            "max_length": self.max_length,
            "chat_template_sha256": text_sha256(self.tokenizer.chat_template),
        }

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        tokenize = RowTokenizer(
            self.tokenizer, parse_example, ("completion",), None, None, "scorer"
        )
        for batch in batches:
            answers = {row.number: self._answers(row, tokenize, counts) for row in batch}
            scores = score_inputs(
                (answer for of_row in answers.values() for answer in of_row or ()),
                self.batch_rows,
                self._mean_logprobs,
                length=lambda answer: sum(map(len, answer)),
            )
            for row in batch:
                of_row = answers[row.number]
                if of_row is None:
                    yield row.number, None
                else:
                    found = [scores[answer] for answer in of_row]
                    yield row.number, check_scores(row.where, found, len(row.responses))

    def close(self) -> None:
        self._model = self._tokenizer = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer_of(
                self.name, "scorer.model", self.chat_template, self.trust_remote_code
            )
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """In evaluation mode."""
        if self._model is None:
            arguments = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
            model = load_causal_lm(self.name, "scorer.model", arguments)
            self._model = model.to(pick_device(self.device)).eval()
        return self._model

    def _answers(
        self, row: Candidates, tokenize: RowTokenizer, counts: Counter[str]
    ) -> list[Answer] | None:
        """The ids of each response; None where there is one that training would drop."""
        check_chat_template(row, self.tokenizer, self.name)
        columns = {name: row.row.get(name) for name in ("tools", "chat_template_kwargs")}
        n = len(row.responses)
        rows = {"prompt": row.prompt, **columns}
        batch = {name: [value] * n for name, value in rows.items()}
        try:
            found = tokenize({**batch, "completion": [*row.responses]}, [row.number] * n)
        except ValueError as error:
            raise ScorerError(f"{row.where}: {error}") from error
        dropped = next((reason for reason in found["dropped"] if reason), None)
        answers: list[Answer] = []
        is_shortened = False
        if dropped is None:
            for prompt, answer in zip(found["prompt_ids"], found["completion_ids"], strict=True):
                room = len(prompt) if self._limit is None else self._limit - len(answer)
                if room < 1:
                    dropped = "too_long"
                    break
                has_bos = prompt[0] == self.tokenizer.bos_token_id and room > 1
                kept = without_beginning(prompt, room, int(has_bos))
                is_shortened |= len(kept) < len(prompt)
                answers.append((tuple(kept), tuple(answer)))
        if dropped is not None:
            counts[dropped] += 1
            return None
        if is_shortened:
            counts["prompt_shortened"] += 1
        return answers

    @property
    def _limit(self) -> int | None:
        if self.max_length is not None:
            return self.max_length
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _mean_logprobs(self, answers: list[Answer]) -> Tensor:
        """(n, 1) float64, nats per token."""
        pad = self.tokenizer.pad_token_id
        collate = ExampleCollator(self.tokenizer.eos_token_id if pad is None else pad)
        batch = collate(
            [
                {"prompt_ids": prompt, "completion_ids": y, "row": k}
                for k, (prompt, y) in enumerate(answers)
            ]
        )
        ids, mask, labels = (
            batch[name].to(self.model.device)
            for name in ("input_ids", "attention_mask", "completion_labels")
        )
        logprobs = fastpo.model_logprobs(self.model, ids, mask, labels)
        assert isinstance(logprobs, Tensor)  # no statistics were asked for
        return (logprobs.double().sum(1) / (labels != IGNORE_INDEX).sum(1))[:, None]
