"""Preference data: files and Hub data sets → token ids → padded batches.

load_preferences → tokenize_preferences → PreferenceCollator
   (rows as text)     (ids + DataReport)      (tensors)
"""

from __future__ import annotations

from fastpo.data.collator import PreferenceCollator
from fastpo.data.loading import load_preferences
from fastpo.data.report import DataReport, Finding, TokenCounts
from fastpo.data.tokenization import tokenize_preferences

__all__ = [
    "DataReport",
    "Finding",
    "PreferenceCollator",
    "TokenCounts",
    "load_preferences",
    "tokenize_preferences",
]
