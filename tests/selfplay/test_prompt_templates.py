"""Templates with placeholders, and the tagged form of generated questions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastpo.selfplay.prompt_templates import (
    GENERATOR_TEMPLATE,
    IMPROVER_TEMPLATE,
    Template,
    TemplateFile,
    generator_prompt,
    generator_target,
    improver_prompt,
    load_template,
    parse_generated,
)


def template(tmp_path: Path, text: str | bytes, *placeholders: str) -> Template:
    path = tmp_path / "mine.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Template(path, placeholders)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("Q: {question}", "Q: <q>"),
        ("\n{question}, {question}{draft}\n\n", "<q>, <q><d>"),
        ("x{question}", "x<q>"),
        # braces that are no placeholders
        ('{question} {} {"a": 1} { draft } {Draft}', '<q> {} {"a": 1} { draft } {Draft}'),
        ("{question} {0} {a-b} {{", "<q> {0} {a-b} {{"),
        ("{question} \\frac{a}{b} x_{max} y^{n}", "<q> \\frac{a}{b} x_{max} y^{n}"),
        ("{{question}}", "{<q>}"),
        ("\ufeff{question}", "<q>"),
    ],
)  # fmt: skip
def test_declared_placeholders_are_filled_and_other_braces_left(
    text: str, filled: str, tmp_path: Path
) -> None:
    if "{draft}" in text:
        made = template(tmp_path, text, "question", "draft").fill(question="<q>", draft="<d>")
    else:
        made = template(tmp_path, text, "question").fill(question="<q>")
    assert made == filled


def test_values_are_not_looked_into(tmp_path: Path) -> None:
    filled = template(tmp_path, "{a} {b}", "a", "b").fill(a="{b} \\1 \\g<0>", b="{a}")
    assert filled == "{b} \\1 \\g<0> {a}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question}\n", r"mine\.txt: no placeholder \{draft\}; expected \{question\}, \{draft\}"),
        (
            "{question} {draft}\n\n{answer}",
            r"mine\.txt: unknown placeholder \{answer\} in line 3 of the text; expected \{question\}, ",
        ),
        (b"{question}\n{draft} caf\xe9\n", r"mine\.txt, line 2: not valid UTF-8 text: .*0xe9"),
        ("", r"no placeholder \{question\}"),
    ],
)
def test_a_bad_template_is_named(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        template(tmp_path, text, "question", "draft")


def test_a_missing_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"template: no file '.*none\.txt'"):
        load_template(str(tmp_path / "none.txt"), IMPROVER_TEMPLATE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "q"}, r"mine\.txt: no value for placeholder \{draft\}"),
        (
            {"question": "q", "draft": "d", "topic": "t"},
            r"mine\.txt: unknown placeholder \{topic\}",
        ),
    ],
)
def test_values_have_to_match_the_placeholders(
    values: dict[str, str], message: str, tmp_path: Path
) -> None:
    made = template(tmp_path, "{question} {draft}", "question", "draft")
    with pytest.raises(ValueError, match=message):
        made.fill(**values)


@pytest.mark.parametrize("shipped", [GENERATOR_TEMPLATE, IMPROVER_TEMPLATE])
def test_shipped_templates_have_their_placeholders_once(shipped: TemplateFile) -> None:
    text = load_template(None, shipped).text
    assert text
    for name in shipped.placeholders:
        assert text.count(f"{{{name}}}") == 1
    assert not text.endswith("\n")


def test_the_generator_is_told_the_form_that_is_parsed() -> None:
    prompt = generator_prompt(["iron", "wheat", "music"], load_template(None, GENERATOR_TEMPLATE))
    assert "iron, wheat, music" in prompt
    assert "{" not in prompt
    assert parse_generated(prompt) == ("the question", "its solution")


def test_the_improver_is_shown_question_and_draft() -> None:
    prompt = improver_prompt("Why {draft}?", "Because.", load_template(None, IMPROVER_TEMPLATE))
    assert prompt.index("Why {draft}?") < prompt.index("Because.")
    assert prompt.count("Because.") == 1


def test_a_file_of_ones_own_replaces_a_template(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Aus {keywords}!")
    own = load_template(tmp_path / "mine.txt", GENERATOR_TEMPLATE)
    assert generator_prompt(["Eisen", "Brot"], own) == "Aus Eisen, Brot!"


Q, S = "<question>{}</question>", "<solution>{}</solution>"


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (Q.format(" a\nb ") + "\n" + S.format("\nc\n"), ("a\nb", "c")),
        (Q.format("a"), ("a", "")),
        (Q.format("a") + "<solution>\ncut of", ("a", "")),
        (Q.format("a") + S.format(" "), ("a", "")),
        ("Sure! " + Q.format("a") + " so: " + S.format("b") + " Done.", ("a", "b")),
        (Q.format("a <Question> b"), ("a <Question> b", "")),
        ("", None),
        ("a plain text", None),
        (Q.format(" \n ") + S.format("b"), None),  # empty
        ("<question>a", None),  # cut off in the question
        ("a</question>", None),
        ("</question>a<question>", None),
        (Q.format("a") + Q.format("b"), None),  # two questions
        (Q.format("a") + S.format("b") + Q.format("c") + S.format("d"), None),
        (Q.format("a") + S.format("b") + S.format("c"), None),
        (S.format("b") + Q.format("a"), None),
        (Q.format("a" + S.format("b")), None),
        (Q.format("a<question>b"), None),
        (Q.format("a") + "b</solution>", None),
        ("<Question>a</Question>", None),
        ("< question >a</ question >", None),
    ],
)
def test_only_one_whole_question_is_taken(text: str, parsed: tuple[str, str] | None) -> None:
    assert parse_generated(text) == parsed


TEXTS = st.text(st.sampled_from("ab \n<>/questionsolution{}"), max_size=40)


@given(TEXTS, TEXTS)
@example("a</question>", "b")
@example("a", "<solution>")
@example(" ", "b")
def test_what_is_tagged_is_read_back_or_refused(question: str, solution: str) -> None:
    read = parse_generated(generator_target(question, solution))
    tags = ("<question>", "</question>", "<solution>", "</solution>")
    if not question.strip() or any(tag in question + "\n" + solution for tag in tags):
        assert read is None
    else:
        assert read == (question.strip(), solution.strip())
