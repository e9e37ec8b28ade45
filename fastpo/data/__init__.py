"""Preference pairs and examples for fine-tuning: files and Hub data sets → token ids → padded batches.

load_preferences → tokenize_preferences → PreferenceCollator
load_examples    → tokenize_examples    → ExampleCollator
   (rows as text)     (ids + DataReport)      (tensors)
"""

from __future__ import annotations

from fastpo.data.collator import ExampleCollator, PreferenceCollator
from fastpo.data.loading import load_examples, load_preferences
from fastpo.data.report import DataReport, Finding, TokenCounts
from fastpo.data.tokenization import tokenize_examples, tokenize_preferences

__all__ = [
    "DataReport",
    "ExampleCollator",
    "Finding",
    "PreferenceCollator",
    "TokenCounts",
    "load_examples",
    "load_preferences",
    "tokenize_examples",
    "tokenize_preferences",
]
