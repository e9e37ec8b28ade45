"""SynPO's own stages: prompts made from keywords, answers improved, and examples to train both makers on.

Dong et al., *Self-Boosting Large Language Models with Synthetic Preference Data*, ICLR 2025, arXiv 2410.06961.

- The **prompt generator** learns from seed prompts: 2 keywords of a prompt and 1 of another → that prompt and
  its answer, tagged. It is asked with 3 keywords of a paragraph of a corpus.
- The **improver** learns from seed prompts whose given answer is scored better than the model's own by more
  than a threshold: prompt and the model's answer → the given answer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conversation import (
    answer,
    as_conversation,
    prompt_text,
    read_completion,
    read_prompt,
    read_responses,
)
from .engines import Completion, Prompt
from .generate import engine_of, generate_rows, is_chat, response_columns, sampling_of
from .keywords import Keywords, paragraph_keywords, paragraphs, seed_keywords
from .manifest import Manifest, sha256
from .pairs import completion_score, response_scores
from .prompt_templates import (
    GENERATOR_TEMPLATE,
    IMPROVER_TEMPLATE,
    generator_prompt,
    generator_target,
    improver_prompt,
    load_template,
    parse_generated,
)
from .rows import Row, check_readable, draw_rows, read_rows
from .stage import seed_of, write_stage
from .text_measures import Seen

KEYWORDS = 3  # of a list


@dataclass
class PromptsConfig:
    """Settings of ``fastpo prompts``."""

    corpus: str = field(
        metadata={
            "help": ".txt (paragraphs between blank lines), JSONL or Parquet with a column text"
        }
    )
    output: str = field(metadata={"help": "JSONL or Parquet of prompts"})
    count: int = field(metadata={"help": "keyword lists to draw, each from a paragraph of its own"})
    model: str | None = field(default=None, metadata={"help": "the prompt generator's checkpoint"})
    engine: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "kind and settings, as for fastpo generate"}
    )
    sampling: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "as for fastpo generate; SynPO: temperature 0.7"}
    )
    chat: bool | None = field(
        default=None, metadata={"help": "as for fastpo generate; also of the prompts that are made"}
    )
    known_prompts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "files whose prompts are not made again: the seed's, earlier iterations'"
        },
    )
    stopwords: str | None = field(
        default=None, metadata={"help": "file of words that are no keywords; unset: English ones"}
    )
    template: str | None = field(
        default=None, metadata={"help": "file of the generator's prompt; unset: fastpo's"}
    )
    seed: int = field(default=0, metadata={"help": "of paragraphs, keywords and draws"})

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: got {self.count}, expected an integer ≥ 1")


def make_prompts(config: PromptsConfig) -> Manifest:
    """Draw keyword lists from a corpus, have the generator make a prompt from each, keep the new ones.

    Beside the output two files stay, ``.keywords.jsonl`` and ``.generated.jsonl``.

    Raises:
        EngineError: no text could be made; finished rows are kept.
        FileNotFoundError, ValueError: files or settings that cannot be used; no paragraph with enough keywords.
    """
    known = [Path(name) for name in config.known_prompts]
    for path in known:
        check_readable(path, "known_prompts")
    output = Path(config.output)
    lists = output.with_name(f"{output.stem}.keywords.jsonl")
    keyword_lists(config, lists)
    engine = engine_of(config)
    chat = is_chat(engine, config.chat)
    template = load_template(config.template, GENERATOR_TEMPLATE)

    def prompt_of(row: Row, where: str) -> Prompt:
        text = generator_prompt(row["keywords"], template)
        return as_conversation(text) if chat else text

    def columns(row: Row, prompt: Prompt, completions: list[Completion]) -> Row:
        return response_columns(completions)

    generated = output.with_name(f"{output.stem}.generated.jsonl")
    generate_rows(
        "prompts", lists, generated, engine, sampling_of(config), prompt_of, columns,
        settings={"chat": chat, "template": template.text}, seed=config.seed,
    )  # fmt: skip

    def make(counts: Counter[str]) -> Iterator[Row]:
        seen = Seen()
        for path in known:
            for where, row in read_rows(path):
                seen.add(prompt_text(read_prompt(row, where)))
        for where, row in read_rows(generated):
            counts["in"] += 1
            parsed = parse_generated(read_responses(row, where)[0])
            if parsed is None:
                counts["unparsable"] += 1
            elif not seen.add(parsed[0]):
                counts["known_prompt"] += 1
            else:
                prompt = as_conversation(parsed[0]) if chat else parsed[0]
                yield {"prompt": prompt, "keywords": row["keywords"]}

    inputs = {"generated": generated, **{f"known {k}": path for k, path in enumerate(known)}}
    return write_stage("parse prompts", output, inputs, {"chat": chat}, make)


def keyword_lists(config: PromptsConfig, output: Path) -> Manifest:
    """``config.count`` keyword lists from as many paragraphs drawn from the corpus.

    A paragraph with fewer than three usable keywords makes none, and is counted.

    Warns:
        UserWarning: the corpus has fewer such paragraphs.

    Raises:
        FileNotFoundError, ValueError: a corpus that cannot be read or is empty, or that gives no list at all.
    """
    corpus = Path(config.corpus)
    words = Keywords(_path(config.stopwords))

    def usable(counts: Counter[str]) -> Iterator[Row]:
        for number, (_, paragraph) in enumerate(paragraphs(corpus)):
            drawn = paragraph_keywords(
                paragraph, KEYWORDS, seed_of(config.seed, "keywords", number), words
            )
            if drawn is None:
                counts["few_keywords"] += 1
            else:
                yield {"keywords": drawn}

    def make(counts: Counter[str]) -> Iterator[Row]:
        passes: list[Counter[str]] = []

        def one_pass() -> Iterator[Row]:
            passes.append(Counter())
            return usable(passes[-1])

        rows, total = draw_rows(one_pass, config.count, seed_of(config.seed, "paragraphs"))
        counts.update(passes[0])
        counts["in"] = total + passes[0]["few_keywords"]
        if not total:
            raise ValueError(
                f"corpus: {corpus} has no paragraph with {KEYWORDS} usable keywords (of {counts['in']})"
            )
        counts["not_drawn"] = max(0, total - config.count)
        if total < config.count:
            warnings.warn(
                f"{output}: {total} keyword lists of {config.count} asked for: {corpus} has no more paragraphs "
                f"with {KEYWORDS} keywords",
                stacklevel=1,
            )
        return rows

    settings = {"count": config.count, "seed": config.seed, "stopwords": _hash(config.stopwords)}
    return write_stage("keywords", output, {"corpus": corpus}, settings, make)


def generator_examples(
    seeds: Path, output: Path, *, chat: bool, stopwords: str | None, template: str | None, seed: int
) -> Manifest:
    """Examples for the prompt generator: two keywords of a seed prompt and one of another → prompt and answer.

    Raises:
        ValueError: no seed prompt has enough keywords.
    """
    words, text = Keywords(_path(stopwords)), load_template(template, GENERATOR_TEMPLATE)

    def make(counts: Counter[str]) -> Iterator[Row]:
        prompts = [prompt_text(read_prompt(row, where)) for where, row in read_rows(seeds)]
        for number, (where, row) in enumerate(read_rows(seeds)):
            counts["in"] += 1
            drawn = seed_keywords(prompts, number, seed_of(seed, "generator"), words)
            if drawn is None:
                counts["few_keywords"] += 1
                continue
            prompt = generator_prompt(drawn, text)
            target = generator_target(prompts[number], read_completion(row, where))
            if parse_generated(target) is None:  # the texts hold such tags themselves
                counts["holds_tags"] += 1
                continue
            yield _example(as_conversation(prompt) if chat else prompt, target)
        if counts["few_keywords"] == counts["in"]:
            raise ValueError(
                f"seeds: no prompt of {seeds} has two usable keywords, and another one a third"
            )

    settings = {"chat": chat, "stopwords": _hash(stopwords), "template": text.text, "seed": seed}
    return write_stage("generator examples", output, {"seeds": seeds}, settings, make)


def improver_examples(
    scored: Path, output: Path, *, chat: bool, threshold: float, template: str | None
) -> Manifest:
    """Examples for the improver: seed prompt and the model's own answer → the given answer, where that is
    scored better by more than ``threshold``.

    Raises:
        ValueError: no answer is that much better, or the file is not scored so.
    """
    text = load_template(template, IMPROVER_TEMPLATE)

    def make(counts: Counter[str]) -> Iterator[Row]:
        kept = 0
        for where, row in read_rows(scored):
            counts["in"] += 1
            draft, given = read_responses(row, where)[0], read_completion(row, where)
            if not completion_score(row, where) - response_scores(row, where, 1)[0] > threshold:
                counts["small_gap"] += 1
                continue
            kept += 1
            prompt = improver_prompt(prompt_text(read_prompt(row, where)), draft, text)
            yield _example(as_conversation(prompt) if chat else prompt, given)
        if not kept:
            raise ValueError(
                f"threshold: in {scored} no given answer is scored better than the model's own by more than "
                f"{threshold}; there is nothing for the improver to learn from"
            )

    settings = {"chat": chat, "threshold": threshold, "template": text.text}
    return write_stage("improver examples", output, {"scored": scored}, settings, make)


@dataclass
class ImproveConfig:
    """Settings of ``fastpo improve``."""

    responses: str = field(
        metadata={"help": "JSONL or Parquet as fastpo generate writes it: prompt and responses"}
    )
    output: str = field(
        metadata={"help": "the same with the first response as draft, its improvement as responses"}
    )
    model: str | None = field(default=None, metadata={"help": "the improver's checkpoint"})
    engine: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "kind and settings, as for fastpo generate"}
    )
    sampling: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "as for fastpo generate"}
    )
    chat: bool | None = field(default=None, metadata={"help": "as for fastpo generate"})
    template: str | None = field(
        default=None, metadata={"help": "file of the improver's prompt; unset: fastpo's"}
    )
    seed: int = field(default=0, metadata={"help": "of the draws"})


def improve(config: ImproveConfig) -> Manifest:
    """Have the improver rewrite the first response of every row.

    Raises:
        EngineError: no text could be made; finished rows are kept.
        FileNotFoundError, ValueError: files or settings that cannot be used.
    """
    check_readable(Path(config.responses), "responses")
    engine = engine_of(config)
    chat = is_chat(engine, config.chat)
    template = load_template(config.template, IMPROVER_TEMPLATE)

    def prompt_of(row: Row, where: str) -> Prompt:
        draft = read_responses(row, where)[0]
        text = improver_prompt(prompt_text(read_prompt(row, where)), draft, template)
        return as_conversation(text) if chat else text

    def columns(row: Row, prompt: Prompt, completions: list[Completion]) -> Row:
        return {"draft": read_responses(row, "")[0], **response_columns(completions)}

    return generate_rows(
        "improve", Path(config.responses), Path(config.output), engine, sampling_of(config), prompt_of,
        columns, settings={"chat": chat, "template": template.text}, seed=config.seed,
    )  # fmt: skip


def _example(prompt: Prompt, completion: str) -> Row:
    return {"prompt": prompt, "completion": answer(prompt, completion)}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _hash(name: str | None) -> str | None:
    return None if name is None else sha256(Path(name))
