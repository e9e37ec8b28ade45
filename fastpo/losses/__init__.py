"""Preference losses: the registry of pure functions and the module that computes them from hidden states."""

from .metrics import PreferenceOutput
from .preference_loss import PreferenceLoss
from .registry import LOSSES, Loss, find_loss

__all__ = ["LOSSES", "Loss", "PreferenceLoss", "PreferenceOutput", "find_loss"]
