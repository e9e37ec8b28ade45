"""Preference pairs, or examples → token ids, with an account of every row that was dropped or changed.

Of each row the prompt is tokenised as generation would see it and the answers as they follow it:

1. Text. Plain rows are used as they are. Conversations are rendered by the tokenizer's chat template: the
   prompt with the generation prompt, and prompt + answer as a whole; the answer is what comes after.
2. Ids. The text of prompt + answer is tokenised as one and cut after the prompt's ids. Where the prompt's
   ids are no prefix of it (a token would join the prompt's end and the answer's start), the answer is
   tokenised on its own, so the prompt keeps the ids that generation sees (``split_tokens``). Where chosen and
   rejected only share a prompt implicitly, it is their common ids. Where the template's generation prompt is
   not how the rendered answers begin (``<think>`` added or dropped), the prompt ends at their common ids
   (``generation_prompt_differs``); a template that changes more than that end gives ``prompt_rewritten``.
3. BOS. For plain text, what the tokenizer itself puts before a text; a text that already starts with it
   keeps that one. For conversations, what the template says.
4. EOS. Every answer ends with EOS exactly once: white space that a template puts behind it is dropped, and
   it is appended where the text does not end with it (after ``<end_of_turn>\\n`` of Gemma too, as the
   authors of SimPO and γ-PO do).
5. Lengths. A prompt over ``max_prompt_length`` keeps its end (and its BOS). If it and the longer answer then
   exceed ``max_length``, the row is dropped: answers are never cut.

Every token after the prompt is scored, in multi-turn answers the turns between as well, as TRL does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import datasets
import jinja2
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from fastpo.data.formats import (
    COLUMNS,
    EXAMPLE_COLUMNS,
    ChatRow,
    Message,
    PlainRow,
    UnusableRow,
    check_columns,
    check_example_columns,
    parse_example,
    parse_pair,
)
from fastpo.data.report import DROPPED, NOTED, ROWS_NAMED, DataReport, Finding, TokenCounts

_ACCOUNT = {
    "row": datasets.Value("int64"),
    "dropped": datasets.Value("string"),
    "detail": datasets.Value("string"),
    "notes": datasets.List(datasets.Value("string")),
}


def tokenize_preferences(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    source: str = "the data set",
) -> tuple[datasets.Dataset, DataReport]:
    """Token ids of every usable row, and the account of all rows.

    Nothing is cached: the same call gives the same ids, and another template or length is never served old
    ones.

    Args:
        dataset: rows in one of the formats of ``fastpo.data.formats``; other columns are ignored.
        tokenizer: with an EOS token; with a chat template where rows are conversations.
        max_length: bound on prompt + answer with its EOS, in tokens; None: no bound.
        max_prompt_length: a longer prompt keeps its end, in tokens; None: prompts are never shortened.
        num_proc: processes to use; None: this one (fast tokenizers use all cores by themselves).
        source: what messages and the report call the data set.

    Returns:
        A data set with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (int32 lists, answers end with EOS) and
        ``row`` (int64, index in ``dataset``), and the :class:`~fastpo.data.DataReport`.

    Raises:
        TypeError: ``dataset`` is no ``datasets.Dataset``.
        ValueError: a length out of range; no EOS token; conversations without a ``chat_template``; a row
            without ``chosen`` or ``rejected``, or with one of the wrong type; no row
            left (with the account).
    """
    rows = _usable_columns(dataset, COLUMNS, check_columns, source)
    tokenize = RowTokenizer(
        tokenizer, parse_pair, ("chosen", "rejected"), max_length, max_prompt_length, source
    )
    return _tokenize(rows, tokenize, num_proc)


def tokenize_examples(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    source: str = "the data set",
) -> tuple[datasets.Dataset, DataReport]:
    """The same for examples of supervised fine-tuning: ``prompt_ids``, ``completion_ids`` and ``row``.

    Arguments and errors are those of :func:`tokenize_preferences`; the columns are ``messages``, or ``prompt``
    and ``completion``.
    """
    rows = _usable_columns(dataset, EXAMPLE_COLUMNS, check_example_columns, source)
    tokenize = RowTokenizer(
        tokenizer, parse_example, ("completion",), max_length, max_prompt_length, source
    )
    return _tokenize(rows, tokenize, num_proc)


def _usable_columns(
    dataset: datasets.Dataset,
    columns: Sequence[str],
    check: Callable[[list[str], str], None],
    source: str,
) -> datasets.Dataset:
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset: got {type(dataset).__name__}, expected a datasets.Dataset (one split)"
        )
    check(dataset.column_names, source)
    return dataset.with_format(None).select_columns(
        [name for name in columns if name in dataset.column_names]
    )


def _tokenize(
    rows: datasets.Dataset, tokenize: RowTokenizer, num_proc: int | None
) -> tuple[datasets.Dataset, DataReport]:
    source = tokenize.source
    table = rows.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=tokenize.features,
        num_proc=num_proc,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),  # nothing to hash
        desc=f"Tokenizing {source}",
    ).with_format("arrow")[:]
    kept = table.filter(pc.is_null(table["dropped"])).select([*tokenize.id_columns, "row"])
    report = _report(source, table, kept, tokenize.id_columns)
    if not report.kept:
        raise ValueError(f"no row can be used.\n{report}")
    return datasets.Dataset(kept), report


def _check_lengths(max_length: int | None, max_prompt_length: int | None) -> None:
    for name, value in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < 1
        ):
            raise ValueError(f"{name}: got {value!r}, expected a number of tokens ≥ 1, or None")
    if max_length is not None and max_prompt_length is not None and max_prompt_length >= max_length:
        raise ValueError(
            f"max_prompt_length: got {max_prompt_length}, expected less than max_length ({max_length}), "
            "which holds the answer too"
        )


@dataclass
class _Texts:
    """What is tokenised of a row: the prompt (None: implicit) and prompt + answer, of each answer."""

    prompt: str | None
    wholes: list[str]
    is_plain: bool

    @property
    def is_split(self) -> bool:
        """Whether prompt + answer falls apart at the prompt's end."""
        prompt = self.prompt
        return prompt is not None and all(text.startswith(prompt) for text in self.wholes)


class RowTokenizer:
    """A batch of rows → a batch of ids, with what was dropped or noted.

    ``parse`` makes a row's one form, whose answers become the columns ``<name>_ids`` of ``answers``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        parse: Callable[[Mapping[str, Any], str], PlainRow | ChatRow],
        answers: Sequence[str],
        max_length: int | None,
        max_prompt_length: int | None,
        source: str,
    ) -> None:
        _check_lengths(max_length, max_prompt_length)
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: it has no eos_token, which must end every answer; set one")
        self.tokenizer, self.parse = tokenizer, parse
        self.id_columns = [f"{name}_ids" for name in ("prompt", *answers)]
        ids = dict.fromkeys(self.id_columns, datasets.List(datasets.Value("int32")))
        self.features = datasets.Features({**ids, **_ACCOUNT})
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.source = source
        self.before_text = self._ids_before_text()

    def __call__(self, batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        results: list[dict[str, Any]] = []
        for k, row in enumerate(rows):
            where = f"{self.source}, row {row} (from 0)"
            result: dict[str, Any] = dict.fromkeys(self.features) | {"row": row, "notes": []}
            try:
                parsed = self.parse({name: values[k] for name, values in batch.items()}, where)
                result["texts"] = self._texts(parsed, where)
            except UnusableRow as unusable:
                result |= {"dropped": unusable.reason, "detail": unusable.detail}
            results.append(result)
        usable = [result for result in results if not result["dropped"]]
        texts: list[_Texts] = [result["texts"] for result in usable]
        encoded = iter(self._encode([text for t in texts for text in (t.prompt or "", *t.wholes)]))
        for result in usable:
            try:
                prompt, *wholes = itertools.islice(encoded, len(self.id_columns))
                ids = self._row_ids(result["texts"], prompt, wholes, result["notes"])
                result |= dict(zip(self.id_columns, ids, strict=True))
            except UnusableRow as unusable:
                result["dropped"] = unusable.reason
        return {name: [result[name] for result in results] for name in self.features}

    def _texts(self, row: PlainRow | ChatRow, where: str) -> _Texts:
        texts = self._chat_texts(row, where) if isinstance(row, ChatRow) else self._plain_texts(row)
        start = len(texts.prompt) if texts.prompt is not None and texts.is_split else 0
        texts.wholes = [self._without_space_after_eos(text, start) for text in texts.wholes]
        return texts

    def _plain_texts(self, row: PlainRow) -> _Texts:
        if not row.prompt:
            return _Texts(row.prompt, row.answers, is_plain=True)
        bos = self.tokenizer.bos_token or ""
        wholes = [row.prompt + answer.removeprefix(bos) for answer in row.answers]
        return _Texts(row.prompt, wholes, is_plain=True)

    def _chat_texts(self, row: ChatRow, where: str) -> _Texts:
        prompt = self._render(row, row.prompt, where, add_generation_prompt=True)
        wholes = [self._render(row, row.prompt + answer, where) for answer in row.answers]
        if len(set(wholes)) < len(wholes):
            raise UnusableRow("template_error", "it renders chosen and rejected alike")
        texts = _Texts(prompt, wholes, is_plain=False)
        if not texts.is_split:
            _check_prompt_survives(texts, row.prompt[-1]["content"].strip())
        return texts

    def _without_space_after_eos(self, text: str, start: int) -> str:
        answer = text[start:].rstrip()
        return text[:start] + answer if answer.endswith(self.tokenizer.eos_token) else text

    def _render(self, row: ChatRow, messages: list[Message], where: str, **options: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"chat_template: {where} is a conversation, but the tokenizer has no chat template; set "
                "`chat_template` in the configuration (or tokenizer.chat_template) to the model's Jinja "
                "template, or use a tokenizer that has one"
            )
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=row.tools, tokenize=False, **options, **row.template_kwargs
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise UnusableRow("template_error", f"{type(error).__name__}: {error}") from error

    def _row_ids(
        self, texts: _Texts, prompt: list[int], wholes: list[list[int]], notes: list[str]
    ) -> list[list[int]]:
        """Ids of the prompt and of each answer."""
        if texts.is_split:
            assert texts.prompt is not None
            answers = [
                ids[len(prompt) :]
                if ids[: len(prompt)] == prompt
                else self._encode_continuation(text[len(texts.prompt) :], notes)
                for text, ids in zip(texts.wholes, wholes, strict=True)
            ]
        else:
            sides = wholes
            if texts.prompt is not None:
                sides = [*wholes, prompt]
                notes.append("generation_prompt_differs")
            prompt = wholes[0][: _common_length(sides)]
            answers = [ids[len(prompt) :] for ids in wholes]
        answers = [self._with_eos(answer, texts.is_plain) for answer in answers]
        if answers[1:] == answers[:1]:
            raise UnusableRow("equal_answers")
        if texts.is_plain and prompt[: len(self.before_text)] != self.before_text:
            prompt = self.before_text + prompt
        if not prompt:
            raise UnusableRow("no_prompt")
        if prompt == self.before_text:
            notes.append("empty_prompt")
        prompt = self._shortened(prompt, notes)
        if self.max_length is not None and len(prompt) + max(map(len, answers)) > self.max_length:
            raise UnusableRow("too_long")
        return [prompt, *answers]

    def _with_eos(self, answer: list[int], is_plain: bool) -> list[int]:
        eos = self.tokenizer.eos_token_id
        end = len(answer)
        while end and answer[end - 1] == eos:
            end -= 1
        if not end or (is_plain and not self.tokenizer.decode(answer[:end]).strip()):
            raise UnusableRow("empty_answer")
        return answer[:end] + [eos]

    def _shortened(self, prompt: list[int], notes: list[str]) -> list[int]:
        limit = self.max_prompt_length
        if limit is None or len(prompt) <= limit:
            return prompt
        notes.append("prompt_shortened")
        # BOS stays: models that were trained with it lose many nats without
        has_bos = limit > 1 and prompt[0] == self.tokenizer.bos_token_id
        return prompt[:1] + prompt[len(prompt) - limit + 1 :] if has_bos else prompt[-limit:]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _encode_continuation(self, text: str, notes: list[str]) -> list[int]:
        """Ids of a text that continues another one: no space before its first word from the tokenizer."""
        if "split_tokens" not in notes:
            notes.append("split_tokens")
        for before in ("\n", "=", ""):
            head, ids = self._encode([before, before + text])
            if ids[: len(head)] == head:
                break
        return ids[len(head) :]

    def _ids_before_text(self) -> list[int]:
        """What the tokenizer itself puts before a text: [BOS], or nothing."""
        whole, bare = self.tokenizer("a")["input_ids"], self._encode(["a"])[0]
        if not bare:  # "a" is not in the vocabulary
            return list(takewhile(lambda token: token != self.tokenizer.eos_token_id, whole))
        starts = range(len(whole) - len(bare) + 1)
        return next((whole[:k] for k in starts if whole[k : k + len(bare)] == bare), [])


def _common_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the longest common prefix."""
    return sum(
        1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))
    )


def _check_prompt_survives(texts: _Texts, last_content: str) -> None:
    """A template may word the generation prompt differently, but not what stands before it."""
    assert texts.prompt is not None
    common = _common_length([texts.prompt, *texts.wholes])
    at = texts.prompt.rfind(last_content)
    if at < 0 or common < at + len(last_content):
        raise UnusableRow("prompt_rewritten")


def _report(source: str, table: pa.Table, kept: pa.Table, id_columns: Sequence[str]) -> DataReport:
    found: dict[str, list[tuple[int, str]]] = {}
    for row, reason, detail, notes in zip(
        *(table[name].to_pylist() for name in ("row", "dropped", "detail", "notes")), strict=True
    ):
        for key in notes if reason is None else [reason]:
            found.setdefault(key, []).append((row, detail or ""))

    def findings(keys: dict[str, str]) -> dict[str, Finding]:
        return {
            key: Finding(
                len(found[key]), [row for row, _ in found[key][:ROWS_NAMED]], found[key][0][1]
            )
            for key in keys
            if key in found
        }

    tokens = {
        name.removesuffix("_ids"): TokenCounts.of(pc.list_value_length(kept[name]).to_pylist())
        for name in id_columns
        if len(kept)
    }
    return DataReport(source, len(table), len(kept), findings(DROPPED), findings(NOTED), tokens)
