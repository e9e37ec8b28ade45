"""A loop in a process of its own, started and killed by test_kill.py, of one YAML file.

The tiny model's prompt generator writes no tags: any text of its is taken for a question.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from fastpo.selfplay import synpo
from fastpo.selfplay.loop import iterate
from fastpo.selfplay.loop_config import LoopConfig

if __name__ == "__main__":
    torch.set_num_threads(1)
    synpo.parse_generated = lambda text: (f"order {text.strip()}", "")
    config = LoopConfig(**yaml.safe_load(Path(sys.argv[1]).read_text()))
    print("started", flush=True)
    iterate(config)
