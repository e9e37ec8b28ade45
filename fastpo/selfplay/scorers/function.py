"""A Python function of the user's as the scorer: (prompt, response, row) → a number."""

from __future__ import annotations

import hashlib
import importlib
import numbers
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpo.config_folder import config_folder

from .base import Candidates, ScorerError
from .checks import check_scores


class FunctionScorer:
    """Scores by a function, one response at a time, in this process.

    Args:
        function: ``module:function``. The module is looked for in the current directory, then in the folder of
            the command's configuration file, then among installed packages.

    The function is called with the prompt (text, or a list of messages), the response and the row (all of its
    columns); what it returns is the score. True and False are the numbers 1 and 0. It should depend on its
    arguments alone: a row that was scored is not scored again.

    Raises:
        ImportError: a module that cannot be imported, or that has no such function.
        ValueError: ``function`` is not of that form.
    """

    batch_rows = 1

    def __init__(self, function: str) -> None:
        module, _, name = function.partition(":")
        if not module or not name.isidentifier():
            raise ValueError(f"scorer.function: got {function!r}, expected module:function")
        self.name = function
        self._module = _import(module)
        found = getattr(self._module, name, None)
        if not callable(found):
            raise ImportError(f"scorer.function: module {module!r} has no function {name!r}")
        self._function: Callable[..., Any] = found

    def identity(self) -> dict[str, Any]:
        """The name, and SHA-256 of the module's file: what that file imports may change unnoticed."""
        source = getattr(self._module, "__file__", None)
        digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None
        return {"kind": "callable", "function": self.name, "source_sha256": digest}

    def score(
        self, batches: Iterable[Sequence[Candidates]], counts: Counter[str]
    ) -> Iterator[tuple[int, list[float] | None]]:
        for batch in batches:
            for row in batch:
                scores = [self._score(row, k) for k in range(len(row.responses))]
                yield row.number, check_scores(row.where, scores, len(row.responses))

    def close(self) -> None:
        pass

    def _score(self, row: Candidates, k: int) -> float:
        try:
            score = self._function(row.prompt, row.responses[k], row.row)
        except Exception as error:
            raise ScorerError(
                f"{row.where}: {self.name} failed on response {k} (from 0): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(score, numbers.Real):
            raise ScorerError(
                f"{row.where}: {self.name} returned {score!r:.60} ({type(score).__name__}) for response "
                f"{k} (from 0), expected a number"
            )
        return float(score)


def _import(module: str) -> Any:
    """A module: of the current directory, then of the configuration's folder, rather than an installed one."""
    folders = list(dict.fromkeys(f for f in (os.getcwd(), config_folder()) if f is not None))
    sys.path[:0] = folders
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the module's own code raises
        raise ImportError(
            f"scorer.function: module {module!r} could not be imported: {type(error).__name__}: {error} "
            f"(looked in {', '.join(folders)} and among installed packages)"
        ) from error
    finally:
        for folder in folders:
            sys.path.remove(folder)
            # What the function imports when it is called is found too, but files that happen to lie here shadow
            # no installed package from now on.
            if folder not in sys.path:
                sys.path.append(folder)
