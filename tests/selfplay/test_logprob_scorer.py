"""The mean log-prob of answers: the ids of training, the numbers of a softmax over all logits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from fastpo.data import tokenize_examples
from fastpo.demo.model import build_model, build_tokenizer
from fastpo.selfplay.scorers import Candidates, ScorerError, ScorerSettings, make_scorer
from fastpo.selfplay.scorers.logprob import LogprobScorer

POSITIONS = 64


@pytest.fixture
def checkpoint(tmp_path: Path, seed: int) -> Path:
    """A tiny Llama of 64 positions whose logits are well away from zero."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = POSITIONS
    model = build_model(tokenizer, hidden_size=32, layers=2, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def mean_logprob(path: Path, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """(1/|y|) Σ log softmax(logits), alone in its forward, float64 from the logits on."""
    model = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(answer)[:, None]).mean().item()


def training_ids(
    tokenizer: PreTrainedTokenizerFast, row: Candidates, response: str
) -> tuple[list[int], list[int]]:
    """Prompt and completion of the example that has this answer."""
    completion = (
        response if isinstance(row.prompt, str) else [{"role": "assistant", "content": response}]
    )
    example = {**row.row, "prompt": row.prompt, "completion": completion}
    found, _ = tokenize_examples(datasets.Dataset.from_list([example]), tokenizer, max_length=None)
    return found[0]["prompt_ids"], found[0]["completion_ids"]


def scorer_of(path: Path, **options: Any) -> LogprobScorer:
    return LogprobScorer(str(path), dtype="float32", device="cpu", **options)


def scored(
    scorer: LogprobScorer,
    batches: Sequence[Sequence[Candidates]],
    counts: Counter[str] | None = None,
) -> dict[int, list[float] | None]:
    return dict(scorer.score(iter(batches), Counter() if counts is None else counts))


@pytest.fixture
def rows(seed: int) -> list[Candidates]:
    draw = random.Random(seed)

    def text(high: int) -> str:
        return "x" + "".join(draw.choice("abcdef gh") for _ in range(draw.randrange(high)))

    def prompt(k: int) -> Any:
        return text(9) if k % 2 else [{"role": "user", "content": text(9)}]

    return [
        Candidates(k, f"row {k}", prompt(k), [text(30) for _ in range(1 + k % 3)], {})
        for k in range(7)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_scores_are_mean_logprobs_of_the_ids_that_training_sees(
    checkpoint: Path, rows: list[Candidates], batch_size: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = scored(scorer_of(checkpoint, batch_size=batch_size), [rows[:4], rows[4:]])
    for row in rows:
        expected = []
        for response in row.responses:
            prompt, answer = training_ids(tokenizer, row, response)
            assert answer[-1] == tokenizer.eos_token_id
            expected.append(mean_logprob(checkpoint, prompt, answer))
        assert found[row.number] == pytest.approx(expected, abs=1e-5)


def test_template_settings_and_tools_of_the_row_count(checkpoint: Path) -> None:
    template = (
        "{% if tools %}{{ tools | length }}{% endif %}{{ mood }}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    scorer = scorer_of(checkpoint, chat_template=template)
    columns: dict[str, Any] = {"chat_template_kwargs": {"mood": "calm"}, "tools": [{"name": "f"}]}
    row = Candidates(0, "row 0", [{"role": "user", "content": "q"}], ["a"], columns)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = template
    prompt, answer = training_ids(tokenizer, row, "a")
    assert tokenizer.decode(prompt) == "1calm<user>q<assistant>"
    found = scored(scorer, [[row]])
    assert found[0] == pytest.approx([mean_logprob(checkpoint, prompt, answer)], abs=1e-5)


def test_the_order_of_rows_and_answers_changes_no_bit(
    checkpoint: Path, rows: list[Candidates]
) -> None:
    scorer = scorer_of(checkpoint, batch_size=3)
    found = scored(scorer, [rows])
    turned = [row._replace(responses=row.responses[::-1]) for row in rows[::-1]]
    assert {k: s[::-1] for k, s in scored(scorer, [turned]).items()} == found


@pytest.mark.parametrize("max_length", [None, 32])
def test_a_long_prompt_loses_its_beginning_but_not_bos(
    checkpoint: Path, max_length: int | None
) -> None:
    limit = max_length or POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    row = Candidates(0, "row 0", [{"role": "user", "content": "abcdefg" * 12}], ["yes", "no"], {})
    counts: Counter[str] = Counter()
    found = scored(scorer_of(checkpoint, max_length=max_length), [[row]], counts)
    expected = []
    for response in row.responses:
        prompt, answer = training_ids(tokenizer, row, response)
        room = limit - len(answer) - 1
        assert prompt[0] == tokenizer.bos_token_id
        expected.append(mean_logprob(checkpoint, prompt[:1] + prompt[-room:], answer))
    assert found[0] == pytest.approx(expected, abs=1e-5)
    assert counts == {"prompt_shortened": 1}


def test_what_training_drops_has_no_score(checkpoint: Path) -> None:
    fits = Candidates(0, "row 0", "p", ["y" * 14, "z"], {})
    long = Candidates(1, "row 1", "p", ["y", "y" * 15], {})  # with EOS 16 tokens: no room for p
    empty = Candidates(2, "row 2", "p", ["y", "  "], {})
    none = Candidates(3, "row 3", "p", [], {})
    counts: Counter[str] = Counter()
    found = scored(scorer_of(checkpoint, max_length=16), [[fits, long, empty, none]], counts)
    assert (found[1], found[2], found[3]) == (None, None, [])
    assert len(found[0]) == 2
    assert counts == {"too_long": 1, "empty_answer": 1}


def test_a_template_that_raises_is_counted(checkpoint: Path) -> None:
    row = Candidates(0, "row 0", [{"role": "user", "content": "q"}], ["a"], {})
    counts: Counter[str] = Counter()
    scorer = scorer_of(checkpoint, chat_template="{{ raise_exception('no') }}")
    assert scored(scorer, [[row]], counts) == {0: None}
    assert counts == {"template_error": 1}


def test_a_conversation_without_a_template_and_a_bad_column(checkpoint: Path) -> None:
    row = Candidates(0, "row 0", [{"role": "user", "content": "q"}], ["a"], {"tools": "{"})
    with pytest.raises(ScorerError, match=r"row 0: .*tools is not valid JSON"):
        scored(scorer_of(checkpoint), [[row]])
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(ScorerError, match=r"scorer\.chat_template: the prompt of row 0"):
        scored(scorer_of(checkpoint), [[row]])


def test_a_score_that_is_not_finite_stops_the_run(checkpoint: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(checkpoint)
    with pytest.raises(ScorerError, match=r"row 0: score of response 0 \(from 0\) is nan"):
        scored(scorer_of(checkpoint), [[Candidates(0, "row 0", "p", ["y"], {})]])


def test_no_logits_are_made(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward: Callable[..., Any] = LlamaForCausalLM.forward

    def watched(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        self.lm_head.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    scorer = scorer_of(checkpoint)
    row = Candidates(0, "row 0", "p" * 20, ["y" * 20], {})
    scored(scorer, [[row]])
    vocab = scorer.model.config.vocab_size
    assert shapes
    assert not [shape for shape in shapes if shape[-1] == vocab and shape[-2] > 3]  # but a probe


def test_settings_reach_it_and_a_loop_gives_its_own_model(checkpoint: Path) -> None:
    made = make_scorer(ScorerSettings(kind="logprob", batch_size=3), model=str(checkpoint))
    assert isinstance(made, LogprobScorer)
    assert (made.batch_rows, made.name) == (3, str(checkpoint))
    named = make_scorer(ScorerSettings(kind="logprob", model=str(checkpoint)), model="./other")
    assert named.identity() == made.identity()
    with pytest.raises(ValueError, match=r"scorer\.model: got None"):
        make_scorer(ScorerSettings(kind="logprob"))
