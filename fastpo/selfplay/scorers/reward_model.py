"""Reward models: a sequence classifier with one output on prompt and response."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jinja2

from fastpo.selfplay.manifest import model_revision, text_sha256
from fastpo.trainer.model import checked_model_name, load_tokenizer_of

from .base import Candidates, ScorerError
from .checks import check_chat_template, check_scores
from .classifier import Classifier, load_config
from .sequences import Ids, check_settings, score_inputs, without_beginning


class RewardModel:
    """Scores by the one logit of a sequence classifier.

    Args:
        model: checkpoint directory or Hub name of a model for ``AutoModelForSequenceClassification``.
        batch_size: sequences in one forward; rows whose sequences are sorted by length together.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16.
        device: cpu, cuda, …; None: an accelerator if there is one.
        max_length: tokens of prompt and response; None: what model and tokenizer allow.
        chat_template: Jinja text or a file that holds it; None: the tokenizer's own.
        trust_remote_code: run Python code that comes with the model.

    A conversation with the response as its last turn is rendered by the chat template. Text is continued by the
    response, with the special tokens that the tokenizer itself puts around a text. What is too long loses the
    beginning of the prompt (counted: ``prompt_shortened``), but keeps a BOS or CLS.

    The unit is the model's own. For one trained on pairs (Bradley–Terry) a difference of two scores is the log
    of the odds that the first response is preferred.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: no checkpoint, or a classifier with more than one label.
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
        labels = load_config(self.name, trust_remote_code).num_labels
        if labels != 1:
            raise ValueError(
                f"scorer.model: {self.name} is a classifier with {labels} labels, expected a reward model, "
                "which has 1"
            )
        self.dtype, self.device, self.max_length = dtype, device, max_length
        self.chat_template, self.trust_remote_code = chat_template, trust_remote_code
        self._classifier: Classifier | None = None

    def identity(self) -> dict[str, Any]:
        tokenizer = load_tokenizer_of(
            self.name, "scorer.model", self.chat_template, self.trust_remote_code
        )
        return {
            "kind": "reward_model",
            "model": model_revision(self.name),
            "dtype": self.dtype,
            "max_length": self.max_length,
            "chat_template_sha256": text_sha256(tokenizer.chat_template),
        }

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        for batch in batches:
            ids = {row.number: self._row_ids(row, counts) for row in batch}
            scores = score_inputs(
                (sequence for sequences in ids.values() for sequence in sequences),
                self.batch_rows,
                self._loaded.logits,
            )
            for row in batch:
                of_row = [scores[sequence] for sequence in ids[row.number]]
                yield row.number, check_scores(row.where, of_row, len(row.responses))

    def close(self) -> None:
        self._classifier = None

    @property
    def _loaded(self) -> Classifier:
        if self._classifier is None:
            self._classifier = Classifier(
                self.name,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
                max_length=self.max_length,
                chat_template=self.chat_template,
            )
        return self._classifier

    def _row_ids(self, row: Candidates, counts: Counter[str]) -> list[Ids]:
        """The token sequence of each response."""
        tokenizer, limit = self._loaded.tokenizer, self._loaded.max_length
        sequences = []
        for response in row.responses:
            ids = self._ids(row, response)
            has_start = ids[:1] in ([tokenizer.bos_token_id], [tokenizer.cls_token_id])
            kept = without_beginning(ids, limit, int(has_start))
            if len(kept) < len(ids):
                counts["prompt_shortened"] += 1
            sequences.append(tuple(kept))
        return sequences

    def _ids(self, row: Candidates, response: str) -> list[int]:
        tokenizer = self._loaded.tokenizer
        check_chat_template(row, tokenizer, self.name)
        if isinstance(row.prompt, str):
            return list(tokenizer(row.prompt + response, verbose=False)["input_ids"])
        messages = [*row.prompt, {"role": "assistant", "content": response}]
        try:
            return list(tokenizer.apply_chat_template(messages, return_dict=False))
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise ScorerError(
                f"{row.where}: the chat template of {self.name} refuses the conversation: "
                f"{type(error).__name__}: {error}"
            ) from error
