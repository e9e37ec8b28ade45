"""Keywords of texts, and the texts of a corpus to take them from, as SynPO's prompt generator needs them.

Dong et al., *Self-Boosting Large Language Models with Synthetic Preference Data*, ICLR 2025, arXiv 2410.06961:
lists of keywords that hold a name or a stop word are thrown away. Here such words are never drawn.

A word of a text is **usable** if

1. it stands there in lower case at least once. That is the whole rule for names: a word that is only ever
   capitalised is taken for one, at the beginning of a sentence too. An ordinary word that happens to stand
   nowhere else is lost with them, which costs one keyword; a name would cost a bad prompt. Acronyms and
   ``camelCase`` go the same way. (In a language that capitalises its nouns, verbs and adjectives remain.)
2. it is no stop word. A hyphenated word is one word, and a stop word if all its parts are. Of an ending
   with an apostrophe (dog's, who'd, they'll) the word before it counts.
3. it has 3 to 30 letters, 2 to 30 in scripts without capitals, and no digit. Scripts that put no spaces between
   words (Chinese, Japanese, Thai, …) have none that could be told apart.
4. it is prose: not in a fenced block, in backticks, a tag, an address, a path, a formula, a call or anything
   else that joins words by signs.

Texts are compared in Unicode's form NFKC.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import count as numbers
from pathlib import Path

from .rows import JSON_SUFFIXES, read_rows
from .stage import seed_of
from .text_measures import UNSPACED

STOPWORDS = Path(__file__).with_name("templates") / "stopwords.txt"
LETTERS = range(3, 31)  # of a keyword
LETTERS_WITHOUT_CASE = range(2, 31)
MIN_WORDS = 20  # of a paragraph
LONGEST = 1 << 20  # bytes of a line or paragraph of a .txt file

_CODE_OR_TAG = re.compile(
    r"```.*?(?:```|\Z)|^[ ]*~~~.*?(?:^[ ]*~~~|\Z)|`[^`\n]+`|</?[a-zA-Z][^<>]*>",
    re.DOTALL | re.MULTILINE,
)
_NO_PROSE = re.compile(
    r"""[@_\\/{}<>=|~^$]        # e-mail, identifiers, paths, URLs, formulas, markup
    | \w[.:;&#%+*(\[]+\w        # example.org, e.g., std::sort, R&D, a+b, f(x)
    | \w[(\[]                   # f()
    | ^[-#&%.]+\w               # --option, #tag, .gitignore""",
    re.VERBOSE,
)
_DASHES = re.compile("--+")
_ENDING = re.compile("'(?:s|ll|ve|re|d|m)$")
_UNSPACED = re.compile(f"[{UNSPACED}]")


class Keywords:
    """Finds and draws the usable words of texts.

    Args:
        stopwords_file: UTF-8, one word a line, ``#`` begins a comment; None: English ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not UTF-8, or a line holds more than one word; the line is named.
    """

    def __init__(self, stopwords_file: Path | None = None) -> None:
        self._stopwords = frozenset(_stopwords(stopwords_file or STOPWORDS))

    def usable(self, text: str) -> list[str]:
        """The usable words, each once, in the order in which they first stand in the text in lower case."""
        found: dict[str, str] = {}
        prose = _CODE_OR_TAG.sub(" ", unicodedata.normalize("NFKC", text))
        for run in prose.split():
            if run in self._stopwords or _NO_PROSE.search(run):  # the first only saves time
                continue
            for part in _DASHES.sub(" ", run.translate(_LETTERS)).split():
                whole = part.strip("-'")
                word = _ENDING.sub("", whole)
                if whole.casefold() not in self._stopwords and self._is_usable(word):
                    found.setdefault(word.casefold(), word)
        return list(found.values())

    def draw(self, text: str, count: int, seed: int) -> list[str] | None:
        """``count`` different usable words in random order, by text and seed alone; None: there are fewer."""
        words = self.usable(text)
        return random.Random(seed).sample(words, count) if len(words) >= count else None

    def _is_usable(self, word: str) -> bool:
        has_case = word.upper() != word.lower()
        allowed = LETTERS if has_case else LETTERS_WITHOUT_CASE
        letters = sum(character not in "-'" for character in word)
        if letters not in allowed or word != word.lower() or any(map(str.isnumeric, word)):
            return False
        folded = word.casefold()
        if folded in self._stopwords or all(part in self._stopwords for part in folded.split("-")):
            return False
        return not _UNSPACED.search(word)


class _Letters(dict[int, str | None]):
    """For str.translate: letters with their marks, digits, hyphens and apostrophes stay, the rest separates."""

    def __missing__(self, code: int) -> str | None:
        kept: str | None = chr(code)
        category = unicodedata.category(chr(code))
        if chr(code) in "'’ʼ":
            kept = "'"
        elif chr(code) in "-‐‑":
            kept = "-"
        elif category == "Cf" and chr(code) != "\u200b":
            kept = None  # soft hyphens, joiners, marks of direction; the zero-width space does separate
        elif category[0] not in "LMN":
            kept = " "
        self[code] = kept
        return kept


_LETTERS = _Letters()


def _stopwords(path: Path) -> Iterator[str]:
    for where, line in _lines(path):
        words = unicodedata.normalize("NFKC", line).partition("#")[0].replace("’", "'").split()
        if len(words) > 1:
            raise ValueError(f"{where}: expected one word, got {' '.join(words)!r}")
        yield from (word.casefold() for word in words)


def seed_keywords(
    prompts: Sequence[str],
    row: int,
    seed: int,
    keywords: Keywords,
    own: int = 2,
    noise: int = 1,
) -> list[str] | None:
    """Keywords from which the generator learns to make a seed prompt: its own, and some of another prompt.

    Args:
        prompts: of all rows; anything with a length and single items, a column of a memory-mapped data set too.
        row: whose keywords these are.
        seed: of the run. Which prompt the noise comes from is a function of seed, row and the number of rows;
            where that one has not enough words beside those of ``prompts[row]``, the next one gives them.
        keywords: finds the usable words.
        own: words of the row's own prompt.
        noise: words of the other one.

    Returns:
        ``own + noise`` words in random order, no two alike; None where the prompt has fewer than ``own`` usable
        words, or no other prompt has ``noise`` different ones.
    """
    words = keywords.usable(prompts[row])
    others = len(prompts) - 1
    if len(words) < own or not others:
        return None
    draw = random.Random(seed_of(seed, "seed keywords", row))
    start = draw.randrange(others)
    drawn = draw.sample(words, own)
    known = {word.casefold() for word in words}
    for step in range(others):
        other = (row + 1 + (start + step) % others) % len(prompts)
        strange = [w for w in keywords.usable(prompts[other]) if w.casefold() not in known]
        if len(strange) >= noise:
            drawn += draw.sample(strange, noise)
            draw.shuffle(drawn)
            return drawn
    return None


def paragraph_keywords(
    paragraph: str, count: int, seed: int, keywords: Keywords
) -> list[str] | None:
    """Keywords from which the generator is to make a new prompt: ``count`` of one paragraph (SynPO: 3).

    Returns:
        Different words in random order, a function of paragraph and seed; None where it has fewer.
    """
    return keywords.draw(paragraph, count, seed)


def check_corpus(path: Path, count: int, keywords: Keywords) -> None:
    """Raise where no paragraph of a corpus has ``count`` usable words; reads up to the first that has.

    Raises:
        FileNotFoundError, ValueError: as :func:`paragraphs`, and where no paragraph has enough.
    """
    number = 0
    for _, paragraph in paragraphs(path):
        if len(keywords.usable(paragraph)) >= count:
            return
        number += 1
    raise ValueError(f"corpus: {path} has no paragraph with {count} usable keywords (of {number})")


def paragraphs(path: Path, min_words: int = MIN_WORDS) -> Iterator[tuple[str, str]]:
    """(place, paragraph) of every paragraph of a corpus, in order; memory does not grow with their number.

    Args:
        path: UTF-8 text (``.txt``), or rows with a text in the column ``text`` (``.jsonl``, ``.ndjson``,
            ``.json``, ``.parquet``). Blank lines stand between paragraphs, in a row's text too.
        min_words: shorter paragraphs (headings, captions) are left out; words are what white space separates.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, text that is not UTF-8, a row without text, a paragraph of more than 1 MiB
            in a .txt file, or no paragraph at all; file and place are named.
    """
    found = False
    for where, paragraph in _all_paragraphs(path):
        if len(paragraph.split()) >= min_words:
            found = True
            yield where, paragraph
    if not found:
        raise ValueError(f"{path}: no paragraph of {min_words} words or more")


def _all_paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".txt":
        yield from _blocks(_lines(path), LONGEST)
        return
    if path.suffix not in (*JSON_SUFFIXES, ".parquet"):
        endings = ", ".join((".txt", *JSON_SUFFIXES, ".parquet"))
        raise ValueError(f"{path}: expected a file that ends in {endings}, got {path.suffix!r}")
    for where, row in read_rows(path):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: expected a text in the column 'text', got {type(text).__name__} "
                f"(the row has {', '.join(map(repr, row)) or 'nothing'})"
            )
        yield from _blocks((where, line) for line in text.splitlines())


def _blocks(
    lines: Iterable[tuple[str, str]], longest: int | None = None
) -> Iterator[tuple[str, str]]:
    """What stands between blank lines, with the place of its first line."""
    first, size = "", 0
    block: list[str] = []
    for where, line in lines:
        if not line.strip():
            if block:
                yield first, "\n".join(block)
            block, size = [], 0
            continue
        first = first if block else where
        block.append(line.rstrip("\r\n"))
        size += len(line)
        if longest is not None and size > longest:
            raise ValueError(
                f"{first}: a paragraph of more than {longest} characters; expected blank lines between them"
            )
    if block:
        yield first, "\n".join(block)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of a text file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    with path.open("rb") as file:
        for number in numbers(1):
            line = file.readline(LONGEST + 1)
            if not line:
                return
            where = f"{path}, line {number}"
            if len(line) > LONGEST:
                raise ValueError(f"{where}: a line of more than {LONGEST} bytes")
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not valid UTF-8 text: {error}") from error
