"""vLLM in this process.

This file has NOT been run against a real vLLM: the machines it was written on cannot install it. It is written
against the interface of ``vllm.LLM`` and ``vllm.SamplingParams`` as their sources of 2026 have it, and tested
with a stand-in for the module that records how it is called.

vLLM draws for each request by itself, from the seed of that request, so what a prompt becomes does not depend
on what is generated beside it, up to the rounding of its kernels, which may differ with the size of a batch.
"""

from __future__ import annotations

import gc
import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastpo.selfplay.manifest import model_revision, text_sha256
from fastpo.trainer.model import checked_model_name, load_tokenizer_of

from .base import Completion, EngineError, Refused, Request, RequestBatch, Sampling
from .prompt_ids import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # requests that vLLM gets at a time; it schedules them itself, results come after each chunk
SEEDS = (
    2**31
)  # the n completions of a request have its seed, its seed + 1, …: far from any overflow


class VLLMEngine:
    """Completes prompts by a model in vLLM.

    Args:
        model: checkpoint directory or Hub name.
        options: further keywords of ``vllm.LLM``, e.g. tensor_parallel_size, max_model_len.
        dtype: of the weights: auto (vLLM's choice), float32, bfloat16, float16.
        chat_template: Jinja text, or a file that holds it; None: the tokenizer's own.
        max_prompt_tokens: longer prompts are refused; None: what the model's context leaves beside
            ``Sampling.max_tokens``.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        FileNotFoundError, ValueError: no such model, or a directory that is no checkpoint.
        ImportError: vllm is not installed.
    """

    batch_rows = 1

    def __init__(
        self,
        model: str,
        *,
        options: dict[str, Any] | None = None,
        dtype: str = "auto",
        chat_template: str | None = None,
        max_prompt_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(
                "engine.kind 'vllm': needs the package vllm and a GPU (pip install vllm); engine.kind "
                "'transformers' needs neither"
            )
        self.name = checked_model_name(model, "model")
        self.options = options or {}
        self.dtype = dtype
        self.chat_template = chat_template
        self.max_prompt_tokens = max_prompt_tokens
        self.trust_remote_code = trust_remote_code
        self._llm: Any = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "vllm",
            "model": model_revision(self.name),
            "dtype": self.dtype,
            "chat_template_sha256": text_sha256(self.tokenizer.chat_template),
            "max_prompt_tokens": self.max_prompt_tokens,
            "options": self.options,
        }

    def generate(
        self, batches: Iterable[RequestBatch], sampling: Sampling, counts: Counter[str]
    ) -> Iterator[tuple[int, list[Completion] | Refused]]:
        requests = (request for batch in batches for request in batch.requests)
        while chunk := list(islice(requests, CHUNK)):
            limit = self._limit(sampling)
            served: list[tuple[Request, list[int]]] = []
            for request in chunk:
                ids = prompt_ids(self.tokenizer, request.prompt, request.number, self.name)
                if len(ids) > limit:
                    yield request.number, Refused("prompt_too_long")
                else:
                    served.append((request, ids))
            if served:
                yield from self._complete(served, sampling)

    def close(self) -> None:
        self._llm = self._tokenizer = None
        gc.collect()  # it is part of cycles; its memory on the GPU is free when it is gone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with this engine's chat template."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer_of(
                self.name, "model", self.chat_template, self.trust_remote_code
            )
        return self._tokenizer

    @property
    def llm(self) -> Any:
        """The ``vllm.LLM``, loaded.

        Raises:
            ValueError: vLLM cannot load it so.
        """
        if self._llm is None:
            import vllm

            arguments = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
            try:
                self._llm = vllm.LLM(model=self.name, **arguments, **self.options)
            except (OSError, ValueError, TypeError, RuntimeError) as error:
                raise ValueError(f"model: vllm could not load {self.name}: {error}") from error
        return self._llm

    def _limit(self, sampling: Sampling) -> int:
        """Tokens of the longest prompt that is served."""
        context = self.llm.llm_engine.model_config.max_model_len
        if self.max_prompt_tokens is None:
            return context - sampling.max_tokens
        return min(self.max_prompt_tokens, context - 1)  # vLLM wants room for one token

    def _complete(
        self, served: list[tuple[Request, list[int]]], sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        import vllm

        drawn = [
            vllm.SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1 if sampling.top_k is None else sampling.top_k,
                repetition_penalty=sampling.repetition_penalty,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop),
                seed=request.seed % SEEDS,
            )
            for request, _ in served
        ]
        prompts = [{"prompt_token_ids": ids} for _, ids in served]
        outputs = self.llm.generate(prompts, drawn, use_tqdm=False)
        for (request, _), output in zip(served, outputs, strict=True):
            completions = [
                Completion(
                    made.text,
                    "length" if made.finish_reason == "length" else "stop",
                    len(made.token_ids),
                )
                for made in output.outputs
            ]
            if len(completions) != sampling.n:
                raise EngineError(
                    f"vllm gave {len(completions)} completions of row {request.number}, expected {sampling.n}"
                )
            yield request.number, completions
