"""Reward models: scores of batches against one forward each, what is cut, and checkpoints that are refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fastpo.demo.model import build_tokenizer
from fastpo.selfplay.scorers import Candidates, ScorerError, ScorerSettings, make_scorer
from fastpo.selfplay.scorers.reward_model import RewardModel
from fastpo.selfplay.scorers.sequences import score_inputs

Checkpoint = Callable[..., Path]


def one_by_one(path: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The logit of each sequence, alone in its forward."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, 0].item() for ids in sequences]


def rendered(path: Path, row: Candidates) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        tokenizer.apply_chat_template(
            [*row.prompt, {"role": "assistant", "content": text}], return_dict=False
        )
        for text in row.responses
    ]


@pytest.fixture
def checkpoint(tmp_path: Path, seed: int) -> Checkpoint:
    """``checkpoint(labels, pad)``: a tiny Llama with a head; without ``pad`` neither model nor tokenizer names
    a pad token.
    """

    def make(labels: int = 1, pad: bool = True, name: str = "rm", **options: Any) -> Path:
        tokenizer = build_tokenizer()
        if not pad:
            tokenizer.pad_token = None
        torch.manual_seed(seed)
        config = llama_config(tokenizer, num_labels=labels, **options)
        model = LlamaForSequenceClassification(config)
        with torch.no_grad():
            model.score.weight.mul_(50)  # scores well apart
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def llama_config(tokenizer: PreTrainedTokenizerFast, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


@pytest.fixture
def encoder(tmp_path: Path, seed: int) -> Path:
    """A tiny RoBERTa of 40 positions whose tokenizer puts <bos> and <eos> around a text, and has no limit."""
    tokenizer = build_tokenizer()
    bos, eos = ("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[bos, eos]
    )
    tokenizer.model_max_length = int(1e30)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40 + tokenizer.pad_token_id + 1,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    torch.manual_seed(seed)
    model = RobertaForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(50)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def conversations(n: int, seed: int, responses: int = 3) -> list[Candidates]:
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high)))

    return [
        Candidates(
            k,
            f"row {k}",
            [{"role": "user", "content": words(1, 20)}],
            [words(1, 40) for _ in range(responses)],
            {},
        )
        for k in range(n)
    ]


def scored(
    scorer: Any, batches: Sequence[Sequence[Candidates]], counts: Counter[str] | None = None
) -> dict[int, list[float]]:
    return dict(scorer.score(iter(batches), Counter() if counts is None else counts))


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batches_give_what_single_forwards_give(
    checkpoint: Checkpoint, pad: bool, batch_size: int, seed: int
) -> None:
    """Also where no pad token is named and EOS, which ends every text here, is the stand-in."""
    path, rows = checkpoint(pad=pad), conversations(7, seed)
    scorer = RewardModel(str(path), batch_size=batch_size, dtype="float32", device="cpu")
    found = scored(scorer, [rows[:4], rows[4:]])
    for row in rows:
        expected = one_by_one(path, rendered(path, row))
        assert found[row.number] == pytest.approx(expected, abs=2e-5)
        assert len(set(expected)) == 3


def test_plain_text_in_an_encoder_with_the_tokenizers_own_special_tokens(
    encoder: Path, seed: int
) -> None:
    rows = [
        Candidates(0, "row 0", "what is it? ", ["a cat", "the longest answer"], {}),
        Candidates(1, "row 1", "", ["c"], {}),
    ]
    scorer = RewardModel(str(encoder), dtype="float32", device="cpu")
    found = scored(scorer, [rows])
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for row in rows:
        ids = [tokenizer(row.prompt + text)["input_ids"] for text in row.responses]
        assert ids[0][0] == tokenizer.bos_token_id
        assert ids[0][-1] == tokenizer.eos_token_id
        assert found[row.number] == pytest.approx(one_by_one(encoder, ids), abs=2e-5)


def test_the_order_of_rows_and_answers_changes_no_bit(checkpoint: Checkpoint, seed: int) -> None:
    rows = conversations(5, seed)
    scorer = RewardModel(str(checkpoint()), batch_size=4, dtype="float32", device="cpu")
    found = scored(scorer, [rows])
    turned = [row._replace(responses=row.responses[::-1]) for row in rows[::-1]]
    assert {k: s[::-1] for k, s in scored(scorer, [turned]).items()} == found


def test_too_long_inputs_lose_the_beginning_of_the_prompt(
    checkpoint: Checkpoint, seed: int
) -> None:
    path = checkpoint()
    fits, long_prompt, long_answer = (
        Candidates(k, f"row {k}", [{"role": "user", "content": p}], [a], {})
        for k, (p, a) in enumerate([("hi", "yes"), ("abc" * 20, "an end"), ("hi", "abc" * 20)])
    )
    counts: Counter[str] = Counter()
    scorer = RewardModel(str(path), dtype="float32", device="cpu", max_length=32)
    found = scored(scorer, [[fits, long_prompt, long_answer]], counts)
    for row in (fits, long_prompt, long_answer):
        (ids,) = rendered(path, row)
        expected = ids if len(ids) <= 32 else ids[:1] + ids[-31:]
        assert found[row.number] == pytest.approx(one_by_one(path, [expected]), abs=2e-5)
    assert counts == {"prompt_shortened": 2}
    counts.clear()
    scored(RewardModel(str(path), dtype="float32", device="cpu"), [[fits, long_prompt]], counts)
    assert not counts  # 96 positions are enough for both


@pytest.mark.parametrize("limit", [None, 24])
def test_positions_and_the_tokenizer_limit_an_encoders_input(
    encoder: Path, limit: int | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    if limit is not None:
        tokenizer.model_max_length = limit
        tokenizer.save_pretrained(encoder)
    row = Candidates(0, "row 0", "x" * 60, ["the end"], {})
    counts: Counter[str] = Counter()
    scorer = RewardModel(str(encoder), dtype="float32", device="cpu")
    found = scored(scorer, [[row]], counts)
    ids = tokenizer(row.prompt + "the end")["input_ids"]
    kept = ids[:1] + ids[-((limit or 40) - 1) :]
    assert found[0] == pytest.approx(one_by_one(encoder, [kept]), abs=2e-5)
    assert counts == {"prompt_shortened": 1}


def test_a_chat_template_of_ones_own(checkpoint: Checkpoint, seed: int) -> None:
    path, (row,) = checkpoint(), conversations(1, seed, responses=2)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}"
    scorer = RewardModel(str(path), chat_template=template, dtype="float32", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = [f"<bos>u:{row.prompt[0]['content']}a:{text}" for text in row.responses]
    expected = one_by_one(path, [tokenizer(text)["input_ids"] for text in texts])
    assert scored(scorer, [[row]])[0] == pytest.approx(expected, abs=2e-5)
    plain = RewardModel(str(path), dtype="float32", device="cpu")
    assert scorer.identity()["chat_template_sha256"] != plain.identity()["chat_template_sha256"]


def test_identity_tells_models_apart_and_a_closed_scorer_loads_again(
    checkpoint: Checkpoint, seed: int
) -> None:
    rows = conversations(2, seed)
    scorer = RewardModel(str(checkpoint()), dtype="float32", device="cpu")
    same = RewardModel(str(checkpoint()), dtype="float32", batch_size=3, device="cpu")
    other = RewardModel(str(checkpoint(name="other", rms_norm_eps=1e-3)), dtype="float32")
    assert scorer.identity() == same.identity()  # neither device nor batch size decides a score
    assert scorer.identity() != other.identity()
    found = scored(scorer, [rows])
    scorer.close()
    assert scored(scorer, [rows]) == found


def test_more_labels_than_one_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="a classifier with 3 labels"):
        RewardModel(str(checkpoint(labels=3)))


def test_a_checkpoint_without_a_head_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers would make up a head at random."""
    tokenizer = build_tokenizer()
    LlamaForCausalLM(llama_config(tokenizer, num_labels=1)).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    scorer = RewardModel(str(tmp_path / "lm"), device="cpu")
    with pytest.raises(ValueError, match=r"not those of a LlamaForSeq.*: no score\.weight"):
        scored(scorer, [conversations(1, 0)])


def test_conversations_without_a_template_and_with_one_that_refuses(checkpoint: Checkpoint) -> None:
    path, rows = checkpoint(), conversations(1, 0)
    refuses = RewardModel(str(path), chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(ScorerError, match=r"row 0: the chat template .* no such role"):
        scored(refuses, [rows])
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    (path / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(path)
    with pytest.raises(ScorerError, match=r"scorer\.chat_template: the prompt of row 0"):
        scored(RewardModel(str(path)), [rows])


def test_a_score_that_is_not_finite_stops_the_run(checkpoint: Checkpoint) -> None:
    path = checkpoint()
    model = LlamaForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(path)
    with pytest.raises(
        ScorerError, match=r"row 0: score of response 0 \(from 0\) is nan, expected a finite"
    ):
        scored(RewardModel(str(path), device="cpu"), [conversations(1, 0)])


def test_like_lengths_are_computed_together_whatever_their_order() -> None:
    inputs = [(3, 1), (2,), (1, 1, 1, 1), (1,), (2,), (1, 5), (7, 7, 7)]
    for order in (inputs, inputs[::-1]):
        calls: list[list[tuple[int, ...]]] = []

        def forward(some: list[tuple[int, ...]], calls: Any = calls) -> torch.Tensor:
            calls.append(some)
            return torch.tensor([[float(sum(ids))] for ids in some])

        found = score_inputs(order, 4, forward)
        assert found == {ids: sum(ids) for ids in inputs}
        assert calls == [[(1,), (2,), (1, 5), (3, 1)], [(7, 7, 7), (1, 1, 1, 1)]]


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ScorerError, match=r"shape \(2, 19\) for 2 inputs"):
        score_inputs([(1,), (2,)], 4, lambda some: torch.zeros(len(some), 19))


def test_settings_reach_it_and_numbers_out_of_range_do_not(checkpoint: Checkpoint) -> None:
    settings = {"kind": "reward_model", "model": str(checkpoint()), "device": "cpu"}
    made = make_scorer(ScorerSettings(**settings, batch_size=3, max_length=20))
    assert isinstance(made, RewardModel)
    assert (made.batch_rows, made.max_length) == (3, 20)
    with pytest.raises(ValueError, match=r"scorer\.batch_size: got 0"):
        make_scorer(ScorerSettings(**settings, batch_size=0))
    with pytest.raises(ValueError, match=r"scorer\.max_length: got 3"):
        make_scorer(ScorerSettings(**settings, max_length=3))
    with pytest.raises(FileNotFoundError, match="not a directory"):
        make_scorer(ScorerSettings(**(settings | {"model": "./nowhere"})))
