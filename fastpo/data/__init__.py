"""Preference pairs and examples for fine-tuning: files and Hub data sets → token ids → padded batches.

load_preferences → tokenize_preferences → PreferenceCollator, or PackedCollator: no padding, prompts shared
load_examples    → tokenize_examples    → ExampleCollator
   (rows as text)     (ids + DataReport)      (tensors)
"""

from __future__ import annotations

from fastpo.data.collator import ExampleCollator, PreferenceCollator
from fastpo.data.loading import load_examples, load_preferences
from fastpo.data.packing import PackedCollator
from fastpo.data.report import DataReport, Finding, TokenCounts
from fastpo.data.token_budget import TokenBudgetSampler
from fastpo.data.tokenization import tokenize_examples, tokenize_preferences

__all__ = [
    "DataReport",
    "ExampleCollator",
    "Finding",
    "PackedCollator",
    "PreferenceCollator",
    "TokenBudgetSampler",
    "TokenCounts",
    "load_examples",
    "load_preferences",
    "tokenize_examples",
    "tokenize_preferences",
]
