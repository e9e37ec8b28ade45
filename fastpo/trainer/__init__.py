"""Training on preference pairs: the settings, the trainer, and the whole job as one function."""

from .config import PreferenceConfig, build_loss
from .launch import train
from .plots import plot_run
from .trainer import PreferenceTrainer

__all__ = ["PreferenceConfig", "PreferenceTrainer", "build_loss", "plot_run", "train"]
