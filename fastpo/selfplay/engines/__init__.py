"""Engines: what completes prompts. One protocol (``base``), one file each, one function that makes them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from fastpo.plain_values import is_credential

from .base import (
    Completion,
    Engine,
    EngineError,
    Prompt,
    Refused,
    Request,
    RequestBatch,
    Sampling,
)

__all__ = [
    "Completion",
    "Engine",
    "EngineError",
    "EngineSettings",
    "Prompt",
    "Refused",
    "Request",
    "RequestBatch",
    "Sampling",
    "make_engine",
]

KINDS = ("transformers", "vllm", "openai")


@dataclass(frozen=True)
class EngineSettings:
    """Which engine, and how it runs. Fields of other kinds than ``kind`` have no effect and are refused.

    Args:
        kind: transformers (in this process), vllm (in this process, needs vllm and a GPU), or openai (a server
            that speaks OpenAI's protocol; needs the package openai).
        model: checkpoint directory or Hub name; of openai the name by which the server knows the model. Where a
            command has a model of its own, that stands in for None.
        dtype: transformers, vllm: of the weights: auto (as stored), float32, bfloat16, float16.
        chat_template: transformers, vllm: Jinja text or a file that holds it; None: the tokenizer's own.
        max_prompt_tokens: transformers, vllm: longer prompts are left out; None: what the model allows.
        trust_remote_code: transformers, vllm: run Python code that comes with a model.
        options: transformers: further keywords of ``from_pretrained``; vllm: of ``vllm.LLM``, e.g.
            tensor_parallel_size; openai: further fields of every request's body.
        batch_size: transformers: prompts that are completed together.
        device: transformers: cpu, cuda, …; None: an accelerator if there is one.
        base_url: openai: of the server, e.g. http://localhost:8000/v1.
        api_key_env: openai: name of the environment variable that holds the key; a server without keys needs
            none.
        concurrency: openai: requests under way at once.
        timeout: openai: seconds until a request is given up and made again.
        retries: openai: how often a request is made again before the stage stops.
    """

    kind: str = "transformers"
    model: str | None = None
    dtype: str = "auto"
    chat_template: str | None = None
    max_prompt_tokens: int | None = None
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    device: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"engine.kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        defaults = EngineSettings.__dataclass_fields__
        for name in _OF_OTHERS[self.kind]:
            if getattr(self, name) != defaults[name].default:
                raise ValueError(
                    f"engine.{name}: has no effect with engine.kind {self.kind!r}; unset it (null)"
                )
        for name in self.options:
            if is_credential(name):
                variable = self.api_key_env if self.kind == "openai" else "HF_TOKEN"
                raise ValueError(
                    f"engine.options.{name}: a credential, and settings are written to disk; expected it in "
                    f"the environment variable {variable}"
                )


_LOCAL = ("dtype", "chat_template", "max_prompt_tokens", "trust_remote_code")
_SERVER = ("base_url", "api_key_env", "concurrency", "timeout", "retries")
_OF_OTHERS = {
    "transformers": _SERVER,
    "vllm": (*_SERVER, "batch_size", "device"),
    "openai": (*_LOCAL, "batch_size", "device"),
}


def make_engine(settings: EngineSettings, model: str | None = None) -> Engine:
    """The engine that ``settings`` describes, for ``model`` if they name none. Nothing is loaded yet.

    Raises:
        FileNotFoundError: no such model directory.
        ImportError: a package that the engine needs is not installed.
        ValueError: no model, a directory that is no checkpoint, or no ``base_url``.
    """
    name = settings.model or model
    if not name:
        raise ValueError(f"engine.model: got {name!r}, expected a checkpoint directory or a name")
    local: dict[str, Any] = {key: getattr(settings, key) for key in _LOCAL}
    if settings.kind == "transformers":
        from .transformers_engine import TransformersEngine

        return TransformersEngine(
            name,
            batch_size=settings.batch_size,
            device=settings.device,
            options=settings.options,
            **local,
        )
    if settings.kind == "vllm":
        from .vllm_engine import VLLMEngine

        return VLLMEngine(name, options=settings.options, **local)
    from .openai_engine import OpenAIEngine

    return OpenAIEngine(
        name,
        base_url=settings.base_url,
        api_key=os.environ.get(settings.api_key_env),
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        options=settings.options,
    )
