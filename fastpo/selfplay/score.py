"""``fastpo score``: a number for every response of a file, the larger the better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .conversation import read_completion, read_prompt, read_responses
from .manifest import Manifest
from .rows import check_readable
from .scorers import Candidates, Scorer, ScorerSettings, make_scorer
from .settings import from_mapping
from .stage import Batch, Result, Work, run_stage, seed_of


@dataclass
class ScoreConfig:
    """Settings of ``fastpo score``."""

    responses: str = field(
        metadata={"help": "JSONL or Parquet as fastpo generate writes it: prompt and responses"}
    )
    output: str = field(
        metadata={
            "help": "JSONL or Parquet; gets the column scores, with completion: completion_score"
        }
    )
    scorer: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "kind (reward_model, ranker, judge, callable, logprob) and its settings: model, "
            "batch_size, dtype, device, max_length; engine, mode, template, retries; function"
        },
    )
    completion: bool = field(
        default=False,
        metadata={"help": "score the given answer (column completion) beside the responses"},
    )
    seed: int = field(default=0, metadata={"help": "of scorers that draw"})


def score(config: ScoreConfig) -> Manifest:
    """Score every row; continued where it stopped, skipped where it is done.

    A row for which no score was found (a judge without a verdict) is left out and counted.

    Raises:
        EngineError, ScorerError: no score could be made; finished rows are kept.
        FileNotFoundError, ImportError, TypeError, ValueError: files, packages or settings that cannot be used.
    """
    if not isinstance(config.scorer, dict):
        raise ValueError(f"scorer: got {config.scorer!r}, expected a mapping with its kind")
    check_readable(Path(config.responses), "responses")
    scorer = make_scorer(from_mapping(ScorerSettings, config.scorer, "scorer"))
    return score_rows(
        Path(config.responses), Path(config.output), scorer, config.completion, config.seed
    )


def score_rows(
    rows: Path, output: Path, scorer: Scorer, completion: bool = False, seed: int = 0
) -> Manifest:
    """The same with a scorer at hand, which is closed at the end."""

    def run(batches: Iterator[Batch], counts: Counter[str]) -> Iterator[Result]:
        def candidates() -> Iterator[list[Candidates]]:
            for batch in batches:
                of_batch = []
                for item in batch.items:
                    texts = read_responses(item.row, item.where)
                    if completion:
                        texts = [*texts, read_completion(item.row, item.where)]
                    own = seed_of(batch.seed, item.number)
                    prompt = read_prompt(item.row, item.where)
                    of_batch.append(
                        Candidates(item.number, item.where, prompt, texts, item.row, own)
                    )
                yield of_batch

        for number, scores in scorer.score(candidates(), counts):
            if scores is None:
                yield Result(number, None, "no_score")
            elif completion:
                yield Result(number, {"scores": scores[:-1], "completion_score": scores[-1]})
            else:
                yield Result(number, {"scores": scores})

    settings = {"scorer": scorer.identity(), "completion": completion}
    try:
        work = Work(run, scorer.batch_rows)
        return run_stage("score", output, {"rows": rows}, settings, work, seed=seed)
    finally:
        scorer.close()
