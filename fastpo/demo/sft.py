"""Supervised fine-tuning of the demo's model, and the model's answers, greedy or sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastpo
from fastpo.demo.task import DIGITS, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
ANSWER_BATCH = 256  # prompts per call of generate


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[tuple[str, str]],
    *,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """One pass of AdamW over (prompt, answer) examples, in order; only answer tokens are trained on.

    The learning rate rises over the first 20 steps and falls to 0 over the last 30 %.
    """
    steps = max(1, len(examples) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1, (steps - step) / (0.3 * steps))
    )
    model.train()
    with fastpo.fused_head(model):
        for input_ids, labels in _batches(tokenizer, examples, str(model.device)):
            mask = input_ids != tokenizer.pad_token_id
            logps = model(input_ids, attention_mask=mask, labels=labels, use_cache=False).log_probs
            loss = -logps.sum() / (labels != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def _batches(
    tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, str]], device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Right-padded input ids (B, T) and shifted labels (B, T)."""
    for start in range(0, len(examples), BATCH_SIZE):
        prompts, answers = zip(*examples[start : start + BATCH_SIZE], strict=True)
        prompt_ids = _prompt_ids(tokenizer, list(prompts))
        answer_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(answers)).input_ids]
        width = max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True))
        input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
        completion = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (p, a) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
            input_ids[row, : len(p) + len(a)] = torch.tensor(p + a)
            completion[row, len(p) : len(p) + len(a)] = True
        labels = fastpo.shift_labels(input_ids, completion)
        yield input_ids.to(device), labels.to(device)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[list[int]]:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, return_dict=False
    )


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    sample_seed: int | None = None,
) -> list[str]:
    """The model's answers: greedy ones, or with `sample_seed` drawn at temperature 1."""
    choice = {"do_sample": False} if sample_seed is None else {"do_sample": True, "top_k": 0}
    answers: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(sample_seed or 0)
        for start in range(0, len(problems), ANSWER_BATCH):
            prompts = [p.prompt for p in problems[start : start + ANSWER_BATCH]]
            inputs = tokenizer.pad(
                {"input_ids": _prompt_ids(tokenizer, prompts)},
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            out = model.generate(**inputs, max_new_tokens=DIGITS + 2, **choice)
            completions = out[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return answers


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> float:
    """Share of the problems that the model's greedy answer solves, character for character."""
    answers = answer(model, tokenizer, problems)
    return sum(a == p.answer for a, p in zip(answers, problems, strict=True)) / len(problems)
