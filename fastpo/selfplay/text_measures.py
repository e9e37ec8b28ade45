"""Measures of generated texts: how much one repeats itself, how alike and how long many are, which were seen.

SynPO (Dong et al., ICLR 2025, arXiv 2410.06961) drops texts that are more than half repetition, without saying
how that is measured; the definition here is fastpo's own.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

# Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WINDOW = 5  # units that have to come again for a repetition
LONG_WORD, PIECE = 20, 4  # characters; a longer word is looked at in pieces
GRAM = 3  # words that two prompts have to share to be alike

_UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")
_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def repetition(text: str) -> float:
    """Share of a text, in [0, 1), that repeats what stood in it before.

    The text is a sequence of units: words, single signs, and single characters in scripts without spaces; a
    word of more than 20 characters counts as pieces of 4, so that loops inside a word are found too. Case does
    not matter. Wherever five units in a row stood in the text before, these five are repeated. The share is
    that of the repeated units' characters in all units' characters; white space counts nowhere.

    So a text of at most five units has 0; ``ha`` n times has 1 − 1/n; a paragraph that stands there twice has
    1/2, three times 2/3; prose of a few hundred words has a few hundredths, program code a tenth or two.
    Time and memory are linear in the text.
    """
    units: list[str] = []
    for word in _UNIT.findall(text.lower()):
        if len(word) <= LONG_WORD:
            units.append(word)
        else:
            units.extend(word[k : k + PIECE] for k in range(0, len(word), PIECE))
    seen: set[tuple[str, ...]] = set()
    repeated, end = 0, 0  # characters; first unit that is not counted yet
    for start in range(len(units) - WINDOW + 1):
        window = tuple(units[start : start + WINDOW])
        if window in seen:
            repeated += sum(map(len, units[max(start, end) : start + WINDOW]))
            end = start + WINDOW
        seen.add(window)
    return repeated / sum(map(len, units)) if repeated else 0.0


def prompt_diversity(
    prompts: Iterable[str], sample: int = 500, seed: int = 0
) -> dict[str, float | int]:
    """How alike the prompts of a data set are; little similarity is much diversity.

    Two prompts are as similar as the Jaccard index of their sets of three words in a row (of all their words,
    if they have fewer), in the form of :func:`normalised`: 1 for equal ones, 0 where they share no three words.

    Args:
        prompts: walked once.
        sample: prompts that are drawn and compared with each other; memory and time are bounded by it, and what
            is found depends on it: the more there are, the more alike are the nearest two.
        seed: of the draw.

    Returns:
        ``mean`` and ``quantile_95``, over the drawn prompts, of a prompt's similarity to the one that is most
        like it (0 if there is no other), and their number, ``prompts``.
    """
    draw = random.Random(seed)
    drawn: list[str] = []
    for number, prompt in enumerate(prompts):
        if number < sample:
            drawn.append(prompt)
        elif (place := draw.randrange(number + 1)) < sample:
            drawn[place] = prompt
    if not drawn:
        return {"mean": 0.0, "quantile_95": 0.0, "prompts": 0}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = np.zeros(len(drawn))
    for number, prompt in enumerate(drawn):
        grams = _grams(prompt)
        sizes[number] = len(grams)
        for gram in grams:
            holders[gram].append(number)
    shared = np.zeros((len(drawn), len(drawn)))
    for numbers in holders.values():
        if len(numbers) > 1:
            shared[np.ix_(numbers, numbers)] += 1
    jaccard = shared / (sizes[:, None] + sizes[None, :] - shared)
    np.fill_diagonal(jaccard, 0)
    nearest = jaccard.max(axis=1)
    return {
        "mean": float(nearest.mean()),
        "quantile_95": float(np.quantile(nearest, 0.95)),
        "prompts": len(drawn),
    }


def _grams(prompt: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(normalised(prompt))
    return {tuple(words[k : k + GRAM]) for k in range(max(1, len(words) - GRAM + 1))}


def length_stats(texts: Iterable[str]) -> dict[str, Any]:
    """How long texts are, exactly; memory grows with the number of different lengths only.

    Returns:
        ``texts``: their number; ``words`` and ``characters``: each ``mean``, ``median`` and ``quantile_90``
        (the least length that half, or nine tenths, of the texts do not exceed), all 0 if there are no texts.
        Words are what white space separates; in scripts without spaces every character is one.
    """
    words: Counter[int] = Counter()
    characters: Counter[int] = Counter()
    for text in texts:
        words[sum(1 for _ in _WORD.finditer(text))] += 1
        characters[len(text)] += 1
    return {"texts": words.total(), "words": _spread(words), "characters": _spread(characters)}


def _spread(counts: Counter[int]) -> dict[str, float | int]:
    total = counts.total()
    if not total:
        return {"mean": 0.0, "median": 0, "quantile_90": 0}
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    at_half, at_nine_tenths = (
        values[int(np.searchsorted(below, rank))] for rank in (-(-total // 2), -(-9 * total // 10))
    )
    mean = sum(value * count for value, count in counts.items()) / total
    return {"mean": mean, "median": at_half, "quantile_90": at_nine_tenths}


def normalised(text: str) -> str:
    """A text without what makes no two prompts different: case, white space, punctuation, width of letters.

    ``# % & * + - / @ \\`` and mathematical signs stay: 3*4 is not 3+4. Words stay apart.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    blanks = {
        ord(character): " "
        for character in set(folded)
        if character not in "#%&*-/@\\" and unicodedata.category(character)[0] == "P"
    }
    return " ".join(folded.translate(blanks).split())


class Seen:
    """Remembers prompts, in their normalised form, by hashes of 8 bytes.

    Takes 16 to 32 bytes a prompt (16 MiB for a million), in between while it grows half as much again. Among n
    prompts one is taken for another with probability below n²/2⁶⁵: 3·10⁻⁸ for a million.
    """

    def __init__(self) -> None:
        self._hashes = array("Q", bytes(8 * 1024))  # open addressing; 0: a free place
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, prompt: str) -> bool:
        """Remember a prompt. Returns whether it is new."""
        text = normalised(prompt).encode("utf-8", "surrogatepass")
        value = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1
        place = self._place(self._hashes, value)
        if self._hashes[place] == value:
            return False
        self._hashes[place] = value
        self._count += 1
        if 2 * self._count > len(self._hashes):
            self._grow()
        return True

    @staticmethod
    def _place(hashes: array[int], value: int) -> int:
        """Where a value is, or belongs."""
        place = value & (len(hashes) - 1)
        while hashes[place] not in (0, value):
            place = (place + 1) & (len(hashes) - 1)
        return place

    def _grow(self) -> None:
        larger = array("Q", bytes(2 * 8 * len(self._hashes)))
        for value in self._hashes:
            if value:
                larger[self._place(larger, value)] = value
        self._hashes = larger
