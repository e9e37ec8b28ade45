"""One of several processes ends after an error, even if something holds up the end of Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastpo

# As a communicator does, a thread that nobody ends keeps Python from ending.
PROGRAM = """
import sys, threading, time
from fastpo import cli
cli.END_SECONDS = 1
threading.Thread(target=time.sleep, args=(60,)).start()
try:
    raise ValueError("beta: got -1")
except ValueError as error:
    cli._end_with_the_others(error)
sys.exit(2)
"""


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="a Unix signal")
def test_an_error_ends_one_of_several_processes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(fastpo.__file__).parents[1]),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
    }
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, timeout=55)
    assert ended.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 50  # the thread sleeps for longer
    written = json.loads((tmp_path / "error.json").read_text())["message"]
    assert written["message"] == "ValueError: beta: got -1"
