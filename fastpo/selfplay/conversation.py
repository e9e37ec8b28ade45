"""Columns of the rows that go through the stages: prompts, completions and responses.

``prompt``: text, or messages that end with the user's; ``completion``: a given answer, text or one assistant's
message (``messages`` holds both); ``responses``: texts that a model made; ``scores`` and ``completion_score``:
numbers.

A row may hold both ``prompt`` and ``messages``. Where the prompt is what the messages say before their answer
(a system's turn aside), it stands: ``fastpo generate`` writes it so. Where it is not, as in data sets whose
prompt is a conversation's first question, prompt and answer both come from the messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpo.data.formats import Message, read_example_columns, text_or_messages

from .engines.base import Prompt


def read_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """The prompt of a row, of ``messages`` without the assistant's last one.

    Raises:
        ValueError: none, an empty one, or one of the wrong type.
    """
    prompt = asked = None
    if row.get("prompt") is not None:
        prompt = text_or_messages(row["prompt"], "prompt", where)
    if row.get("messages") is not None:
        asked = text_or_messages(row["messages"], "messages", where)
        if isinstance(asked, list) and _ends_with_answer(asked):
            asked = asked[:-1]
    if prompt is None or (asked and _turns(asked) != _turns(prompt)):
        prompt = asked
    if prompt is None:
        raise ValueError(f"{where}: no 'prompt' (the row has {_columns(row)})")
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"{where}: the prompt is empty")
    return prompt


def has_completion(row: Mapping[str, Any], where: str) -> bool:
    """Whether a row gives an answer: ``messages`` that end with the assistant's, or else ``completion``.

    Raises:
        ValueError: ``messages`` of the wrong type.
    """
    if row.get("messages") is not None:
        messages = text_or_messages(row["messages"], "messages", where)
        return isinstance(messages, list) and _ends_with_answer(messages)
    return row.get("completion") is not None


def _ends_with_answer(messages: list[Message]) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _turns(prompt: Prompt) -> list[tuple[str, str]]:
    """Who says what, without the system's turns, which a stage may have put before a prompt."""
    return [(m["role"], m["content"]) for m in as_conversation(prompt) if m["role"] != "system"]


def read_completion(row: Mapping[str, Any], where: str) -> str:
    """The text of the given answer of a row.

    Raises:
        ValueError: none, an empty one, one of the wrong type or of several messages.
    """
    if row.get("completion") is None and row.get("messages") is None:
        raise ValueError(
            f"{where}: no answer, expected a column 'completion' or 'messages' that end with the assistant's "
            f"(the row has {_columns(row)})"
        )
    _, completion = read_example_columns(row, where)
    if isinstance(completion, str):
        text = completion
    elif len(completion) == 1 and completion[0]["role"] == "assistant":
        text = completion[0]["content"]
    else:
        raise ValueError(f"{where}: completion must be one assistant's message")
    if not text.strip():
        raise ValueError(f"{where}: the answer is empty")
    return text


def read_responses(row: Mapping[str, Any], where: str) -> list[str]:
    """The responses of a row.

    Raises:
        ValueError: none, or something else than texts.
    """
    responses = row.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError(
            f"{where}: 'responses' must be a list of texts, as fastpo generate writes it, got {responses!r:.60}"
        )
    return responses


def read_scores(row: Mapping[str, Any], where: str, count: int) -> list[float]:
    """The scores of a row's ``count`` responses.

    Raises:
        ValueError: none, or not as many.
    """
    scores = row.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(
            f"{where}: 'scores' must be {count} numbers, one for each response, as fastpo score writes them, "
            f"got {scores!r:.60}"
        )
    return scores


def as_conversation(prompt: Prompt, system_prompt: str | None = None) -> list[Message]:
    """Messages: text becomes the user's turn, after a system prompt where there is one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: of a conversation the only user's message, or all turns, each after its role."""
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in turns)


def answer(prompt: Prompt, text: str) -> str | list[Message]:
    """An answer in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key, value in row.items() if value is not None) or "nothing"
