"""Files of rows, and an engine that says what a script says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastpo.selfplay.engines import Completion, Refused, RequestBatch, Sampling


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class ScriptedEngine:
    """Answers what ``script(prompt)`` returns: texts, or a Refused."""

    def __init__(self, script: Callable[[Any], list[str] | Refused], batch_rows: int = 1) -> None:
        self.script, self.batch_rows = script, batch_rows
        self.asked: list[Any] = []
        self.closed = False

    def identity(self) -> dict[str, Any]:
        return {"kind": "scripted"}

    def generate(
        self, batches: Iterable[RequestBatch], sampling: Sampling, counts: Counter[str]
    ) -> Iterator[tuple[int, list[Completion] | Refused]]:
        for batch in batches:
            for request in batch.requests:
                self.asked.append(request.prompt)
                made = self.script(request.prompt)
                if isinstance(made, Refused):
                    yield request.number, made
                else:
                    yield request.number, [Completion(t, "stop", len(t)) for t in made]

    def close(self) -> None:
        self.closed = True
