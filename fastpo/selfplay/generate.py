"""``fastpo generate``: responses of a model to a file of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .conversation import as_conversation, read_prompt
from .engines import (
    Completion,
    Engine,
    EngineSettings,
    Refused,
    Request,
    RequestBatch,
    Sampling,
    make_engine,
)
from .engines.base import Prompt
from .manifest import Manifest
from .rows import Row, check_readable
from .settings import from_mapping
from .stage import Batch, Result, Work, run_stage, seed_of


@dataclass
class GenerateConfig:
    """Settings of ``fastpo generate``."""

    prompts: str = field(
        metadata={
            "help": "JSONL or Parquet with a column prompt (text or messages), or messages; other columns stay"
        }
    )
    output: str = field(
        metadata={"help": "JSONL or Parquet; gets the columns prompt, responses, finish_reasons"}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "checkpoint directory, Hub name, or the name that a server knows"},
    )
    engine: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "kind (transformers, vllm, openai) and its settings: batch_size, dtype, device, "
            "chat_template, max_prompt_tokens, options; base_url, api_key_env, concurrency, timeout, retries"
        },
    )
    sampling: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "n, temperature, top_p, top_k, repetition_penalty, max_tokens, stop"},
    )
    chat: bool | None = field(
        default=None,
        metadata={
            "help": "prompts that are text are the user's turn; unset: if the model has a chat template"
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "before conversations that have none"}
    )
    seed: int = field(default=0, metadata={"help": "of the draws"})


def generate(config: GenerateConfig) -> Manifest:
    """Complete every prompt; continued where it stopped, skipped where it is done.

    Rows whose prompt an engine cannot take are left out and counted.

    Raises:
        EngineError: no text could be made; finished rows are kept.
        FileNotFoundError, ImportError, TypeError, ValueError: files, packages or settings that cannot be used.
    """
    check_readable(Path(config.prompts), "prompts")
    engine = engine_of(config)
    chat = is_chat(engine, config.chat)

    def prompt_of(row: Row, where: str) -> Prompt:
        prompt = read_prompt(row, where)
        conversation = chat or not isinstance(prompt, str)
        return as_conversation(prompt, config.system_prompt) if conversation else prompt

    def columns(row: Row, prompt: Prompt, completions: list[Completion]) -> Row:
        return {"prompt": prompt, **response_columns(completions)}

    settings = {"chat": chat, "system_prompt": config.system_prompt}
    return generate_rows(
        "generate", Path(config.prompts), Path(config.output), engine, sampling_of(config),
        prompt_of, columns, settings=settings, seed=config.seed,
    )  # fmt: skip


def generate_rows(
    stage: str,
    rows: Path,
    output: Path,
    engine: Engine,
    sampling: Sampling,
    prompt_of: Callable[[Row, str], Prompt],
    columns: Callable[[Row, Prompt, list[Completion]], Row],
    *,
    settings: Mapping[str, Any],
    seed: int,
    keep_columns: bool = True,
) -> Manifest:
    """A stage that has an engine complete a prompt for every row; the engine is closed at the end.

    Args:
        stage, rows, output, seed, keep_columns: as for :func:`~fastpo.selfplay.stage.run_stage`.
        engine, sampling: what completes the prompts, and how.
        prompt_of: the prompt of a row, whose place is given too.
        columns: what a row gets, from itself, its prompt and the completions.
        settings: what else decides prompts and columns.
    """

    def run(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        under_way: dict[int, tuple[Row, Prompt]] = {}

        def requests() -> Iterator[RequestBatch]:
            for batch in batches:
                of_batch = []
                for item in batch.items:
                    prompt = prompt_of(item.row, item.where)
                    under_way[item.number] = item.row, prompt
                    of_batch.append(Request(item.number, prompt, seed_of(batch.seed, item.number)))
                yield RequestBatch(of_batch, batch.seed)

        for number, made in engine.generate(requests(), sampling, counts):
            row, prompt = under_way.pop(number)
            if isinstance(made, Refused):
                yield Result(number, None, made.reason)
            else:
                tokens = sum(completion.tokens for completion in made)
                yield Result(number, columns(row, prompt, made), tokens=tokens)

    try:
        return run_stage(
            stage,
            output,
            {"rows": rows},
            {"engine": engine.identity(), "sampling": asdict(sampling), **settings},
            Work(run, engine.batch_rows, _length),
            seed=seed,
            keep_columns=keep_columns,
        )
    finally:
        engine.close()


def response_columns(completions: list[Completion]) -> Row:
    """The columns that hold what an engine made."""
    return {
        "responses": [completion.text for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }


def engine_of(config: Any) -> Engine:
    """The engine of a stage's settings (fields ``engine`` and ``model``)."""
    settings = from_mapping(EngineSettings, _mapping(config.engine, "engine"), "engine")
    return make_engine(settings, config.model)


def sampling_of(config: Any) -> Sampling:
    """The same of ``sampling``."""
    return from_mapping(Sampling, _mapping(config.sampling, "sampling"), "sampling")


def is_chat(engine: Engine, wanted: bool | None) -> bool:
    """Whether prompts that are text become the user's turn: as wanted, or where the model has conversations."""
    if wanted is not None:
        return wanted
    return engine.identity().get("chat_template_sha256", "a server's own") is not None


def _length(row: Row) -> int:
    """About how long a prompt is, for batches of like length."""
    return len(str(row.get("prompt") or row.get("messages")))


def _mapping(value: Any, name: str) -> dict[str, Any] | None:
    if not isinstance(value, dict | None):
        raise TypeError(f"{name}: got {value!r}, expected a mapping")
    return value
