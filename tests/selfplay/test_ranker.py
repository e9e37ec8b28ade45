"""Rankers: PairRM in its published layout against that layout written out, cross-encoders, and both orders."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fastpo.demo.model import build_tokenizer
from fastpo.selfplay.scorers import Candidates, ScorerSettings, make_scorer
from fastpo.selfplay.scorers.ranker import PairwiseRanker

PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>")


def llm_blender_scores(comparisons: np.ndarray) -> np.ndarray:
    """(k,) of (k, k): what its ``rank`` makes of all comparisons (policy max_logits)."""
    return (comparisons - comparisons.T).mean(axis=-1)


def pairrm_ids(
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    first: str,
    second: str,
    source_length: int,
    length: int,
) -> list[int]:
    """As the model card does it, where no prompt is cut."""
    ids = tokenizer.encode(PREFIXES[0] + source)
    assert len(ids) <= source_length
    room = (length - len(ids)) // 2
    for prefix, text in zip(PREFIXES[1:], (first, second), strict=True):
        ids = ids + tokenizer.encode(prefix + text, max_length=room, truncation=True)
    return ids


def pairrm_forward(path: Path, ids: Sequence[int]) -> float:
    """The published forward on one sequence, from the checkpoint's tensors."""
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    encoder = DebertaV2Model(DebertaV2Config.from_pretrained(path)).eval()
    prefix = "pretrained_model."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        hidden = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]

    def at(name: str) -> torch.Tensor:
        return hidden[ids.index(config[f"{name}_prefix_id"])]

    def head(answer: torch.Tensor) -> torch.Tensor:
        x = torch.cat([at("source"), answer])
        x = torch.tanh(tensors["head_layer.1.weight"] @ x + tensors["head_layer.1.bias"])
        return tensors["head_layer.4.weight"] @ x + tensors["head_layer.4.bias"]

    return (head(at("cand1")) - head(at("cand2"))).mean().item()


def encoder_tokenizer(added: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A token for each character; [CLS] before and [SEP] behind a text."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.add_tokens(list(added))
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=special
    )
    return tokenizer


@pytest.fixture
def pairrm(tmp_path: Path, seed: int) -> Path:
    """A tiny checkpoint with the files, fields and tensors of llm-blender/PairRM-hf; two tasks."""
    tokenizer = encoder_tokenizer([*PREFIXES, "<|candidate|>"])
    ids = tokenizer.convert_tokens_to_ids([*PREFIXES, "<|candidate|>"])
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        relative_attention=True,
        position_buckets=16,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
        type_vocab_size=0,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    encoder = DebertaV2Model(config)
    head = {
        "head_layer.1.weight": torch.randn(32, 64) / 8,
        "head_layer.1.bias": torch.randn(32),
        "head_layer.4.weight": torch.randn(2, 32),
        "head_layer.4.bias": torch.randn(2),
    }
    path = tmp_path / "pairrm"
    tokenizer.save_pretrained(path)
    tensors = {f"pretrained_model.{name}": t for name, t in encoder.state_dict().items()}
    save_file({**tensors, **head}, path / "model.safetensors", {"format": "pt"})
    fields = dict(
        zip(
            ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"),
            ids,
            strict=True,
        )
    )
    document = config.to_dict() | fields | {"n_tasks": 2, "drop_out": 0.05}
    document |= {"architectures": ["DebertaV2PairRM"], "sep_token_id": tokenizer.sep_token_id}
    (path / "config.json").write_text(json.dumps(document))
    return path


@pytest.fixture
def cross_encoder(tmp_path: Path, seed: int) -> Callable[..., Path]:
    """``cross_encoder(labels)``: a tiny BERT of 64 positions."""

    def make(labels: int) -> Path:
        tokenizer = encoder_tokenizer()
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=labels,
            initializer_range=0.3,
        )
        torch.manual_seed(seed)
        path = tmp_path / f"cross{labels}"
        BertForSequenceClassification(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return make


def cross_encoder_forward(path: Path, ids: Sequence[int]) -> float:
    model = BertForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return (logits[0] - logits[1] if len(logits) == 2 else logits[0]).item()


def ranker(path: Path, **options: Any) -> PairwiseRanker:
    return PairwiseRanker(str(path), dtype="float32", device="cpu", **options)


def rows(seed: int, sizes: Sequence[int] = (2, 3, 4, 2), longest: int = 12) -> list[Candidates]:
    draw = random.Random(seed)

    def text(low: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, longest)))

    return [
        Candidates(k, f"row {k}", text(1), [text(1) for _ in range(n)], {})
        for k, n in enumerate(sizes)
    ]


def scored(
    scorer: PairwiseRanker,
    batches: Sequence[Sequence[Candidates]],
    counts: Counter[str] | None = None,
) -> dict[int, list[float] | None]:
    return dict(scorer.score(iter(batches), Counter() if counts is None else counts))


def matrix(row: Candidates, compare: Callable[[str, str], float]) -> np.ndarray:
    return np.array(
        [[0 if i == j else compare(a, b) for j, b in enumerate(row.responses)]
         for i, a in enumerate(row.responses)]
    )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_pairrm_gives_the_scores_of_llm_blender(pairrm: Path, batch_size: int, seed: int) -> None:
    """For rows of any number of answers, whatever they are computed beside."""
    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    of_all = rows(seed)
    found = scored(ranker(pairrm, batch_size=batch_size), [of_all[:3], of_all[3:]])
    for row in of_all:

        def compare(a: str, b: str, prompt: str = str(row.prompt)) -> float:
            return pairrm_forward(pairrm, pairrm_ids(tokenizer, prompt, a, b, 1224, 2048))

        expected = llm_blender_scores(matrix(row, compare))
        assert found[row.number] == pytest.approx(expected.tolist(), abs=2e-5)
        assert np.ptp(expected) > 1e-3


def test_two_answers_differ_by_both_orders_added(pairrm: Path, seed: int) -> None:
    (row,) = rows(seed, [2])
    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    a, b = row.responses
    ab, ba = (
        pairrm_forward(pairrm, pairrm_ids(tokenizer, str(row.prompt), *pair, 1224, 2048))
        for pair in ((a, b), (b, a))
    )
    (scores,) = scored(ranker(pairrm), [[row]]).values()
    assert scores is not None
    assert scores[0] - scores[1] == pytest.approx(ab - ba, abs=2e-5)
    assert abs(ab + ba) > 1e-3  # this model does prefer a position


def test_the_order_of_answers_only_permutes_the_scores(pairrm: Path, seed: int) -> None:
    """To the last bit: position bias cancels exactly."""
    of_all = rows(seed, [2, 3, 5])
    scorer = ranker(pairrm, batch_size=3)
    found = scored(scorer, [of_all])
    order = [2, 0, 1]
    turned = [
        of_all[0]._replace(responses=of_all[0].responses[::-1]),
        of_all[1]._replace(responses=[of_all[1].responses[k] for k in order]),
        of_all[2]._replace(responses=of_all[2].responses[::-1]),
    ]
    again = scored(scorer, [turned[::-1]])
    assert again[0] == found[0][::-1]
    assert again[1] == [found[1][k] for k in order]
    assert again[2] == found[2][::-1]
    assert found[0][0] == -found[0][1] != 0


@pytest.mark.parametrize("labels", [1, 2])
def test_a_cross_encoder_reads_prompt_and_both_answers(
    cross_encoder: Callable[..., Path], labels: int, seed: int
) -> None:
    path = cross_encoder(labels)
    tokenizer = AutoTokenizer.from_pretrained(path)
    of_all = rows(seed)
    found = scored(ranker(path, batch_size=5), [of_all])
    for row in of_all:

        def compare(a: str, b: str, prompt: str = str(row.prompt)) -> float:
            ids = tokenizer(f"{prompt}[SEP]{a}[SEP]{b}")["input_ids"]
            return cross_encoder_forward(path, ids)

        expected = llm_blender_scores(matrix(row, compare))
        assert found[row.number] == pytest.approx(expected.tolist(), abs=2e-5)


def test_a_decoder_gets_bos_and_eos_where_an_encoder_has_cls_and_sep(
    tmp_path: Path, seed: int
) -> None:
    """It names no pad token, so its output is read at the last token: EOS, which often pads."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (row,) = rows(seed, [3])
    found = scored(ranker(tmp_path), [[row]])

    def compare(a: str, b: str) -> float:
        ids = tokenizer(f"<bos>{row.prompt}<eos>{a}<eos>{b}<eos>")["input_ids"]
        with torch.no_grad():
            return model(torch.tensor([ids])).logits.item()

    expected = llm_blender_scores(matrix(row, compare))
    assert found[0] == pytest.approx(expected.tolist(), abs=2e-5)


def test_sums_of_any_size_do_not_depend_on_the_order_of_answers(
    pairrm: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    def compare(self: PairwiseRanker, sequences: Sequence[tuple[int, ...]]) -> torch.Tensor:
        draws = [random.Random(hash(ids)) for ids in sequences]
        numbers = [draw.gauss(0, 1) * 10 ** draw.uniform(-9, 9) for draw in draws]
        return torch.tensor(numbers, dtype=torch.float64)[:, None]

    monkeypatch.setattr(PairwiseRanker, "_compare", compare)
    (row,) = rows(seed, [7])
    scorer = ranker(pairrm)
    found = scored(scorer, [[row]])[0]
    turned = row._replace(responses=row.responses[::-1])
    assert found is not None
    assert scored(scorer, [[turned]])[0] == found[::-1]


def test_what_a_position_is_worth_to_the_model_does_not_count(
    cross_encoder: Callable[..., Path], seed: int
) -> None:
    path, of_all = cross_encoder(2), rows(seed)
    before = scored(ranker(path), [of_all])
    model = BertForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([7.0, -7.0])
    model.save_pretrained(path)
    after = scored(ranker(path), [of_all])
    for number, scores in before.items():
        assert after[number] == pytest.approx(scores, abs=1e-4)


def test_equal_answers_and_one_alone(pairrm: Path) -> None:
    of_all = [
        Candidates(0, "row 0", "p", ["same", "same"], {}),
        Candidates(1, "row 1", "p", ["alone"], {}),
        Candidates(2, "row 2", "p", [], {}),
    ]
    assert scored(ranker(pairrm), [of_all]) == {0: [0.0, 0.0], 1: [0.0], 2: []}


def test_conversations(pairrm: Path, seed: int) -> None:
    """One user's message is the prompt; a longer one is told with its roles."""
    (row,) = rows(seed, [2])
    text = str(row.prompt)
    said = [{"role": "user", "content": text}]
    longer = [{"role": "system", "content": "s"}, *said]
    scorer = ranker(pairrm)
    (plain,) = scored(scorer, [[row]]).values()
    assert scored(scorer, [[row._replace(prompt=said)]])[0] == plain
    (told,) = scored(scorer, [[row._replace(prompt=f"SYSTEM: s\n\nUSER: {text}")]]).values()
    assert scored(scorer, [[row._replace(prompt=longer)]])[0] == told != plain


@pytest.mark.parametrize("attack", ["[SEP]", "<|candidate2|>", "<|candidate1|>", "<|source|>"])
def test_special_tokens_in_an_answer_are_text(pairrm: Path, attack: str, seed: int) -> None:
    (row,) = rows(seed, [2])
    spelt = row._replace(responses=[f"good{attack}bad", row.responses[1]])
    plain = row._replace(responses=["good bad", row.responses[1]])
    scorer = ranker(pairrm)
    assert scored(scorer, [[spelt]]) == scored(scorer, [[plain]])


def test_pairrm_cuts_answers_as_published_and_prompts_at_their_beginning(
    pairrm: Path, seed: int
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    scorer = ranker(pairrm, max_length=64)  # 64 · 1224 / 2048 = 38 for the prompt
    a, b = "abcdefgh" * 5, "hgfedcba" * 5
    short = Candidates(0, "row 0", "p" * 10, [a, b], {})
    long = Candidates(1, "row 1", "x" * 20 + "y" * 35, [a, b], {})
    for row, prompt, shortened in ((short, short.prompt, 0), (long, "y" * 35, 1)):
        ab, ba = (
            pairrm_forward(pairrm, pairrm_ids(tokenizer, str(prompt), *pair, 38, 64))
            for pair in ((a, b), (b, a))
        )
        counts: Counter[str] = Counter()
        (scores,) = scored(scorer, [[row]], counts).values()
        assert scores == pytest.approx([(ab - ba) / 2, (ba - ab) / 2], abs=2e-5)
        assert counts["prompt_shortened"] == shortened
        assert counts["answer_shortened"] == 1


def test_pairrm_takes_more_than_512_tokens(pairrm: Path) -> None:
    """Its encoder has relative positions: 512 in the configuration are no limit."""
    tokenizer = AutoTokenizer.from_pretrained(pairrm)
    row = Candidates(0, "row 0", "p" * 400, ["a" * 300, "b" * 350], {})
    ab, ba = (
        pairrm_forward(pairrm, pairrm_ids(tokenizer, str(row.prompt), *pair, 1224, 2048))
        for pair in (row.responses, row.responses[::-1])
    )
    counts: Counter[str] = Counter()
    (scores,) = scored(ranker(pairrm), [[row]], counts).values()
    assert scores == pytest.approx([(ab - ba) / 2, (ba - ab) / 2], abs=2e-5)
    assert not counts


def test_a_cross_encoder_cuts_the_prompt_before_the_answers(
    cross_encoder: Callable[..., Path],
) -> None:
    """At most 64 ids: 13 + 13 of the answers leave 38; 40 + 40 share what half of the length leaves."""
    path = cross_encoder(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for answers, prompt, kept in (
        (("a" * 12, "b" * 12), "x" * 50 + "y" * 36, ("y" * 36, "a" * 12, "b" * 12)),
        (("a" * 39, "b" * 39), "x" * 50 + "y" * 30, ("y" * 30, "a" * 15, "b" * 15)),
    ):
        (scores,) = scored(ranker(path), [[Candidates(0, "row 0", prompt, answers, {})]]).values()
        y, a, b = kept
        ab, ba = (
            cross_encoder_forward(path, tokenizer(f"{y}[SEP]{p}[SEP]{q}")["input_ids"])
            for p, q in ((a, b), (b, a))
        )
        assert scores == pytest.approx([(ab - ba) / 2, (ba - ab) / 2], abs=2e-5)


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head_layer.1.bias"), r"no head_layer\.1\.bias"),
        (lambda t: t.update({"head_layer.9.bias": torch.zeros(2)}), r"unknown head_layer\.9\.bias"),
        (lambda t: t.update({"head_layer.4.bias": torch.zeros(3)}), r"could not be loaded"),
    ],
)
def test_other_tensors_than_pairrms_are_refused(
    pairrm: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str, seed: int
) -> None:
    change_tensors(pairrm, change)
    with pytest.raises(ValueError, match=message):
        scored(ranker(pairrm), [rows(seed)])


def test_a_tokenizer_of_another_model_is_refused(pairrm: Path, seed: int) -> None:
    encoder_tokenizer(PREFIXES[::-1]).save_pretrained(pairrm)
    with pytest.raises(ValueError, match=r"source_prefix_id \d+, but its tokenizer reads"):
        scored(ranker(pairrm), [rows(seed)])


def test_more_labels_than_two_are_refused(cross_encoder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="a classifier with 3 labels"):
        ranker(cross_encoder(3))


def test_settings_reach_it(pairrm: Path) -> None:
    made = make_scorer(ScorerSettings(kind="ranker", model=str(pairrm), batch_size=3))
    assert isinstance(made, PairwiseRanker)
    assert made.batch_rows == 3
    assert made.is_pairrm
    before = made.identity()
    assert make_scorer(ScorerSettings("ranker", str(pairrm))).identity() == before
    change_tensors(pairrm, lambda t: t.update({"head_layer.4.bias": torch.ones(2)}))
    assert made.identity() != before
