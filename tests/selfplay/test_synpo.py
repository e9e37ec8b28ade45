"""SynPO's own stages, one by one, as functions and as commands, with an engine that follows a script."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from selfplay_files import ScriptedEngine, read_jsonl, write_jsonl

from fastpo.cli import main
from fastpo.selfplay import generate as generate_module
from fastpo.selfplay.engines import Refused
from fastpo.selfplay.manifest import load_manifest
from fastpo.selfplay.synpo import (
    PromptsConfig,
    generator_examples,
    improver_examples,
    keyword_lists,
    make_prompts,
)

SEEDS = {
    "Describe a quiet garden beside the river": "Green.",
    "Compare a wooden bridge with a stone bridge": "Stone lasts.",
    "Why?": "Because.",
    "Explain the tag <question> in a document": "It begins a question.",
}
FILLER = " and the" * 10  # a paragraph has 20 words at least; these are no keywords
OPTIONS: dict[str, Any] = {"chat": False, "stopwords": None, "template": None}


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    rows = [{"prompt": p, "completion": c} for p, c in SEEDS.items()]
    return write_jsonl(tmp_path / "seeds.jsonl", rows)


def test_examples_for_the_generator(seeds: Path, tmp_path: Path) -> None:
    output = tmp_path / "examples.jsonl"
    manifest = generator_examples(seeds, output, seed=1, **OPTIONS)
    rows = read_jsonl(output)
    # "Why?" has no two keywords, and what holds a tag itself could not be read back.
    assert manifest.counts == {"in": 4, "out": 2, "few_keywords": 1, "holds_tags": 1}
    for row, (prompt, answer) in zip(rows, list(SEEDS.items())[:2], strict=True):
        assert row["completion"] == (
            f"<question>\n{prompt}\n</question>\n<solution>\n{answer}\n</solution>"
        )
        (line,) = [ln for ln in row["prompt"].splitlines() if ln.startswith("Keywords: ")]
        words = line.removeprefix("Keywords: ").split(", ")
        own = [word for word in words if word in prompt.lower()]
        assert (len(words), len(own)) == (3, 2)
        other = (set(words) - set(own)).pop()
        assert any(other in p.lower() for p in SEEDS if p != prompt)


def test_no_seed_with_keywords_is_an_error(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "seeds.jsonl", [{"prompt": "Why?", "completion": "So."}] * 3)
    with pytest.raises(ValueError, match=r"no prompt of .*seeds\.jsonl has two usable keywords"):
        generator_examples(rows, tmp_path / "examples.jsonl", seed=1, **OPTIONS)


def test_examples_for_the_improver_are_those_that_the_given_answer_wins(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "A", "responses": ["x"], "scores": [0.1], "completion_score": 0.5},
        {"prompt": "b", "completion": "B", "responses": ["y"], "scores": [0.3], "completion_score": 0.5},
        {"prompt": "c", "completion": "C", "responses": ["z"], "scores": [0.9], "completion_score": 0.5},
    ]  # fmt: skip
    scored = write_jsonl(tmp_path / "scored.jsonl", rows)
    output = tmp_path / "improver.jsonl"
    manifest = improver_examples(scored, output, chat=False, threshold=0.2, template=None)
    (row,) = read_jsonl(output)
    assert row["completion"] == "A"
    assert "Question:\na\n" in row["prompt"]
    assert "Draft:\nx\n" in row["prompt"]
    assert manifest.counts["small_gap"] == 2
    with pytest.raises(
        ValueError, match=r"threshold: in .* better than the model's own by more than 0\.4"
    ):
        improver_examples(scored, tmp_path / "none.jsonl", chat=False, threshold=0.4, template=None)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    held: dict[str, Any] = {}
    monkeypatch.setattr(
        generate_module, "make_engine", lambda settings, model=None: ScriptedEngine(held["say"])
    )
    return held


def test_prompts_command(
    script: dict[str, Any], seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paragraphs = [
        "lantern meadow harbour",
        "lantern meadow",
        "cellar orchard thunder",
        "copper velvet marble",
    ]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(p + FILLER for p in paragraphs) + "\n")
    known = next(iter(SEEDS))

    def say(prompt: Any) -> list[str]:
        if "lantern" in prompt:
            return ["<question>What does a lantern do?</question><solution>Shine.</solution>"]
        return [f"<question>{known}</question>" if "cellar" in prompt else "no tags at all"]

    script["say"] = say
    output = tmp_path / "prompts.jsonl"
    argv = [
        "prompts",
        "--corpus",
        str(corpus),
        "--output",
        str(output),
        "--count",
        "10",
        "--model",
        "m",
    ]
    argv += ["--known_prompts", str(seeds), "--chat", "false"]
    assert main(argv) == 0
    (row,) = read_jsonl(output)
    assert row["prompt"] == "What does a lantern do?"
    assert sorted(row["keywords"]) == ["harbour", "lantern", "meadow"]
    counts = load_manifest(output).counts
    assert counts == {"in": 3, "out": 1, "known_prompt": 1, "unparsable": 1}
    lists = load_manifest(tmp_path / "prompts.keywords.jsonl").counts
    assert (lists["in"], lists["out"], lists["few_keywords"]) == (4, 3, 1)

    assert "3 keyword lists of 10 asked for" in capsys.readouterr().err
    corpus.write_text(f"lantern meadow{FILLER}\n")
    other = [a if a != str(output) else str(tmp_path / "other.jsonl") for a in argv]
    assert main(other) == 2
    assert "has no paragraph with 3 usable keywords (of 1)" in capsys.readouterr().err
    corpus.write_text("\n\n")
    assert main(other) == 2
    assert "corpus" in capsys.readouterr().err


def test_improve_command(script: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"prompt": "first", "responses": ["draft one", "not this"], "kept": 7},
        {"prompt": "second", "responses": ["draft two"]},
    ]
    source = write_jsonl(tmp_path / "drafts.jsonl", rows)
    script["say"] = lambda p: ["better"] if "draft one" in p else Refused("prompt_too_long")
    output = tmp_path / "improved.jsonl"
    template = tmp_path / "mine.txt"
    template.write_text("{question} / {draft}\n")
    argv = ["improve", "--responses", str(source), "--output", str(output), "--model", "m"]
    assert main([*argv, "--template", str(template), "--chat", "false"]) == 0
    (row,) = read_jsonl(output)
    assert row == {
        "prompt": "first", "kept": 7, "draft": "draft one", "responses": ["better"], "finish_reasons": ["stop"],
    }  # fmt: skip
    manifest = json.loads((tmp_path / "improved.jsonl.manifest.json").read_text())
    assert manifest["counts"]["prompt_too_long"] == 1
    assert manifest["settings"]["template"] == "{question} / {draft}"


WORDS = [
    "lantern",
    "meadow",
    "harbour",
    "cellar",
    "orchard",
    "thunder",
    "copper",
    "velvet",
    "marble",
    "saddle",
]


def lists(corpus: Path, output: Path, count: int, seed: int) -> list[list[str]]:
    keyword_lists(PromptsConfig(str(corpus), str(output), count, seed=seed), output)
    return [row["keywords"] for row in read_jsonl(output)]


def test_every_paragraph_has_a_draw_of_its_own(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join([" ".join(WORDS) + FILLER] * 8))
    first = lists(corpus, tmp_path / "first.jsonl", 8, 0)
    assert len({tuple(keywords) for keywords in first}) > 4  # of 720
    assert lists(corpus, tmp_path / "other.jsonl", 8, 1) != first


def test_paragraphs_are_drawn_by_the_seed(tmp_path: Path) -> None:
    """Of paragraphs that have three keywords each, which ones are drawn shows in the words alone."""
    three = [sorted(words) for words in itertools.combinations(WORDS, 3)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(words) + FILLER for words in three))
    drawn = []
    for number, seed in enumerate((0, 0, 1, 2)):
        made = lists(corpus, tmp_path / f"{number}.jsonl", 10, seed)
        drawn.append([three.index(sorted(keywords)) for keywords in made])
        assert drawn[-1] == sorted(drawn[-1])
    assert drawn[0] == drawn[1]
    assert len({tuple(numbers) for numbers in drawn}) == 3


def test_a_file_that_was_not_scored_with_completion_is_named(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "A", "responses": ["x"], "scores": [0.1]}
    scored = write_jsonl(tmp_path / "scored.jsonl", [row])
    with pytest.raises(ValueError, match=r"scored\.jsonl, line 1: no 'completion_score'"):
        improver_examples(scored, tmp_path / "o.jsonl", chat=False, threshold=0, template=None)


def test_known_prompts_that_are_not_there_are_named(tmp_path: Path) -> None:
    output = str(tmp_path / "p.jsonl")
    with pytest.raises(FileNotFoundError, match=r"known_prompts: no file 'nope\.jsonl'"):
        make_prompts(PromptsConfig("c.txt", output, 1, known_prompts=["nope.jsonl"]))
