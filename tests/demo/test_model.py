"""The demo's tokenizer and model, its fine-tuning and its scoring."""

from __future__ import annotations

import string
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpo.demo.model import build_model, build_tokenizer
from fastpo.demo.sft import _batches, answer, exact_match, fine_tune
from fastpo.demo.task import draw_problems


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_printable_character_survives_and_others_become_unk(tokenizer) -> None:
    text = string.printable[:95] + "\n"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(set(ids)) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer("aé").input_ids == [tokenizer("a").input_ids[0], tokenizer.unk_token_id]


def test_the_template_writes_bos_once_and_eos_after_the_answer(tokenizer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "sort 21"},
        {"role": "assistant", "content": "12"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<bos><system>s<user>sort 21<assistant>12<eos>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 5 + len("s") + len("sort 21") + len("12")


def test_default_size_seed_and_random_state(tokenizer) -> None:
    state = torch.get_rng_state()
    model = build_model(tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000
    again, other = build_model(tokenizer, seed=3), build_model(tokenizer, seed=4)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 8, got 20"):
        build_model(tokenizer, hidden_size=20)


def test_saved_model_and_tokenizer_load(tokenizer, tmp_path) -> None:
    model = build_model(tokenizer, hidden_size=16, layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    weights = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_fine_tuning_teaches_the_answers(tokenizer, seed: int) -> None:
    """A model that has gone through the same four problems a thousand times knows them."""
    model = build_model(tokenizer, hidden_size=64, layers=1, seed=seed)
    (problems,) = draw_problems(4, seed=seed)
    assert exact_match(model, tokenizer, problems) == 0.0
    fine_tune(model, tokenizer, [(p.prompt, p.answer) for p in problems] * 16 * 60)
    assert exact_match(model, tokenizer, problems) == 1.0
    assert answer(model, tokenizer, problems) == [p.answer for p in problems]


def test_only_answers_are_trained_on(tokenizer) -> None:
    examples = [("sort 312", "123"), ("sort 5", "5")]
    ((input_ids, labels),) = _batches(tokenizer, examples, "cpu")
    texts = [tokenizer.decode(row[row != tokenizer.pad_token_id]) for row in input_ids]
    assert texts == ["<bos><user>sort 312<assistant>123<eos>", "<bos><user>sort 5<assistant>5<eos>"]
    for row, row_labels, scored in zip(input_ids, labels, ("123<eos>", "5<eos>"), strict=True):
        positions = (row_labels != -100).nonzero()[:, 0]
        assert tokenizer.decode(row_labels[positions]) == scored
        assert torch.equal(row_labels[positions], row[positions + 1])  # the next token's id


def test_exact_match_counts_whole_answers(tokenizer, monkeypatch) -> None:
    (problems,) = draw_problems(4, seed=0)
    replies = [
        problems[0].answer,
        problems[1].answer + "0",
        problems[2].answer[:-1],
        problems[3].answer,
    ]
    monkeypatch.setattr("fastpo.demo.sft.answer", lambda *_: replies)
    assert exact_match(SimpleNamespace(), tokenizer, problems) == 0.5


def test_answers_do_not_depend_on_the_batch_and_samples_repeat(tokenizer, monkeypatch) -> None:
    model = build_model(tokenizer, hidden_size=32, layers=1).eval()
    (problems,) = draw_problems(6, seed=1)
    problems[2] = type(problems[2])("sort 9", "9")  # a shorter prompt is padded on the left
    together = answer(model, tokenizer, problems)
    monkeypatch.setattr("fastpo.demo.sft.ANSWER_BATCH", 1)
    assert answer(model, tokenizer, problems) == together
    state = torch.get_rng_state()
    drawn = answer(model, tokenizer, problems, sample_seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn == answer(model, tokenizer, problems, sample_seed=5)
    assert drawn != answer(model, tokenizer, problems, sample_seed=6)
