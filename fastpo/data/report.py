"""What became of a data set's rows: which were dropped or changed and why, and how long the rest is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

DROPPED = {
    "equal_answers": "chosen equals rejected",
    "empty_answer": "an answer is empty",
    "no_prompt": "nothing precedes the answers",
    "no_common_prompt": "the answers do not start with the assistant's turn after one common prompt",
    "too_long": "prompt and the longer answer exceed max_length",
    "template_error": "the chat template refused the conversation",
    "prompt_rewritten": "the chat template changes the prompt once an answer follows",
}
NOTED = {
    "prompt_shortened": "prompt cut from its start to max_prompt_length",
    "split_tokens": "tokens would have joined prompt and answer; the answer was tokenised on its own",
    "generation_prompt_differs": "end of the template's generation prompt dropped, the answers begin otherwise",
    "empty_prompt": "no prompt but the tokenizer's own first token",
}
ROWS_NAMED = 5  # how many row numbers a finding remembers


@dataclass(frozen=True)
class Finding:
    """How many rows something happened to, the first few of them (counted from 0), and an error's text."""

    count: int
    first_rows: list[int]
    detail: str = ""

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.first_rows)) + (
            ", …" if self.count > len(self.first_rows) else ""
        )
        detail = f": {self.detail}" if self.detail else ""
        return f"{'row' if self.count == 1 else 'rows'} {rows}{detail}"


@dataclass(frozen=True)
class TokenCounts:
    """Lengths in tokens over the kept rows."""

    total: int
    min: int
    mean: float
    median: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TokenCounts:
        ordered = sorted(lengths)
        n = len(ordered)
        median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        total = sum(ordered)
        return cls(total, ordered[0], total / n, median, ordered[-1])


@dataclass(frozen=True)
class DataReport:
    """The account of :func:`~fastpo.data.tokenize_preferences`.

    ``rows == kept + Σ dropped counts``; a row is dropped for one reason, and a kept row may be noted for
    several. Keys are those of :data:`DROPPED` and :data:`NOTED`. ``tokens`` has ``prompt``, ``chosen`` and
    ``rejected`` (answers with their EOS) and is empty where no row was kept.
    """

    source: str
    rows: int
    kept: int
    dropped: dict[str, Finding] = field(default_factory=dict)
    noted: dict[str, Finding] = field(default_factory=dict)
    tokens: dict[str, TokenCounts] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.rows} rows, {self.kept} kept"]
        findings = [("dropped", self.dropped, DROPPED), ("noted", self.noted, NOTED)]
        for word, found, meanings in findings:
            for reason, finding in found.items():
                lines.append(f"  {word:<8}{finding.count:>8}  {meanings[reason]} ({finding})")
        for name, n in self.tokens.items():
            lines.append(
                f"  tokens  {name:>8}  {n.total} in all; min {n.min}, median {n.median:g}, "
                f"mean {n.mean:.1f}, max {n.max}"
            )
        return "\n".join(lines)
