"""A language model as the judge: it is asked for a grade of each answer, or to compare answers in pairs.

What is judged was written by models that are trained to win, so none of it may reach the verdict but by its
quality. Prompt and answers stand in fences whose lines carry a nonce: a hash of the row's seed and of the very
texts in the fences, which no text can therefore hold. A verdict must carry the same nonce. Words in a text that
look like a fence or a verdict are taken apart all the same, and placeholders of the template that a text spells
out stay as they are.

A reply counts if its last line is a verdict and there is no other in it. Any other reply is asked for again,
with another seed and at a temperature of at least ``RETRY_TEMPERATURE``: at 0 the same text would come back.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from fastpo.selfplay.engines import (
    Completion,
    EngineSettings,
    Prompt,
    Refused,
    Request,
    RequestBatch,
    Sampling,
    make_engine,
)
from fastpo.selfplay.manifest import text_sha256
from fastpo.selfplay.prompt_templates import TEMPLATES, Template
from fastpo.selfplay.stage import seed_of

from .base import Candidates
from .checks import check_scores
from .prompt_text import prompt_text

PLACEHOLDERS = {  # of the templates
    "rubric": ("prompt", "answer", "nonce"),
    "pairwise": ("prompt", "answer_a", "answer_b", "nonce"),
}
VERDICT_FORM = "VERDICT-{nonce}:"  # that a template must ask for
VERDICTS = {  # what may follow, and its value
    "rubric": {str(grade): float(grade) for grade in range(1, 11)},
    "pairwise": {"A": 1.0, "B": 0.0, "TIE": 0.5},  # the share of the first answer
}
RETRY_TEMPERATURE = 0.5
CHUNK = 256  # rows asked about at once, where an engine completes each request by itself

_MARKER = re.compile(r"(FENCE|VERDICT)-(?=\w)", re.IGNORECASE)

# The answers that a question is about, in the order in which they are shown.
Texts = tuple[str, ...]


class Judge:
    """Scores by the verdicts of a language model.

    Args:
        engine_settings: the engine that completes the questions; its model is the judge.
        mode: rubric: each answer gets a grade, its score, from 1 to 10. pairwise: every pair of answers is
            compared in both orders, a win counts 1 and a tie ½; the score of an answer is its mean share over
            both orders and all others, in [0, 1]. Those of two answers add up to 1; equal answers tie without
            being asked about; one answer alone gets ½.
        template: ``rubric`` or ``pairwise`` for those that come with fastpo, or a text file with ``{prompt}``,
            ``{answer}`` (rubric) or ``{answer_a}`` and ``{answer_b}`` (pairwise), and ``VERDICT-{nonce}:``;
            prompt and answers are put in with their fences. None: the one of the mode.
        temperature, max_tokens: of the verdicts.
        retries: how often a reply without a verdict is asked for again, ≥ 0.

    A row whose questions are not all answered has no score: ``no_verdict`` counts it, ``unparsable_verdicts``
    the replies. One that the engine refuses has none either, and the engine's reason is counted.

    A batch of rows is as large as one of the engine (``batch_rows``). Its questions are asked in batches of
    that size, which depend, with their seeds, on the rows of the batch and the replies to them alone. So a
    batch that is judged again after a kill gets the same verdicts, as far as the engine gives the same text
    again. The order of a row's answers does not matter either.

    Raises:
        FileNotFoundError: no such template.
        ImportError, ValueError: an engine that cannot be made, a number out of range, or a template that lacks
            something.
    """

    def __init__(
        self,
        engine_settings: EngineSettings,
        *,
        mode: str = "pairwise",
        template: str | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        retries: int = 2,
    ) -> None:
        if mode not in PLACEHOLDERS:
            raise ValueError(
                f"scorer.mode: got {mode!r}, expected one of {', '.join(PLACEHOLDERS)}"
            )
        if retries < 0:
            raise ValueError(f"scorer.retries: got {retries}, expected an integer ≥ 0")
        self.mode, self.retries = mode, retries
        try:
            self.sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
        except ValueError as error:
            raise ValueError(str(error).replace("sampling.", "scorer.", 1)) from error
        self.template = _load_template(template or mode, mode)
        self.engine = make_engine(engine_settings)
        self.batch_rows = self.engine.batch_rows

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "judge",
            "engine": self.engine.identity(),
            "mode": self.mode,
            "template_sha256": text_sha256(self.template.text),
            "temperature": self.sampling.temperature,
            "max_tokens": self.sampling.max_tokens,
            "retries": self.retries,
        }

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        batches = iter(batches)
        # An engine that completes each request by itself needs many at hand; one that makes batches gets the
        # next batch of rows when this one is done, so that a kill loses little.
        span = CHUNK if self.batch_rows == 1 else 1
        while chunk := list(islice(batches, span)):
            yield from self._judge([[self._case(row) for row in b] for b in chunk], counts)

    def close(self) -> None:
        self.engine.close()

    def _case(self, row: Candidates) -> _Case:
        texts = sorted(set(row.responses))
        size = 1 if self.mode == "rubric" else 2
        return _Case(row, prompt_text(row.prompt), list(permutations(texts, size)))

    def _judge(
        self, batches: list[list[_Case]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        cases = [case for batch in batches for case in batch]
        for case in cases:
            if not case.open:
                yield case.row.number, self._scores(case)
        for attempt in range(self.retries + 1):
            yield from self._ask(batches, attempt, counts)
        for case in cases:
            if case.open:
                counts["no_verdict"] += 1
                yield case.row.number, None

    def _ask(
        self, batches: list[list[_Case]], attempt: int, counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        """Ask what is open, once, and give the scores of the rows that this decides."""
        asked: list[tuple[_Case, Texts]] = []
        requests: list[RequestBatch] = []
        for batch in batches:
            questions = [(case, texts) for case in batch for texts in case.open]
            for start in range(0, len(questions), self.batch_rows):
                together = questions[start : start + self.batch_rows]
                group = [
                    Request(number, self._question(case, texts), case.seed(texts, attempt))
                    for number, (case, texts) in enumerate(together, start=len(asked))
                ]
                requests.append(RequestBatch(group, seed_of("judge", *(r.seed for r in group))))
                asked += together
        for number, reply in self.engine.generate(requests, self._sampling(attempt), counts):
            case, texts = asked[number]
            if texts not in case.open:  # the row was refused
                continue
            if isinstance(reply, Refused):
                counts[reply.reason] += 1
                case.open.clear()
                yield case.row.number, None
                continue
            verdict = self._verdict(reply[0], case.nonce(texts))
            if verdict is None:
                counts["unparsable_verdicts"] += 1
                continue
            case.verdicts[texts] = verdict
            case.open.remove(texts)
            if not case.open:
                yield case.row.number, self._scores(case)

    def _sampling(self, attempt: int) -> Sampling:
        if not attempt:
            return self.sampling
        temperature = max(self.sampling.temperature, RETRY_TEMPERATURE)
        return replace(self.sampling, temperature=temperature)

    def _question(self, case: _Case, texts: Texts) -> Prompt:
        nonce = case.nonce(texts)
        names = ("ANSWER",) if self.mode == "rubric" else ("ANSWER A", "ANSWER B")
        parts = {"prompt": _fenced("PROMPT", case.prompt, nonce), "nonce": nonce}
        for name, text in zip(names, texts, strict=True):
            parts[name.lower().replace(" ", "_")] = _fenced(name, text, nonce)
        return [{"role": "user", "content": self.template.fill(**parts)}]

    def _verdict(self, reply: Completion, nonce: str) -> float | None:
        """What the reply says, None if that is not clear beyond doubt."""
        if reply.finish_reason == "length":  # cut off, perhaps between the digits of 10
            return None
        values = VERDICTS[self.mode]
        form = rf"VERDICT-{nonce}:[ \t]*({'|'.join(sorted(values, key=len, reverse=True))})"
        last = re.fullmatch(form, reply.text.strip().split("\n")[-1].strip())
        is_only_one = len(re.findall(rf"{form}(?!\w)", reply.text)) == 1
        return values[last[1]] if last and is_only_one else None

    def _scores(self, case: _Case) -> list[float]:
        responses, n = case.row.responses, len(case.row.responses)
        if self.mode == "rubric":
            scores = [case.verdicts[text,] for text in responses]
        else:
            scores = [
                sum(case.share(text, other) for j, other in enumerate(responses) if j != i)
                / (n - 1)
                if n > 1
                else 0.5
                for i, text in enumerate(responses)
            ]
        return check_scores(case.row.where, scores, n)


@dataclass
class _Case:
    """A row that is judged."""

    row: Candidates
    prompt: str
    open: list[Texts]  # questions without a verdict
    verdicts: dict[Texts, float] = field(default_factory=dict)

    def nonce(self, texts: Texts) -> str:
        """Alike for both orders of a pair."""
        told = json.dumps([self.row.seed, self.prompt, sorted(texts)])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def seed(self, texts: Texts, attempt: int) -> int:
        return seed_of("judge", self.row.seed, self.prompt, texts, attempt)

    def share(self, text: str, other: str) -> float:
        """1: ``text`` wins in both orders, 0: it loses in both."""
        if text == other:
            return 0.5
        return (self.verdicts[text, other] + 1 - self.verdicts[other, text]) / 2


def _fenced(name: str, text: str, nonce: str) -> str:
    inside = _MARKER.sub(r"\1 ", text)
    return f"[[FENCE-{nonce} {name}]]\n{inside}\n[[END-FENCE-{nonce} {name}]]"


def _load_template(name: str, mode: str) -> Template:
    """A template of fastpo's by its name, or a file."""
    file = TEMPLATES / f"judge_{name}.txt" if name in PLACEHOLDERS else Path(name).expanduser()
    template = Template(file, PLACEHOLDERS[mode])
    if VERDICT_FORM not in template.text:
        raise ValueError(f"{file}: no {VERDICT_FORM}, which has to begin the line with the verdict")
    return template
