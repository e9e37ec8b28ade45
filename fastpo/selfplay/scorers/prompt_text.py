"""A prompt as plain text, for models that do not take conversations."""

from __future__ import annotations

from fastpo.selfplay.engines.base import Prompt


def prompt_text(prompt: Prompt) -> str:
    """A text as it is; of a conversation that is one user's message, its content; of others ``ROLE: content``
    in paragraphs.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].upper()}: {message['content']}" for message in prompt)
