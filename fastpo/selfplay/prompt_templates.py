"""SynPO's two prompts, text files with named placeholders, and the tagged form of what its generator writes.

Dong et al., ICLR 2025, arXiv 2410.06961: a *prompt generator* is asked to "design one question and its
solution" from keywords, a *response improver* to "improve this answer". The wording in ``templates/`` is
fastpo's own; a file of the user's with the same placeholders takes its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TEMPLATES = Path(__file__).with_name("templates")


class TemplateFile(NamedTuple):
    """A template that comes with fastpo."""

    name: str  # of its file in templates/
    placeholders: tuple[str, ...]  # that it must have, and a file that replaces it too


GENERATOR_TEMPLATE = TemplateFile("keywords_to_prompt.txt", ("keywords",))
IMPROVER_TEMPLATE = TemplateFile("improve.txt", ("question", "draft"))

# {word} that could be meant as a placeholder. LaTeX's \frac{a}{b} and x_{max} could not.
_PLACEHOLDER = re.compile(r"(?<![\w\\}^]){([a-z][a-z0-9_]*)}")


class Template:
    """A text with placeholders: names in braces, each of them at least once.

    All other braces are left alone: ``{}``, ``{"a": 1}``, ``{ x }``, ``\\frac{a}{b}``. Blank lines at the
    beginning and the end do not count.

    Args:
        path: UTF-8 text file.
        placeholders: the names that it must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not UTF-8, lacks a placeholder or has one of another name.
    """

    def __init__(self, path: Path, placeholders: Sequence[str]) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"template: no file {str(path)!r}")
        try:
            self.text = path.read_text(encoding="utf-8-sig").strip("\n")
        except UnicodeDecodeError as error:
            line = path.read_bytes()[: error.start].count(b"\n") + 1
            raise ValueError(f"{path}, line {line}: not valid UTF-8 text: {error}") from error
        expected = ", ".join(f"{{{name}}}" for name in placeholders)
        for name in placeholders:
            if f"{{{name}}}" not in self.text:
                raise ValueError(f"{path}: no placeholder {{{name}}}; expected {expected}")
        for found in _PLACEHOLDER.finditer(self.text):
            if found[1] not in placeholders:
                line = self.text.count("\n", 0, found.start()) + 1
                raise ValueError(
                    f"{path}: unknown placeholder {found[0]} in line {line} of the text; expected {expected}"
                )
        self.path, self.placeholders = path, tuple(placeholders)
        self._declared = re.compile("{(" + "|".join(map(re.escape, placeholders)) + ")}")

    def fill(self, **values: str) -> str:
        """The text with a value for every placeholder. What looks like a placeholder in a value stays as it is.

        Raises:
            ValueError: a value is missing, or one is given that the template has no place for.
        """
        for name in (*self.placeholders, *values):
            if (name in self.placeholders) != (name in values):
                what = "no value for" if name in self.placeholders else "unknown"
                raise ValueError(f"{self.path}: {what} placeholder {{{name}}}")
        return self._declared.sub(lambda found: values[found[1]], self.text)


def load_template(path: str | Path | None, shipped: TemplateFile) -> Template:
    """The template in the user's file ``path``, or fastpo's own.

    Raises:
        FileNotFoundError, ValueError: as :class:`Template`.
    """
    file = TEMPLATES / shipped.name if path is None else Path(path)
    return Template(file, shipped.placeholders)


def generator_prompt(keywords: Sequence[str], template: Template) -> str:
    """What the prompt generator is asked for these keywords."""
    return template.fill(keywords=", ".join(keywords))


def generator_target(question: str, solution: str) -> str:
    """What the prompt generator is to answer: question and solution, tagged.

    :func:`parse_generated` reads it back, unless one of them is empty or holds such a tag itself.
    """
    return (
        f"<question>\n{question.strip()}\n</question>\n<solution>\n{solution.strip()}\n</solution>"
    )


_TAG = re.compile("</?(?:question|solution)>")
_TAGGED = (
    ["<question>", "</question>"],
    ["<question>", "</question>", "<solution>"],  # cut off in the solution
    ["<question>", "</question>", "<solution>", "</solution>"],
)


def parse_generated(text: str) -> tuple[str, str] | None:
    """Question and solution in what the generator wrote.

    Returns:
        Both without white space around them; the solution is empty where there is none or it was cut off. None
        where there is not exactly one question, it is empty, or tags stand elsewhere than in
        :func:`generator_target`. Text outside the tags is ignored.
    """
    tags = list(_TAG.finditer(text))
    if [tag[0] for tag in tags] not in _TAGGED:
        return None
    question = text[tags[0].end() : tags[1].start()].strip()
    solution = text[tags[2].end() : tags[3].start()].strip() if len(tags) == 4 else ""
    return (question, solution) if question else None


def improver_prompt(question: str, draft: str, template: Template) -> str:
    """What the improver is asked for a question and a draft of its answer."""
    return template.fill(question=question, draft=draft)
