"""What scorers check: the numbers that they give, and that they can read a conversation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Candidates, ScorerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_scores(where: str, scores: Sequence[float], n: int) -> list[float]:
    """The scores of a row's ``n`` responses, all of them finite.

    Args:
        where: names the row.

    Raises:
        ScorerError: another number of scores, or one that is NaN or infinite; responses count from 0.
    """
    if len(scores) != n:
        raise ScorerError(f"{where}: got {len(scores)} scores, expected {n}, one for each response")
    for k, score in enumerate(scores):
        if not math.isfinite(score):
            raise ScorerError(
                f"{where}: score of response {k} (from 0) is {score}, expected a finite number"
            )
    return [float(score) for score in scores]


def check_chat_template(row: Candidates, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Raises ScorerError where a conversation is to be read by a tokenizer without a chat template."""
    if not isinstance(row.prompt, str) and not tokenizer.chat_template:
        raise ScorerError(
            f"scorer.chat_template: the prompt of {row.where} is a conversation, but the tokenizer of {model} "
            "has no chat template; set it to the template that the model was trained with"
        )
