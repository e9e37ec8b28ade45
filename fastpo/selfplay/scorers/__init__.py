"""Scorers: what judges answers. One protocol (``base``), one file each, one function that makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastpo.selfplay.engines import EngineSettings
from fastpo.selfplay.settings import from_mapping

from .base import Candidates, Scorer, ScorerError

__all__ = ["Candidates", "Scorer", "ScorerError", "ScorerSettings", "make_scorer"]

KINDS = ("reward_model", "ranker", "judge", "callable", "logprob")


@dataclass(frozen=True)
class ScorerSettings:
    """Which scorer, and how it judges. Fields of other kinds than ``kind`` are refused.

    Args:
        kind: reward_model (a sequence classifier with one output), ranker (a classifier that compares two
            answers, PairRM among them), judge (a language model that is asked), callable (a Python function),
            logprob (the model's own mean log-prob of the answer).
        model: reward_model, ranker, logprob: checkpoint directory or Hub name. Where a loop scores with its own
            model, that stands in for None of logprob.
        batch_size: reward_model, ranker, logprob: sequences in one forward.
        dtype: reward_model, ranker, logprob: of the weights: auto (as stored), float32, bfloat16, float16.
        device: reward_model, ranker, logprob: cpu, cuda, …; None: an accelerator if there is one.
        max_length: reward_model, ranker, logprob: tokens of prompt and answer; longer ones lose the beginning
            of the prompt. None: what the model allows.
        chat_template: reward_model, logprob: Jinja text or a file that holds it; None: the tokenizer's own.
        trust_remote_code: reward_model, ranker, logprob: run Python code that comes with a model.
        engine: judge: settings of its engine, see :class:`~fastpo.selfplay.engines.EngineSettings`.
        template: judge: rubric or pairwise, templates that come with fastpo, or a file of one's own.
        mode: judge: rubric (each answer gets a grade) or pairwise (answers are compared, in both orders).
        temperature, max_tokens: judge: of its verdicts.
        retries: judge: how often an answer that holds no verdict is asked for again.
        function: callable: ``module:function``, called with (prompt, response, row) → a number. The module is
            looked for in the current directory, beside the configuration file, and among installed packages.
    """

    kind: str = "reward_model"
    model: str | None = None
    batch_size: int = 16
    dtype: str = "auto"
    device: str | None = None
    max_length: int | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    mode: str = "pairwise"
    temperature: float = 0.0
    max_tokens: int = 512
    retries: int = 2
    function: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"scorer.kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        allowed = {"kind", *_FIELDS[self.kind]}
        for name, f in ScorerSettings.__dataclass_fields__.items():
            default = f.default_factory() if callable(f.default_factory) else f.default
            if name not in allowed and getattr(self, name) != default:
                raise ValueError(
                    f"scorer.{name}: has no effect with scorer.kind {self.kind!r}; unset it (null)"
                )

    @property
    def absolute(self) -> bool:
        """Whether an answer's score means something without other answers beside it."""
        return self.kind != "ranker" and not (self.kind == "judge" and self.mode == "pairwise")


_MODEL = ("model", "batch_size", "dtype", "device", "max_length", "trust_remote_code")
_FIELDS = {
    "reward_model": (*_MODEL, "chat_template"),
    "ranker": _MODEL,
    "logprob": (*_MODEL, "chat_template"),
    "judge": ("engine", "template", "mode", "temperature", "max_tokens", "retries"),
    "callable": ("function",),
}


def make_scorer(settings: ScorerSettings, model: str | None = None) -> Scorer:
    """The scorer that ``settings`` describes; ``model`` is what ``logprob`` takes if they name none.

    Raises:
        FileNotFoundError: no such model directory or template file.
        ImportError: a package that is not installed, or no such module or function.
        ValueError: a field that the kind needs is not set.
    """
    s = settings
    options: dict[str, Any] = {name: getattr(s, name) for name in _MODEL if name != "model"}
    name = s.model or (model if s.kind == "logprob" else None)
    if s.kind in ("reward_model", "ranker", "logprob") and not name:
        raise ValueError(
            f"scorer.model: got {s.model!r}, expected a checkpoint directory or a name"
        )
    if s.kind == "reward_model":
        from .reward_model import RewardModel

        return RewardModel(str(name), chat_template=s.chat_template, **options)
    if s.kind == "ranker":
        from .ranker import PairwiseRanker

        return PairwiseRanker(str(name), **options)
    if s.kind == "logprob":
        from .logprob import LogprobScorer

        return LogprobScorer(str(name), chat_template=s.chat_template, **options)
    if s.kind == "callable":
        from .function import FunctionScorer

        if not s.function:
            raise ValueError(f"scorer.function: got {s.function!r}, expected module:function")
        return FunctionScorer(s.function)
    from .judge import Judge

    engine = from_mapping(EngineSettings, s.engine, "scorer.engine")
    return Judge(
        engine,
        mode=s.mode,
        template=s.template,
        temperature=s.temperature,
        max_tokens=s.max_tokens,
        retries=s.retries,
    )
