"""Training on preference pairs and fine-tuning on examples: settings, trainers, whole jobs as one function."""

from fastpo.rank_watch import RankFailure, watch_ranks

from .config import PreferenceConfig, build_loss
from .launch import train
from .plots import plot_run
from .reference_job import RefLogpsConfig, write_reference_logps
from .sft import SFTConfig, SFTTrainer, fine_tune
from .trainer import PreferenceTrainer

__all__ = [
    "PreferenceConfig",
    "PreferenceTrainer",
    "RankFailure",
    "RefLogpsConfig",
    "SFTConfig",
    "SFTTrainer",
    "build_loss",
    "fine_tune",
    "plot_run",
    "train",
    "watch_ranks",
    "write_reference_logps",
]
