"""The folder of the configuration that a command was given: modules of the user's are looked for there too.

It is kept in an environment variable, so that the processes that a command starts know it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "FASTPO_CONFIG_FOLDER"


@contextmanager
def known_config_folder(config: str | Path | None) -> Iterator[None]:
    """Within it, :func:`config_folder` is that of the file ``config``.

    None, or a process that another command started: the folder stays what it was, since the file that such a
    process is given was written by fastpo.
    """
    if config is None or VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = str(Path(config).resolve().parent)
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def config_folder() -> str | None:
    """The folder, None where no command with a configuration is under way."""
    return os.environ.get(VARIABLE)
