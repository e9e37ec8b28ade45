"""Which words of a text are keywords, what is drawn from them, and the paragraphs of a corpus."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpo.selfplay.keywords import (
    LONGEST,
    STOPWORDS,
    Keywords,
    paragraph_keywords,
    paragraphs,
    seed_keywords,
)

ENGLISH = Keywords()


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("", []),
        ("The of and but, or if: NOT!", []),
        # names: capitalised in the middle, only at the beginning, as a possessive, in a compound, an acronym
        ("The river Seine flows through Paris.", ["river", "flows"]),
        ("Whales sing. Sharks are silent; a shark hunts.", ["sing", "silent", "shark", "hunts"]),
        ("Newton's law, non-European trees, NASA rockets", ["law", "trees", "rockets"]),
        ("Ludwig van Beethoven composed", ["composed"]),
        # a name that is an ordinary word too counts where it is one
        ("Rose planted a rose. In May it may bloom.", ["planted", "rose", "bloom"]),
        # each word once, however it is written, at its first place in lower case
        ("A cat sees a dog; the dog and the Cat, the cat.", ["cat", "dog"]),
        ("Strange strasse, straße", ["strasse"]),
        # apostrophes: endings, contractions with and without one, typographic ones, quotes
        ("the dog's bone, the dogs' bones", ["dog", "bone", "dogs", "bones"]),
        ("they'll who'd we've it's don’t isn't dont", []),
        ("mother’ll bake 'sweet' rock'n'roll", ["mother", "bake", "sweet", "rock'n'roll"]),
        # hyphens and dashes
        ("a state-of-the-art up-to well-known x-ray", ["state-of-the-art", "x-ray"]),
        ("cheap--fast—good – old sea‑horse", ["cheap", "fast", "good", "old", "sea-horse"]),
        ("light-- -dark- soft\u00adware", ["light", "software"]),
        # too short, too long, digits
        (f"go ox {'a' * 31} {'b' * 30} 42 3.14 42nd covid19 h2o m² ½ zoo", ["b" * 30, "zoo"]),
        # addresses, paths, code, formulas, mark-up
        ("see https://example.org/cats or www.dogs.net, mail bob@site or ann@site.com", ["mail"]),
        ("run src/main.c and C:\\temp with --verbose #tag snake_case camelCase", ["run"]),
        ("call print(x) or exit() or list[int], std::sort, a=b, $price, {name}, e.g. f(x)", ["call"]),
        ("apply `hidden words` and ``more hidden`` here: ``` fenced code ``` after", ["apply"]),
        ("before\n```python\nimport numpy\n```\ngood\n```\nunclosed words", ["good"]),
        ("loud\n~~~\nhidden words\n~~~\nquiet", ["loud", "quiet"]),
        ("<b>bold</b> text <a href='x y'>link</a>", ["bold", "text", "link"]),
        ("**strong** *weak* (aside) [note] “quoted”.", ["strong", "weak", "aside", "note", "quoted"]),
        ("red,green,blue;", ["red", "green", "blue"]),
        # other scripts; two letters are enough where there are no capitals
        ("naïve cafe\u0301, café", ["naïve", "café"]),
        ("Пётр видит музей", ["видит", "музей"]),
        ("수학 문제, हिंदी भाषा", ["수학", "문제", "हिंदी", "भाषा"]),
        ("机器学习很有趣。ภาษาไทย カタカナ", []),
        ("ﬁnal ｗｉｄｅ zero\u200bwidth", ["final", "wide", "zero", "width"]),
    ],
)  # fmt: skip
def test_usable_words(text: str, usable: list[str]) -> None:
    assert ENGLISH.usable(text) == usable


WORDS = st.sampled_from(
    ["the", "The", "river", "River", "RIVER", "Paris", "don't", "mountain", "42", "x1", "of"]
    + ["light-house", "Mary's", "a.b"]
)


@given(st.lists(WORDS, max_size=12), st.sampled_from([" ", "  ", ", ", "\n", " – "]))
def test_every_usable_word_stands_there_in_lower_case_and_is_no_stop_word(
    words: list[str], between: str
) -> None:
    found = ENGLISH.usable(between.join(words))
    ordinary = ["river", "mountain", "light-house"]
    assert found == list(dict.fromkeys(word for word in words if word in ordinary))


@given(st.text(max_size=200))
def test_any_text_gives_distinct_words_in_lower_case_without_digits(text: str) -> None:
    found = ENGLISH.usable(text)
    assert len({word.casefold() for word in found}) == len(found)
    for word in found:
        assert word == word.lower()
        assert len(word) >= 2
        assert not re.search(r"[\d\s_@/\\]", word)
        assert ENGLISH.usable(word) == [word]


def test_long_texts_without_spaces_take_linear_time() -> None:
    # A pattern that went back over the text from every character would take a minute for each.
    start = time.process_time()
    for unit in ("a", "a.", "<a", "-", "`", "a(", "“", "学"):
        ENGLISH.usable(unit * 200_000)
    assert time.process_time() - start < 5  # 0.1 where it was written


def test_draw_is_a_function_of_text_and_seed() -> None:
    text = "iron, copper, silver and gold"
    assert ENGLISH.draw(text, 5, 0) is None
    assert sorted(ENGLISH.draw(text, 4, 0) or []) == ["copper", "gold", "iron", "silver"]
    assert ENGLISH.draw(text, 2, 7) == ENGLISH.draw(text, 2, 7)
    orders = Counter(tuple(ENGLISH.draw(text, 2, seed) or ()) for seed in range(600))
    assert len(orders) == 12  # every ordered pair of different words
    assert min(orders.values()) > 20  # of 50 expected


def test_paragraph_keywords_are_drawn_from_the_paragraph() -> None:
    text = "The smith forged an iron blade."
    assert paragraph_keywords(text, 3, 5, ENGLISH) == ENGLISH.draw(text, 3, 5)
    assert paragraph_keywords(text, 5, 5, ENGLISH) is None


# ---- Stop words ----


def test_the_shipped_list_has_every_kind_of_function_word() -> None:
    lines = STOPWORDS.read_text(encoding="utf-8").splitlines()
    words = [line for line in lines if line and not line.startswith("#")]
    assert len(words) >= 300
    assert len(set(words)) == len(words)
    assert all(word == word.lower().strip() and " " not in word for word in words)
    for kind in (
        "a an the", "i you he she it we they me him them my your their mine ours myself themselves",
        "am is are was were be been do does did has had can could will would shall should may must",
        "in on at by for with about against between into through before after above below to from of",
        "and or but because although while if unless whereas", "not very also just now here always",
        "don't isn't won't can't wouldn't", "two seven thousand", "who which that whose what",
    ):  # fmt: skip
        assert set(kind.split()) <= set(words), kind


def test_a_file_of_ones_own_replaces_the_list(tmp_path: Path) -> None:
    file = tmp_path / "german.txt"
    file.write_text(
        "\ufeff# deutsch\nund  # Bindewort\n\n Über \ngeht’s\nrot-weiß\n", encoding="utf-8"
    )
    words = Keywords(file).usable("über und rot-weiß, geht's! the dog schreiben")
    assert words == ["the", "dog", "schreiben"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\nof the\n", r"stop\.txt, line 2: expected one word, got 'of the'"),
        (b"the\n# f\xfcr\nof\n", r"stop\.txt, line 2: not valid UTF-8 text: .*0xfc"),
    ],
)
def test_a_bad_file_of_stop_words_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "stop.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Keywords(tmp_path / "stop.txt")


def test_a_missing_file_of_stop_words_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.txt'"):
        Keywords(tmp_path / "none.txt")


# ---- Seed keywords ----

PROMPTS = [
    "Describe iron and copper tools.",
    "Compare wheat with barley bread.",
    "Who is Bob?",  # none
    "Explain sonnets and novels.",
    "Explain copper, iron and tools.",  # nothing that row 0 lacks
]


def test_seed_keywords_are_two_of_the_prompt_and_one_of_another() -> None:
    own, sources = {"iron", "copper", "tools"}, Counter[str]()
    noise_places = Counter[int]()
    for seed in range(300):
        words = seed_keywords(PROMPTS, 0, seed, ENGLISH)
        assert words == seed_keywords(PROMPTS, 0, seed, ENGLISH)
        assert words is not None
        assert len(set(words)) == 3
        (noise,) = set(words) - own
        sources["wheat" if noise in ("wheat", "barley", "bread") else noise] += 1
        noise_places[words.index(noise)] += 1
    # The four others are drawn alike; row 2 has no word and row 4 no new one: rows 3 and 1 stand in for them.
    assert set(sources) == {"wheat", "sonnets", "novels"}
    assert 110 <= sources["wheat"] <= 190
    assert sources["sonnets"] >= 40 <= sources["novels"]
    assert all(70 <= noise_places[place] <= 130 for place in range(3))  # shuffled


def test_rows_draw_differently_with_one_seed() -> None:
    prompts = [
        f"iron copper silver gold {word}" for word in ("apple", "pear", "plum", "fig", "lime")
    ]
    lists = {tuple(seed_keywords(prompts, row, 0, ENGLISH) or ()) for row in range(5)}
    assert len(lists) == 5
    assert {word for words in lists for word in words} >= {"iron", "copper", "silver", "gold"}


class Column:
    """Prompts of a memory-mapped data set: a length and single items. Remembers which were read."""

    def __init__(self, length: int, word: str) -> None:
        self.length, self.word = length, word
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> str:
        self.read.append(row)
        letter = chr(97 + row % 26)
        return f"{self.word}{letter} {self.word}{letter * 2}"


def test_where_the_noise_comes_from_depends_on_seed_and_row_alone() -> None:
    sources = Counter[tuple[int, int]]()
    for seed in range(80):
        for row in range(5):
            reads = []
            for word in ("iron", "wheat"):
                prompts = Column(5, word)
                assert seed_keywords(prompts, row, seed, ENGLISH) is not None  # type: ignore[arg-type]
                reads.append(prompts.read)
            assert reads[0] == reads[1]
            own, other = reads[0]
            assert own == row
            sources[row, other] += 1
    assert set(sources) == {(row, other) for row in range(5) for other in range(5) if row != other}
    assert min(sources.values()) >= 8  # of 20 expected


def test_single_prompts_are_read_not_all() -> None:
    prompts = Column(100_000, "iron")
    assert seed_keywords(prompts, 7, 0, ENGLISH) is not None  # type: ignore[arg-type]
    assert len(prompts.read) <= 4


@pytest.mark.parametrize(
    ("prompts", "row"),
    [
        (PROMPTS, 2),  # no word of its own
        (["iron only", "wheat barley"], 0),  # one word of its own
        (["iron copper"], 0),  # no other row
        (["iron copper", "Who?", "copper iron"], 0),  # no other row with another word
    ],
)
def test_no_list_without_enough_words(prompts: list[str], row: int) -> None:
    assert seed_keywords(prompts, row, 0, ENGLISH) is None


def test_numbers_of_own_and_noise_words() -> None:
    prompts = [*PROMPTS, "only bronze", "bronze or gold"]
    for seed in range(20):
        words = seed_keywords(prompts, 1, seed, ENGLISH, own=2, noise=2)
        assert words is not None
        assert len(set(words)) == 4
        assert len({"wheat", "barley", "bread"} & set(words)) == 2


def test_the_one_row_that_has_noise_is_always_found() -> None:
    for row in range(1, 6):
        prompts = ["wheat barley", *["Who?"] * 5]
        prompts[row] = "iron copper"
        for seed in range(12):
            words = seed_keywords(prompts, row, seed, ENGLISH)
            assert words is not None
            assert len({"wheat", "barley"} & set(words)) == 1


# ---- Corpus ----

TEXT = "one two three\nfour five\n\n \t\nsix seven eight nine\n\n\nten eleven\n\ntwelve thirteen fourteen\n"


def as_text(path: Path) -> None:
    path.write_text(TEXT)


def as_rows(path: Path) -> None:
    rows = [{"text": TEXT[: TEXT.index("ten")], "id": 1}, {"text": TEXT[TEXT.index("ten") :]}]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "write", "places"),
    [
        ("c.txt", as_text, ["line 1", "line 5", "line 10"]),
        ("c.jsonl", as_rows, ["line 1", "line 1", "line 2"]),
        ("c.ndjson", as_rows, ["line 1", "line 1", "line 2"]),
        ("c.json", as_rows, ["row 0 (from 0)", "row 0 (from 0)", "row 1 (from 0)"]),
        ("c.parquet", as_rows, ["row 0 (from 0)", "row 0 (from 0)", "row 1 (from 0)"]),
    ],
)
def test_every_form_of_a_corpus_gives_its_paragraphs(
    name: str, write: Callable[[Path], None], places: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    found = list(paragraphs(path, min_words=3))
    assert [text for _, text in found] == [
        "one two three\nfour five",
        "six seven eight nine",
        "twelve thirteen fourteen",
    ]
    assert [where for where, _ in found] == [f"{path}, {place}" for place in places]


def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffuné deux\r\ntrois\r\n\r\nquatre cinq six".encode())
    assert [text for _, text in paragraphs(path, 2)] == ["uné deux\ntrois", "quatre cinq six"]


def test_short_paragraphs_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\n\n".join(" ".join(["word"] * n) for n in (19, 20, 21)))
    assert [len(text.split()) for _, text in paragraphs(path)] == [20, 21]


def write_text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def invalid_parquet(path: Path) -> Path:
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ab\xff\xfe")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, buffers)}), path)
    return path


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("c.txt", lambda p: write_text(p, b""), r"c\.txt: no paragraph of 2 words or more"),
    ("c.txt", lambda p: write_text(p, b"one\n\ntwo\n\n"), r"no paragraph of 2 words or more"),
    ("c.jsonl", lambda p: write_text(p, b""), r"c\.jsonl: no paragraph of 2 words or more"),
    ("c.txt", lambda p: write_text(p, b"a b\n\nc \xe9 d\n"),
     r"c\.txt, line 3: not valid UTF-8 text: .*0xe9"),
    ("c.jsonl", lambda p: write_text(p, b'{"text": "a b"}\n{"text": "\xe9"}\n'),
     r"c\.jsonl, line 2: not valid UTF-8 text"),
    ("c.parquet", invalid_parquet,
     r"c\.parquet, row 0 .*not UTF-8: .*0xff"),
    ("c.jsonl", lambda p: write_text(p, b'{"text": "a b"}\n{"content": "c d", "id": 1}\n'),
     r"c\.jsonl, line 2: expected a text in the column 'text', got NoneType \(the row has 'content', 'id'\)"),
    ("c.jsonl", lambda p: write_text(p, b'{"text": ["a"]}\n'), r"line 1: .* 'text', got list"),
    ("c.jsonl", lambda p: write_text(p, b"a b\n"), r"c\.jsonl, line 1: not valid JSON"),
    ("c.txt", lambda p: write_text(p, b"x\n\n" + b"a b c d\n" * (LONGEST // 8 + 1)),
     r"c\.txt, line 3: a paragraph of more than 1048576 characters; expected blank lines between"),
    ("c.txt", lambda p: write_text(p, b"x y\n" + b"a" * (LONGEST + 1)),
     r"c\.txt, line 2: a line of more than 1048576 bytes"),
    ("c.csv", lambda p: write_text(p, b"a,b\n"),
     r"c\.csv: expected a file that ends in \.txt, \.jsonl, \.ndjson, \.json, \.parquet, got '\.csv'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "message"), BAD, ids=range(len(BAD)))
def test_a_bad_corpus_is_named_with_the_place(
    name: str, write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        list(paragraphs(tmp_path / name, min_words=2))


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_a_missing_corpus_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no file '.*{name}'"):
        next(paragraphs(tmp_path / name))


def test_the_largest_paragraph_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(b"a b c d\n" * (LONGEST // 8) + b"\ne f\n")
    assert [len(text) for _, text in paragraphs(path, 2)] == [LONGEST - 1, 3]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_corpus(suffix: str, tmp_path: Path) -> None:
    path, text = tmp_path / f"c{suffix}", "word " * 60
    if suffix == ".txt":
        path.write_text(f"{text}\n\n" * 20_000)
    elif suffix == ".jsonl":
        path.write_text(f'{{"text": "{text}"}}\n' * 20_000)
    else:
        pq.write_table(pa.table({"text": [f"{k} {text}" for k in range(20_000)]}), path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in paragraphs(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000  # 6 MB
    assert peak < 2e6
