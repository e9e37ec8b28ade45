"""A run in a process of its own, started and killed by tests/trainer/test_kill.py, of one YAML file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from fastpo.trainer import PreferenceConfig, train

if __name__ == "__main__":
    torch.set_num_threads(1)
    train(PreferenceConfig(**yaml.safe_load(Path(sys.argv[1]).read_text())))
