"""A prompt as token ids, the same for every engine that reads a checkpoint itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import EngineError, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, number: int, model: str
) -> list[int]:
    """The tokens of a prompt: of a text to be continued, or of a conversation and the start of its answer.

    Args:
        tokenizer: with the chat template.
        prompt: text or conversation.
        number: of its row, for messages.
        model: its name, for messages.

    Raises:
        EngineError: a conversation without a chat template, or a prompt of no token.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # tokenizers that end every text
            ids = ids[:-1]
    elif not tokenizer.chat_template:
        raise EngineError(
            f"engine.chat_template: the prompt of row {number} is a conversation, but the tokenizer of {model} "
            "has no chat template; set it to the model's Jinja template"
        )
    else:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise EngineError(f"the prompt of row {number} has no token")
    return list(ids)
