"""The embedded engine: transformers' ``generate`` in this process, on CPU or GPU.

Requests of a batch are padded on the left and completed together. All draws of a batch come from its own seed,
so the completions of a batch depend on its requests, the model, the precision and the device, and on nothing
that was generated before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from fastpo.selfplay.manifest import model_revision, text_sha256
from fastpo.trainer.model import checked_model_name, load_causal_lm, load_tokenizer_of

from .base import Completion, Prompt, Refused, RequestBatch, Sampling
from .prompt_ids import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersEngine:
    """Completes prompts by a model of transformers.

    Args:
        model: checkpoint directory or Hub name.
        batch_size: prompts that are completed together; memory grows with it and with ``Sampling.n``.
        dtype: of the weights: auto (as stored), float32, bfloat16, float16.
        device: cpu, cuda, …; None: an accelerator if there is one.
        chat_template: Jinja text, or a file that holds it; None: the tokenizer's own.
        max_prompt_tokens: longer prompts are refused; None: what the model's positions leave beside
            ``Sampling.max_tokens``.
        trust_remote_code: run Python code that comes with the model.
        options: further keywords of ``from_pretrained``, e.g. attn_implementation.

    Sampling is what :class:`Sampling` says: the checkpoint's own generation settings give the tokens that end a
    text and nothing else.

    Raises:
        FileNotFoundError, ValueError: no such model, or a directory that is no checkpoint.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_size: int = 16,
        dtype: str = "auto",
        device: str | None = None,
        chat_template: str | None = None,
        max_prompt_tokens: int | None = None,
        trust_remote_code: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"engine.batch_size: got {batch_size}, expected an integer ≥ 1")
        self.name, self.batch_rows = checked_model_name(model, "model"), batch_size
        self.dtype, self.device = dtype, device
        self.chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens
        self.trust_remote_code = trust_remote_code
        self.options = options or {}
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._ends: list[int] = []

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "model": model_revision(self.name),
            "batch_size": self.batch_rows,  # it decides what is drawn together
            "dtype": self.dtype,
            "chat_template_sha256": text_sha256(self._template()),
            "max_prompt_tokens": self.max_prompt_tokens,
            "options": self.options,
        }

    def generate(
        self, batches: Iterable[RequestBatch], sampling: Sampling, counts: Counter[str]
    ) -> Iterator[tuple[int, list[Completion] | Refused]]:
        for batch in batches:
            prompts = {
                r.number: self._prompt_ids(r.prompt, r.number, sampling) for r in batch.requests
            }
            served = {number: ids for number, ids in prompts.items() if ids is not None}
            for number in prompts.keys() - served.keys():
                yield number, Refused("prompt_too_long")
            if served:
                completions = self._complete([*served.values()], batch.seed, sampling)
                for k, number in enumerate(served):
                    yield number, completions[k * sampling.n : (k + 1) * sampling.n]

    def close(self) -> None:
        self._model = self._tokenizer = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with this engine's chat template."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer_of(
                self.name, "model", self.chat_template, self.trust_remote_code
            )
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded and in evaluation mode."""
        if self._model is None:
            model = load_causal_lm(
                self.name,
                "model",
                {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code, **self.options},
            )
            device = self.device
            if device is None:
                accelerator = torch.accelerator.current_accelerator(check_available=True)
                device = "cpu" if accelerator is None else accelerator.type
            self._ends = _end_tokens(model, self.tokenizer)
            model.generation_config = GenerationConfig()  # what a call leaves open comes from here
            self._model = model.to(device).eval()
        return self._model

    def _template(self) -> str | None:
        """The chat template in effect, without loading the weights."""
        return self.tokenizer.chat_template

    def _prompt_ids(self, prompt: Prompt, number: int, sampling: Sampling) -> list[int] | None:
        """None: too long."""
        ids = prompt_ids(self.tokenizer, prompt, number, self.name)
        limit = self.max_prompt_tokens
        if limit is None:
            positions = getattr(
                self.model.config.get_text_config(), "max_position_embeddings", None
            )
            limit = None if positions is None else positions - sampling.max_tokens
        return None if limit is not None and len(ids) > limit else ids

    def _complete(
        self, prompts: list[list[int]], seed: int, sampling: Sampling
    ) -> list[Completion]:
        """``sampling.n`` completions of each prompt, side by side."""
        model, tokenizer = self.model, self.tokenizer
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(
            model.device
        )
        draws = sampling.temperature > 0
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=draws,
            num_return_sequences=sampling.n,
            repetition_penalty=sampling.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._ends,
            stop_strings=list(sampling.stop) or None,
            **(
                {
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k or 0,
                }
                if draws
                else {}
            ),
        )
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = model.generate(
                **inputs,
                generation_config=config,
                tokenizer=tokenizer if sampling.stop else None,
            )
        width = inputs["input_ids"].shape[1]
        ends = config.eos_token_id
        return [_completion(ids, ends, tokenizer, sampling) for ids in out[:, width:].tolist()]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the checkpoint's generation settings name."""
    ends = model.generation_config.eos_token_id
    named = ends if isinstance(ends, list) else [ends]
    return sorted({t for t in (*named, tokenizer.eos_token_id) if t is not None})


def _completion(
    ids: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Completion:
    """What was generated, without what stopped it and the padding behind it."""
    at_end = next((k for k, token in enumerate(ids) if token in ends), None)
    kept = ids if at_end is None else ids[:at_end]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    places = [place for place in map(text.find, sampling.stop) if place >= 0]
    if places:
        text = text[: min(places)]
    stopped = at_end is not None or bool(places)
    tokens = len(kept) if at_end is None else at_end + 1
    if at_end is None and places:  # rows that a stop text ended are padded
        while tokens and ids[tokens - 1] == tokenizer.pad_token_id:
            tokens -= 1
    return Completion(text, "stop" if stopped else "length", tokens)
