"""Repetition, similarity and lengths of texts against brute force and tables; prompts that were seen."""

from __future__ import annotations

import json
import re
import string
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.selfplay.text_measures import (
    Seen,
    length_stats,
    normalised,
    prompt_diversity,
    repetition,
)

PARAGRAPH = (
    "A glacier is a mass of ice that moves under its own weight. It forms where more snow falls each winter "
    "than melts in summer; over decades the layers press the air out and turn to ice. As it slides downhill, "
    "rock frozen into its base grinds the bed beneath, carving valleys with a rounded floor. Where warmth "
    "wins, meltwater carries fine dust into lakes and colours them a milky green."
)
WORDS = re.findall(r"\w+|[^\w\s]", PARAGRAPH)


def reference_repetition(units: list[str]) -> float:
    """Every window of five is looked for in all that begin before it."""
    windows = [tuple(units[k : k + 5]) for k in range(len(units) - 4)]
    repeated = {
        k + offset
        for k, window in enumerate(windows)
        if window in windows[:k]
        for offset in range(5)
    }
    total = sum(map(len, units))
    return sum(len(units[k]) for k in repeated) / total if total else 0.0


@given(st.lists(st.sampled_from(["a", "bb", "ccc", ".", "Dd"]), max_size=40))
def test_repetition_against_all_pairs_of_windows(units: list[str]) -> None:
    expected = reference_repetition([unit.lower() for unit in units])
    assert repetition(" ".join(units)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        (" \n\t", 0),
        ("no no no no no", 0),  # five units
        ("no no no no no no", 5 / 6),
        ("ha " * 100, 99 / 100),
        ("ha, HA! " * 50, 49 / 50),  # case; four units a turn
        ("!" * 200, 199 / 200),
        ("😂 " * 60, 59 / 60),
        (PARAGRAPH, 0),
        (f"{PARAGRAPH}\n\n{PARAGRAPH}", 1 / 2),
        (f"{PARAGRAPH} " * 3, 2 / 3),
        (f"{PARAGRAPH} {PARAGRAPH.upper()}", 1 / 2),
        # inside a word: 26 pieces of 4, the first is new; then pieces that come again every third
        ("a" * 104, 25 / 26),
        ("abc" * 40, 27 / 30),
        ("a" * 20, 0),  # one unit
        # scripts without spaces: character by character
        ("哈" * 50, 49 / 50),
        ("今天天气很好" * 2, 1 / 2),
        ("我们明天早上去公园散步吧", 0),
        ("สวัสดีครับ" * 4, 3 / 4),
        # characters count, not units: 20 of 20 + 5 + 20
        ("aaaa bbbb cccc dddd eeee x y z v w aaaa bbbb cccc dddd eeee", 20 / 45),
    ],
)
def test_repetition_of_known_texts(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_a_loop_at_the_end_is_found_in_ordinary_text() -> None:
    assert repetition(PARAGRAPH + " and so on" * 10) < 0.25
    assert repetition(PARAGRAPH + " and so on" * 100) > 0.65
    assert repetition(PARAGRAPH + "z" * 1000) > 0.7


def test_repetition_takes_linear_time() -> None:
    start = time.process_time()
    for text in ("ab " * 200_000, "a" * 600_000, " ".join(map(str, range(100_000)))):
        repetition(text)
    assert time.process_time() - start < 20  # 1 where it was written


# ---- Similarity of prompts ----


def reference_similarity(prompts: list[str]) -> list[float]:
    def grams(prompt: str) -> set[tuple[str, ...]]:
        words = prompt.split()
        if len(words) < 3:
            return {tuple(words)}
        return {tuple(words[k : k + 3]) for k in range(len(words) - 2)}

    sets = [grams(prompt) for prompt in prompts]
    return [
        max(len(a & b) / len(a | b) for j, b in enumerate(sets) if j != k)
        for k, a in enumerate(sets)
    ]


SHORT = st.lists(st.sampled_from("abc"), max_size=7).map(" ".join)


@given(st.lists(SHORT, min_size=2, max_size=12))
def test_similarity_against_all_pairs(prompts: list[str]) -> None:
    nearest = reference_similarity(prompts)
    found = prompt_diversity(prompts)
    assert found["mean"] == pytest.approx(np.mean(nearest))
    assert found["quantile_95"] == pytest.approx(np.quantile(nearest, 0.95))
    assert found["prompts"] == len(prompts)


def test_equal_prompts_have_similarity_one_and_unrelated_ones_none() -> None:
    assert prompt_diversity(["Name a fruit."] * 5) == {
        "mean": 1.0,
        "quantile_95": 1.0,
        "prompts": 5,
    }
    assert prompt_diversity(["name  A fruit", "Name a fruit!"])["mean"] == 1.0
    unrelated = [
        f"{a} {b} {c} here" for a, b, c in zip("abcdefgh", "ijklmnop", "qrstuvwx", strict=True)
    ]
    assert prompt_diversity(unrelated)["mean"] == 0.0
    assert prompt_diversity(["今天天气", "今天天气很好"])["mean"] == pytest.approx(2 / 4)


def test_one_near_duplicate_shows_in_the_quantile() -> None:
    unrelated = [" ".join(f"w{k}x{j}" for j in range(8)) for k in range(18)]
    found = prompt_diversity([*unrelated, "one two three four five six", "one two three four five"])
    assert found["mean"] == pytest.approx(2 * 3 / 4 / 20)
    assert found["quantile_95"] == pytest.approx(3 / 4)


def test_few_prompts() -> None:
    assert prompt_diversity([]) == {"mean": 0.0, "quantile_95": 0.0, "prompts": 0}
    assert prompt_diversity(iter(["one"])) == {"mean": 0.0, "quantile_95": 0.0, "prompts": 1}


def test_a_sample_is_drawn_from_all_prompts_by_the_seed() -> None:
    # Prompt k is like no other but its twin k + 50, so the similarity counts the twins that were drawn.
    prompts = [" ".join(f"w{k % 50}x{j}" for j in range(4)) for k in range(100)]
    means = [prompt_diversity(iter(prompts), 40, seed)["mean"] for seed in range(40)]
    assert prompt_diversity(prompts, 40, 3)["mean"] == means[3]
    assert len(set(means)) > 3
    # the twin of a prompt that was drawn is among the other 39
    assert np.mean(means) == pytest.approx(39 / 99, abs=0.07)
    assert prompt_diversity(prompts, 40)["prompts"] == 40
    assert prompt_diversity(prompts, 100)["mean"] == 1.0


# ---- Lengths ----


@given(st.lists(st.lists(st.sampled_from(["a", "bb", "c,", "–"]), max_size=9), min_size=1))
def test_lengths_against_numpy(texts: list[list[str]]) -> None:
    found = length_stats(" ".join(words) for words in texts)
    assert found["texts"] == len(texts)
    for name, values in (
        ("words", [len(words) for words in texts]),
        ("characters", [len(" ".join(words)) for words in texts]),
    ):
        assert found[name] == {
            "mean": pytest.approx(np.mean(values)),
            "median": np.quantile(values, 0.5, method="inverted_cdf"),
            "quantile_90": np.quantile(values, 0.9, method="inverted_cdf"),
        }


def test_lengths_of_known_texts() -> None:
    texts = ["", "one", "one two\n three", "well-known: 3.5!", "今天 good天"]
    found = length_stats(texts)
    assert json.loads(json.dumps(found)) == {
        "texts": 5,
        "words": {"mean": 10 / 5, "median": 2, "quantile_90": 4},
        "characters": {"mean": 41 / 5, "median": 8, "quantile_90": 16},
    }
    nothing = {"mean": 0.0, "median": 0, "quantile_90": 0}
    assert length_stats([]) == {"texts": 0, "words": nothing, "characters": nothing}


# ---- Prompts seen ----


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is iron?", "what is  IRON", True),
        ("Name “it”: now…", "name it\tnow\n", True),
        ("cafe\u0301", "CAFÉ", True),
        ("ｆｕｌｌ", "full", True),
        ("Straße", "STRASSE", True),
        ("a (b)", "a b", True),
        ("what is 3*4", "what is 3+4", False),
        ("what is 3 / 4", "what is 3 - 4", False),
        ("sort in C#", "sort in C++", False),
        ("when is a < b", "when is a > b", False),
        ("3.5", "35", False),
        ("ice cream", "icecream", False),
        ("iron", "ironed", False),
    ],
)
def test_prompts_that_count_as_the_same(first: str, second: str, same: bool) -> None:
    seen = Seen()
    assert seen.add(first)
    assert seen.add(second) is not same
    assert (normalised(first) == normalised(second)) is same


@given(st.lists(st.text(string.printable + "éß😂", max_size=6)))
def test_seen_is_a_set_of_normalised_prompts(prompts: list[str]) -> None:
    seen, reference = Seen(), set[str]()
    for prompt in prompts:
        assert seen.add(prompt) == (normalised(prompt) not in reference)
        reference.add(normalised(prompt))
    assert len(seen) == len(reference)


def test_seen_remembers_many_prompts_in_little_memory() -> None:
    count = 60_000
    tracemalloc.start()
    try:
        seen = Seen()
        assert all(seen.add(f"prompt {k}") for k in range(count))
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(seen) == count
    assert not any(seen.add(f"Prompt {k}!") for k in range(count))
    assert len(seen) == count
    assert now < 33 * count
    assert peak < 33 * count * 1.5


def test_a_hash_of_zero_is_remembered_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self.size = digest_size

        def digest(self) -> bytes:
            return bytes(self.size)

    monkeypatch.setattr("hashlib.blake2b", Zero)
    seen = Seen()
    assert [seen.add("a"), seen.add("a"), len(seen)] == [True, False, 1]


def test_half_a_surrogate_pair_is_a_prompt_too() -> None:
    seen = Seen()
    assert seen.add("\ud83d")
    assert not seen.add("\ud83d")
