"""A task for self-improvement loops: put words into alphabetical order. A program checks every answer.

As in ``task`` the fine-tuning answers are careless, so the start knows how to order and often does not. The
given answers of the seeds are mostly right: better than the start, worse than what scoring can find.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fastpo.demo.task import Problem

WORDS = (
    "apple", "badger", "candle", "dolphin", "eagle", "feather", "garden", "hammer", "island", "jacket",
    "kettle", "lemon", "mirror", "needle", "orchid", "pepper", "quartz", "ribbon", "saddle", "tunnel",
)  # fmt: skip
ASKED = 4  # words of a prompt
CARELESS_SHARE = 0.6  # of the fine-tuning answers
WRONG_SEEDS_SHARE = 0.3  # of the given answers
# Sets of words: fine-tuning examples, seeds (with those held out), paragraphs of the corpus.
EXAMPLES, SEEDS, PARAGRAPHS = 19_200, 1536, 6000
LEARNING_RATE = 2e-3
GENERATOR = "prompt from {keywords}"
IMPROVER = "improve {question} draft {draft}"
_TAGS = ("<question>", "</question>", "<solution>", "</solution>")


def score(prompt: Any, response: str, row: Any = None) -> float:
    """1 for the right answer to a prompt of :func:`draw_word_problems`, 0 for any other."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    asked = text.removeprefix("order ").split()
    return float(bool(asked) and response.split() == sorted(asked))


def draw_word_problems(*counts: int, seed: int) -> list[list[Problem]]:
    """Sets of ``counts`` problems, no prompt twice in any of them."""
    rng = random.Random(f"words/{seed}")
    seen: set[str] = set()
    sets = []
    for count in counts:
        problems: list[Problem] = []
        while len(problems) < count:
            chosen = rng.sample(WORDS, ASKED)
            prompt = f"order {' '.join(chosen)}"
            if prompt not in seen:
                seen.add(prompt)
                problems.append(Problem(prompt, " ".join(sorted(chosen))))
        sets.append(problems)
    return sets


def annotate_words(
    problems: list[Problem], wrong_share: float, *, seed: int
) -> list[tuple[str, str]]:
    """(prompt, answer): ``wrong_share`` of the answers are backwards."""
    rng = random.Random(f"word annotators/{seed}/{wrong_share}")
    examples = []
    for problem in problems:
        answer = problem.answer
        if rng.random() < wrong_share:
            answer = " ".join(reversed(answer.split()))
        examples.append((problem.prompt, answer))
    return examples


def prepare_loop(directory: Path, seed: int, scale: float = 1.0) -> Path:
    """Write what the CPU recipes of ``fastpo iterate`` start from into ``directory``.

    ``model/``, fine-tuned on careless answers; ``seeds.jsonl``, prompts and given answers of which 30 % are
    wrong; ``corpus.txt``, paragraphs to draw keywords from; ``generator.txt`` and ``improver.txt``, SynPO's
    templates in the few words that the tokenizer knows.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``directory`` holds files, or ``scale`` is not positive.
    """
    from fastpo.demo.model import build_model, build_tokenizer
    from fastpo.demo.run import claim, log_to, one_thread
    from fastpo.demo.sft import fine_tune

    if not scale > 0:
        raise ValueError(f"scale: got {scale}, expected a number > 0")
    claim(directory)
    examples, seeds = draw_word_problems(
        *(max(16, round(scale * n)) for n in (EXAMPLES, SEEDS)), seed=seed
    )
    with one_thread():
        tokenizer = build_tokenizer(
            words=[*WORDS, "order", "prompt", "from", "improve", "draft", *_TAGS]
        )
        model = build_model(tokenizer, seed=seed)
        careless = annotate_words(examples, CARELESS_SHARE, seed=seed)
        fine_tune(model, tokenizer, careless, learning_rate=LEARNING_RATE)
    with log_to(directory / "prepare.log"):
        model.save_pretrained(directory / "model")
        tokenizer.save_pretrained(directory / "model")
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in annotate_words(seeds, WRONG_SEEDS_SHARE, seed=seed)
    ]
    (directory / "seeds.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    rng = random.Random(f"corpus/{seed}")
    paragraphs = [
        " ".join(rng.choice(WORDS) for _ in range(24))
        for _ in range(max(16, round(scale * PARAGRAPHS)))
    ]
    (directory / "corpus.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    (directory / "generator.txt").write_text(GENERATOR + "\n", encoding="utf-8")
    (directory / "improver.txt").write_text(IMPROVER + "\n", encoding="utf-8")
    return directory
