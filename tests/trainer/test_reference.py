"""Reference log-probs: live, under a LoRA adapter, and precomputed with a cache that notices every change."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from fastpo.trainer import PreferenceTrainer, reference
from fastpo.trainer.model import add_adapter

Runner = Callable[..., PreferenceTrainer]

# For runs that are compared: Adam would turn a difference of 1e-9 in a tiny gradient into one of the
# learning rate, so about one seed in 25 parted by 1e-5.
PLAIN_SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05}


def perturbed(model: nn.Module, scale: float = 0.05) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return other


def losses(run: PreferenceTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per batch that a reference model is run on."""
    calls: list[int] = []
    original = reference.reference_logps

    def count(model: nn.Module, inputs: Any) -> torch.Tensor:
        calls.append(len(inputs["labels"]) // 2)
        return original(model, inputs)

    monkeypatch.setattr(reference, "reference_logps", count)
    return calls


def test_precomputed_equals_live(
    trainer: Runner, model: Any, pairs: datasets.Dataset, counted: list[int]
) -> None:
    frozen = perturbed(model)
    options = PLAIN_SGD | {"eval_dataset": pairs.select(range(6)), "max_steps": 8}
    live = trainer(ref_model=copy.deepcopy(frozen), **options)
    live.train()
    assert len(counted) == 8
    counted.clear()
    once = trainer(ref_model=copy.deepcopy(frozen), precompute_ref_log_probs=True, **options)
    assert sum(counted) == 30 + 6
    assert once.ref_model is None
    counted.clear()
    once.train()
    assert losses(once) == pytest.approx(losses(live), abs=1e-6)
    metrics, other = once.evaluate(), live.evaluate()
    assert metrics["eval_rewards/margins"] == pytest.approx(other["eval_rewards/margins"], abs=1e-6)
    assert counted == [4, 2]  # the live one's evaluation
    assert losses(live)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_policy_itself_is_the_reference_unless_one_is_given(trainer: Runner) -> None:
    live, once = trainer(**PLAIN_SGD), trainer(precompute_ref_log_probs=True, **PLAIN_SGD)
    assert live.ref_model is not None
    assert once.ref_model is None
    live.train()
    once.train()
    assert losses(once) == pytest.approx(losses(live), abs=1e-6)
    assert abs(losses(live, "rewards/margins")[-1]) > 1e-3


def test_frozen_copy_is_not_trained_and_has_no_dropout(trainer: Runner, model: Any) -> None:
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    run = trainer(model, disable_dropout=False)
    before = {name: p.clone() for name, p in run.ref_model.named_parameters()}
    run.train()
    assert not run.ref_model.training
    for name, parameter in run.ref_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert not parameter.requires_grad
    assert losses(run)[0] != pytest.approx(math.log(2), abs=1e-4)  # the policy's dropout
    same = trainer(copy.deepcopy(run.ref_model), disable_dropout=True)
    for parameter in same.model.parameters():
        parameter.requires_grad_(True)
    same.train()
    assert losses(same)[0] == pytest.approx(math.log(2), abs=1e-7)


def lora(model: Any, **settings: Any) -> Any:
    return add_adapter(
        model, {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], **settings}
    )


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_base_under_a_lora_adapter_is_the_reference(
    precompute: bool, trainer: Runner, model: Any
) -> None:
    base = copy.deepcopy(model)
    adapted = lora(model, lora_dropout=0.3)
    with torch.no_grad():  # an adapter that does something from the start
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    other = trainer(copy.deepcopy(adapted), ref_model=base, **PLAIN_SGD)
    run = trainer(adapted, precompute_ref_log_probs=precompute, **PLAIN_SGD)
    assert run.ref_model is None
    run.train()
    other.train()
    assert losses(run) == pytest.approx(losses(other), abs=1e-6)
    assert losses(run)[0] != pytest.approx(math.log(2), abs=1e-3)
    for name, parameter in run.model.named_parameters():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, base.get_parameter(plain)), name


def test_live_base_has_no_dropout(trainer: Runner, model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    adapted = lora(model, lora_dropout=0.5)
    run = trainer(adapted, disable_dropout=False)
    run.model.train()
    batch = run.data_collator([run.train_dataset[k] for k in range(4)])
    first, second = run._reference_logps(batch), run._reference_logps(batch)
    assert torch.equal(first, second)
    assert run.model.training
    assert run.model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"].training


def test_columns_of_the_data_set_need_no_model(
    trainer: Runner, model: Any, pairs: datasets.Dataset, counted: list[int]
) -> None:
    frozen = perturbed(model)
    once = trainer(ref_model=frozen, precompute_ref_log_probs=True)
    counted.clear()
    given = trainer(train_dataset=once.train_dataset)
    assert given.ref_model is None
    once.train()
    given.train()
    assert losses(given) == losses(once)
    assert not counted
    precomputed = trainer(
        ref_model=frozen,
        train_dataset=once.train_dataset,
        eval_dataset=pairs,
        precompute_ref_log_probs=True,
    )
    assert precomputed.train_dataset is once.train_dataset
    assert list(precomputed.eval_dataset[reference.COLUMNS[0]]) == columns(once)[0]
    with pytest.raises(ValueError, match="needs reference log-probs, which this data set lacks"):
        given.evaluate(pairs)


# ---- The cache ----


def precompute(trainer: Runner, **options: Any) -> PreferenceTrainer:
    return trainer(precompute_ref_log_probs=True, **options)


def columns(run: PreferenceTrainer) -> list[list[float]]:
    return [list(run.train_dataset[name]) for name in reference.COLUMNS]


def test_cache_is_used_again(trainer: Runner, cache: Path, counted: list[int]) -> None:
    first = precompute(trainer)
    assert counted
    counted.clear()
    second = precompute(trainer)
    assert not counted
    assert columns(second) == columns(first)
    assert [p.suffix for p in cache.iterdir()] == [".safetensors"]


def test_cache_knows_the_rows_the_weights_the_configuration_and_the_precision(
    trainer: Runner, model: Any, pairs: datasets.Dataset, cache: Path, counted: list[int]
) -> None:
    precompute(trainer)

    def assert_computed_anew(**options: Any) -> None:
        counted.clear()
        before = set(cache.iterdir())
        precompute(trainer, **options)
        assert counted, options
        assert len(set(cache.iterdir()) - before) == 1

    def changed(row: dict[str, Any], k: int) -> dict[str, Any]:
        if k == 17:
            row["rejected_ids"][0] = 3 + (row["rejected_ids"][0] + 1) % 50
        return row

    assert_computed_anew(train_dataset=pairs.map(changed, with_indices=True))
    moved = [*range(1, 30), 0]
    assert_computed_anew(train_dataset=pairs.select(moved))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    assert_computed_anew(ref_model=other)
    scaled = copy.deepcopy(model)
    scaled.config.rms_norm_eps = 1e-4
    assert_computed_anew(ref_model=scaled)
    assert_computed_anew(bf16=True, use_cpu=True)
    assert_computed_anew(ref_model=copy.deepcopy(model).bfloat16())


def test_boundaries_between_prompt_and_answers_are_part_of_the_hash(
    pairs: datasets.Dataset,
) -> None:
    def rows(prompts: list[list[int]], chosen: list[list[int]]) -> datasets.Dataset:
        return datasets.Dataset.from_dict(
            {
                "prompt_ids": prompts,
                "chosen_ids": chosen,
                "rejected_ids": [[9, 2]] * 2,
                "row": [0, 1],
            }
        )

    same = [
        rows([[1, 5], [1, 6]], [[7, 2], [8, 2]]),
        rows([[1, 5, 1], [6]], [[7, 2], [8, 2]]),
        rows([[1, 5], [1, 6]], [[7, 2, 8], [2]]),
        rows([[1, 5], [1, 6, 7]], [[2, 8], [2]]),
    ]
    assert len({reference.rows_hash(each) for each in same}) == len(same)
    assert reference.rows_hash(pairs.select(range(9))) == reference.rows_hash(
        datasets.Dataset.from_list(pairs.to_list()[:9])
    )


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "foreign"])
def test_damaged_cache_is_found_and_replaced(
    damage: str, trainer: Runner, cache: Path, counted: list[int]
) -> None:
    good = columns(precompute(trainer))
    (file,) = cache.iterdir()
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 0x40
    file.write_bytes(
        {
            "flipped": bytes(flipped),
            "truncated": data[:-8],
            "emptied": b"",
            "foreign": b"PK\x03\x04zip",
        }[damage]
    )
    counted.clear()
    assert columns(precompute(trainer)) == good
    assert counted
    assert file.read_bytes() == data
    assert not list(cache.glob(".*"))


def test_reference_that_is_not_finite_names_the_rows(
    trainer: Runner, model: Any, pairs: datasets.Dataset, cache: Path
) -> None:
    frozen = copy.deepcopy(model)
    only = next(k for k, row in enumerate(pairs) if len(row["chosen_ids"]) > 2)
    token = pairs[only]["chosen_ids"][0]
    with torch.no_grad():
        frozen.model.embed_tokens.weight[token] = math.nan
    hit = [
        row["row"]
        for row in pairs
        if any(token in row[name][: -1 if "prompt" not in name else None]
               for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"{len(hit)} of 30 pairs are not finite.*rows \[{hit[0]}"
    ):
        precompute(trainer, ref_model=frozen)
    assert not cache.exists()


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTPO_CACHE", "~/here")
    assert reference.cache_directory() == Path.home() / "here"
    monkeypatch.delenv("FASTPO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference.cache_directory() == tmp_path / "fastpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert reference.cache_directory() == Path.home() / ".cache" / "fastpo"
