"""How far a stage is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

LOG_SECONDS = 30.0  # between two lines where stderr is no terminal


class Progress:
    """Rows done, tokens per second and the time left, on stderr. A context.

    Args:
        stage: its name.
        total: rows.
        done: rows that were done before.
        quiet: show nothing.
    """

    def __init__(self, stage: str, total: int, done: int, quiet: bool) -> None:
        self.stage, self.total, self.done, self.quiet = stage, total, done, quiet
        self._before, self._tokens = done, 0
        self._began = self._told = time.monotonic()
        self._bar: tqdm[None] | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=stage, unit="row", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, tokens: int) -> None:
        """``done`` rows are done in all; ``tokens`` were made since the last call."""
        self._tokens += tokens
        now = time.monotonic()
        if self._bar is not None:
            if self._tokens:
                self._bar.set_postfix_str(self._speed(now), refresh=False)
            self._bar.update(done - self.done)
        elif not self.quiet and now - self._told >= LOG_SECONDS and done < self.total:
            self._told = now
            print(self._line(done, now), file=sys.stderr, flush=True)
        self.done = done

    def _line(self, done: int, now: float) -> str:
        words = [f"{self.stage}: {done} of {self.total} rows"]
        if self._tokens:
            words.append(self._speed(now))
        made = done - self._before
        if made:
            left = (now - self._began) / made * (self.total - done)
            words.append(f"about {timedelta(seconds=round(left))} left")
        return ", ".join(words)

    def _speed(self, now: float) -> str:
        return f"{self._tokens / max(now - self._began, 1e-9):.0f} tok/s"
