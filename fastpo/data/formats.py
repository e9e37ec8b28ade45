"""One row of a data set, in any of TRL's formats → one form: a plain or a conversational row.

Preference pairs, two answers (chosen, rejected):

=================  ==============================================  =========================================
format             columns                                         becomes
=================  ==============================================  =========================================
plain, explicit    ``prompt``, ``chosen``, ``rejected``: str       :class:`PlainRow`
plain, implicit    ``chosen``, ``rejected``: str                   :class:`PlainRow` with ``prompt=None``
chat, explicit     ``prompt``, ``chosen``, ``rejected``: messages  :class:`ChatRow`
chat, implicit     ``chosen``, ``rejected``: messages              :class:`ChatRow`, prompt = common messages
UltraFeedback      ``prompt`` str; ``chosen``, ``rejected``:       :class:`ChatRow`, prompt = common messages
                   messages, the user's turn included
=================  ==============================================  =========================================

Examples for supervised fine-tuning, one answer (the completion):

=================  ==============================================  =========================================
plain              ``prompt``, ``completion``: str                 :class:`PlainRow`
chat               ``prompt``: str or messages; ``completion``:    :class:`ChatRow`
                   messages
conversation       ``messages``                                    :class:`ChatRow`, completion = last message
=================  ==============================================  =========================================

A message is ``{"role": str, "content": str, …}``. Columns that are not in :data:`COLUMNS` or
:data:`EXAMPLE_COLUMNS` are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
EXAMPLE_COLUMNS = ("prompt", "completion", "messages", "tools", "chat_template_kwargs")

Message = dict[str, Any]

# What a message says; other fields (ids, scores) do not make two messages different.
_SAID = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")


class UnusableRow(Exception):
    """A well-formed row that holds nothing to learn from; ``reason`` is a key of the data report."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class PlainRow:
    prompt: str | None  # None: what the answers have in common
    answers: list[str]  # chosen and rejected, or the completion


@dataclass(frozen=True)
class ChatRow:
    prompt: list[Message]  # not empty
    answers: list[list[Message]]  # each starts with an assistant's message
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def check_columns(names: list[str], where: str) -> None:
    """Raises ValueError where there is no column ``chosen`` or ``rejected``."""
    for name in ("chosen", "rejected"):
        if name not in names:
            raise ValueError(f"{where}: no column {name!r}, the columns are {names}")


def check_example_columns(names: list[str], where: str) -> None:
    """Raises ValueError where there is neither ``messages`` nor ``prompt`` with ``completion``."""
    if "messages" not in names and not {"prompt", "completion"} <= set(names):
        raise ValueError(
            f"{where}: expected a column 'messages', or 'prompt' and 'completion', the columns are {names}"
        )


def parse_pair(row: Mapping[str, Any], where: str) -> PlainRow | ChatRow:
    """The preference pair that a row holds.

    Args:
        row: column → value.
        where: names the row in errors, e.g. ``"prefs.jsonl, line 7"``.

    Raises:
        ValueError: a column is missing, null or of the wrong type.
        UnusableRow: the answers are equal or empty, or do not follow a common prompt.
    """
    prompt, chosen, rejected = read_columns(row, where)
    if isinstance(chosen, str):
        return _plain_pair(prompt, chosen, rejected)
    if _said(chosen) == _said(rejected):
        raise UnusableRow("equal_answers")
    prompt, *answers = _split_conversation(prompt, chosen, rejected)
    return _chat_row(prompt, answers, row, where)


def parse_example(row: Mapping[str, Any], where: str) -> PlainRow | ChatRow:
    """The example for supervised fine-tuning that a row holds.

    Args:
        row: column → value.
        where: names the row in errors.

    Raises:
        ValueError: a column is missing, null or of the wrong type.
        UnusableRow: no prompt, or an empty completion.
    """
    prompt, completion = read_example_columns(row, where)
    if isinstance(completion, str):
        if not completion.strip():
            raise UnusableRow("empty_answer")
        return PlainRow(prompt, [completion])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _chat_row(prompt, [completion], row, where)


def _chat_row(
    prompt: list[Message], answers: list[list[Message]], row: Mapping[str, Any], where: str
) -> ChatRow:
    for answer in answers:
        if all(not m["content"].strip() and not m.get("tool_calls") for m in answer):
            raise UnusableRow("empty_answer")
        if answer[0]["role"] != "assistant":
            raise UnusableRow("no_common_prompt")
    if not prompt:
        raise UnusableRow("no_prompt")
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parse_json(tools, "tools", where)
    return ChatRow(
        prompt,
        answers,
        [_without_nulls(tool) for tool in tools] if tools else None,
        _without_nulls(row.get("chat_template_kwargs") or {}),
    )


def read_columns(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected: strings, or lists of messages in their normal form.

    The prompt may also be None, or a string before conversational answers.

    Raises:
        ValueError: a column is missing, null or of the wrong type.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            present = ", ".join(repr(key) for key, value in row.items() if value is not None)
            raise ValueError(f"{where}: no {name!r} (the row has {present or 'nothing'})")
    prompt, chosen, rejected = (
        text_or_messages(row.get(name), name, where) for name in ("prompt", "chosen", "rejected")
    )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{where}: chosen and rejected must both be strings or both be lists of messages, got "
            f"{_kind(chosen)} and {_kind(rejected)}"
        )
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise ValueError(
            f"{where}: prompt is {_kind(prompt)}, so chosen and rejected must be lists of messages too, "
            f"got {_kind(chosen)}"
        )
    return prompt, chosen, rejected


def read_example_columns(row: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    """Prompt and completion: strings, or lists of messages in their normal form.

    Of ``messages`` the last one is the completion. A conversational completion may have a string as its prompt.

    Raises:
        ValueError: a column is missing, null or of the wrong type; ``messages`` that do not end with an
            assistant's.
    """
    if row.get("messages") is not None:
        messages = text_or_messages(row["messages"], "messages", where)
        if not isinstance(messages, list):
            raise ValueError(f"{where}: messages must be a list of messages, got a string")
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: messages must end with an assistant's message")
        return messages[:-1], messages[-1:]
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            present = ", ".join(repr(key) for key, value in row.items() if value is not None)
            raise ValueError(f"{where}: no {name!r} (the row has {present or 'nothing'})")
    prompt, completion = (
        text_or_messages(row[name], name, where) for name in ("prompt", "completion")
    )
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def _said(messages: list[Message]) -> list[list[Any]]:
    return [[message.get(name) for name in _SAID] for message in messages]


def _kind(value: str | list[Message] | None) -> str:
    return "a string" if isinstance(value, str) else "a list of messages"


def _plain_pair(prompt: str | None, chosen: str, rejected: str) -> PlainRow:
    if chosen == rejected:
        raise UnusableRow("equal_answers")
    if not chosen.strip() or not rejected.strip():
        raise UnusableRow("empty_answer")
    return PlainRow(prompt, [chosen, rejected])


def _split_conversation(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers; answers that repeat the prompt lose it, at least one message stays in each.

    A prompt given as a string beside answers that hold the user's turn themselves (UltraFeedback) repeats
    that turn, so the messages alone count.
    """
    if not chosen or not rejected:
        raise UnusableRow("empty_answer")
    if isinstance(prompt, str) and not any(m["role"] == "user" for m in chosen + rejected):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt:
        n = len(prompt)
        if min(len(chosen), len(rejected)) > n and (
            _said(chosen[:n]) == _said(rejected[:n]) == _said(prompt)
        ):
            chosen, rejected = chosen[n:], rejected[n:]
        explicit = True
    else:
        prompt, explicit = [], False
    shared = 0  # common messages that belong to the prompt
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if _said([ours]) != _said([theirs]) or (explicit and ours["role"] == "assistant"):
            break
        shared += 1
    return prompt + chosen[:shared], chosen[shared:], rejected[shared:]


def text_or_messages(value: Any, name: str, where: str) -> str | list[Message] | None:
    """A string, None, or a list of messages in their normal form.

    Raises:
        ValueError: anything else; ``where`` and ``name`` say what it was.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping) and "role" in value and not isinstance(value["role"], str):
        # a struct of lists, as older data sets stored lists of structs
        value = [
            dict(zip(value, fields, strict=True)) for fields in zip(*value.values(), strict=True)
        ]
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise ValueError(
            f"{where}: {name} must be a string or a list of messages, got {type(value).__name__}"
        )
    return [_message(item, f"{name}[{k}]", where) for k, item in enumerate(value)]


def _message(message: Any, name: str, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        got = list(message) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(
            f'{where}: {name} must be a message {{"role": …, "content": …}} with a string as role, got {got}'
        )
    # Arrow gives every message the union of all messages' fields: what is null was never there
    clean = _without_nulls(dict(message))
    clean["content"] = _content_text(clean.get("content"), name, where)
    for call in clean.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else {}
        if isinstance(function.get("arguments"), str):  # OpenAI's form; templates expect the object
            function["arguments"] = _parse_json(function["arguments"], f"{name}.tool_calls", where)
    return clean


def _content_text(content: Any, name: str, where: str) -> str:
    """The text of a message: some templates would print a list of parts as Python code, so join them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping) or not hasattr(content, "__iter__"):
        raise ValueError(f"{where}: {name}.content must be text, got {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ValueError(f"{where}: {name}.content must be text, got {part!r:.80}")
    return "".join(part["text"] for part in content)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        return value
    return [_without_nulls(item) for item in value]  # list, tuple or NumPy array


def _parse_json(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {name} is not valid JSON: {error}") from error
