"""Packed rows and shared prompts against their sequences one by one, on models of several families."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.nn import functional

from fastpo.data import PackedCollator
from fastpo.head import FusedHead
from fastpo.head.packed_attention import PackedAttention

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL)),
    "Qwen3 with windows": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=4)),
    "Gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SMALL, sliding_window=4, attn_implementation="eager")
    ),
    "Gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**{**SMALL, "num_hidden_layers": 7}, sliding_window=4)
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
            bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip


def make(family: str, dtype: torch.dtype) -> hf.PreTrainedModel:
    torch.manual_seed(3)
    model = FAMILIES[family]().to(dtype)
    for buffer in (
        model.buffers()
    ):  # frequencies of positions, of which some versions make float32 in between
        buffer.data = buffer.data.type(torch.float32)
    return model


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    draw = random.Random(4)

    def ids(low: int, high: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(draw.randint(low, high))]

    return [
        {"prompt_ids": ids(1, 11), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9), "row": k}
        for k in range(5)
    ]


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of these models compute in float32 whatever their dtype; here they do not."""
    softmax, to = functional.softmax, Tensor.to
    monkeypatch.setattr(
        functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim)
    )

    def keep(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and args[0] is torch.float32 and self.dtype == torch.float64:
            return self
        return to(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", keep)
    monkeypatch.setattr(Tensor, "float", lambda self: keep(self, torch.float32))


def one_by_one(model: Any, rows: list[dict[str, Any]]) -> Tensor:
    """Log-prob sums (2B,) of the answers, each in a call of its own."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            prompt, answer = row["prompt_ids"], row[side]
            ids = torch.tensor([prompt + answer])
            labels = torch.full_like(ids, -100)
            labels[0, len(prompt) - 1 : -1] = torch.tensor(answer)
            sums.append(model(input_ids=ids, labels=labels, use_cache=False).log_probs.sum())
    return torch.stack(sums)


def packed(model: Any, attention: PackedAttention, batch: dict[str, Tensor]) -> Tensor:
    where = (batch[n] for n in ("input_ids", "position_ids", "groups", "branches"))
    options = {"labels": batch["completion_labels"], "hidden_index": batch["hidden_index"]}
    return model(**attention.inputs(*where), **options, use_cache=False).log_probs.sum(dim=1)


def gradients(model: Any, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (sums * torch.arange(1, len(sums) + 1)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert all(g.norm() > 0 for g in some.values())
    return max(((g - others[n]).norm() / g.norm()).item() for n, g in some.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_float64_equals_the_sequences_one_by_one(
    family: str, checkpointing: bool, rows: list[dict[str, Any]], float64_throughout: None
) -> None:
    model = make(family, torch.float64)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with FusedHead(model):
        alone = one_by_one(model, rows)
        expected = gradients(model, alone)
        for sharing in (False, True):
            attention = PackedAttention(model, prefix_sharing=sharing)
            for one_row in (False, True):
                batch = PackedCollator(0, prefix_sharing=sharing, one_row=one_row)(rows)
                sums = packed(model, attention, batch)
                assert sums.dtype == torch.float64
                assert (sums - alone).abs().max() <= 1e-12
                assert largest_difference(expected, gradients(model, sums)) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family: str, rows: list[dict[str, Any]]) -> None:
    model = make(family, torch.float32)
    with FusedHead(model):
        alone = one_by_one(model, rows)
        expected = gradients(model, alone)
        attention = PackedAttention(model, prefix_sharing=True)
        sums = packed(model, attention, PackedCollator(0, prefix_sharing=True)(rows))
        assert (sums - alone).abs().max() <= 1e-5
        assert largest_difference(expected, gradients(model, sums)) <= 1e-5


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3", "Gemma2"])
@pytest.mark.parametrize("fault", ["no mask", "no branches", "no positions", "no window"])
def test_a_planted_fault_is_seen(family: str, fault: str, rows: list[dict[str, Any]]) -> None:
    model = make(family, torch.float32)
    attention = PackedAttention(model, prefix_sharing=True)
    batch = PackedCollator(0, prefix_sharing=True)(rows)
    window = getattr(model.config, "sliding_window", None)
    with FusedHead(model), torch.no_grad():
        alone = one_by_one(model, rows)
        if fault == "no branches":
            batch["branches"].zero_()
        elif fault == "no positions":
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(
                batch["input_ids"]
            )
        elif fault == "no window":
            if window is None:
                pytest.skip("a model without a window")
            attention._config = hf.MistralConfig(sliding_window=1000)
        if fault == "no mask":
            where = {n: batch[n] for n in ("input_ids", "position_ids")}
            options = {"labels": batch["completion_labels"], "hidden_index": batch["hidden_index"]}
            sums = model(**where, **options, use_cache=False).log_probs.sum(dim=1)
        else:
            sums = packed(model, attention, batch)
        assert (sums - alone).abs().max() > 1e-4  # ten times what equal ones may differ by


def test_the_probe_finds_the_form_of_the_mask_and_leaves_the_window() -> None:
    by_kind = {}
    for family in FAMILIES:
        model = make(family, torch.float32)
        window = getattr(model.config, "sliding_window", None)
        by_kind[family] = PackedAttention(model, prefix_sharing=True)._by_kind
        assert getattr(model.config, "sliding_window", None) == window
        assert model.training
    assert by_kind == {
        "Llama": False, "Qwen3": True, "Qwen3 with windows": True, "Mistral": False, "Gemma2": True,
        "Gemma3": True, "GPT-2": False,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_pass_the_probe_and_a_model_without_masks_does_not(dtype: torch.dtype) -> None:
    for family in FAMILIES:
        PackedAttention(make(family, dtype), prefix_sharing=True)
    model = make("Llama", dtype)
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(
        ValueError, match="prefix_sharing: LlamaForCausalLM does not give a packed row"
    ):
        PackedAttention(model, prefix_sharing=True)


def test_recurrent_models_are_refused() -> None:
    config = hf.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"padding_free: .*MambaForCausalLM"):
        PackedAttention(hf.MambaForCausalLM(config), prefix_sharing=False)


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = make("Llama", torch.float32)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(
        ValueError, match="prefix_sharing: got True with attn_implementation 'flash"
    ):
        PackedAttention(model, prefix_sharing=True)
    model.config._attn_implementation_internal = "paged_attention"
    with pytest.raises(ValueError, match="padding_free: got True with attn_implementation 'paged"):
        PackedAttention(model, prefix_sharing=False)


@pytest.fixture
def without_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels that run on a GPU alone."""
    monkeypatch.setattr(PackedAttention, "_probe", lambda *_: None)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("sharing", [False, True])
def test_block_masks_say_the_same_as_dense_ones(
    family: str, sharing: bool, rows: list[dict[str, Any]], without_probe: None
) -> None:
    batch = PackedCollator(0, prefix_sharing=sharing, one_row=True)(rows)
    where = [batch[n] for n in ("input_ids", "position_ids", "groups", "branches")]
    model = make(family, torch.float32)
    dense = PackedAttention(model, prefix_sharing=sharing)
    masks = dense.inputs(*where)["attention_mask"]
    model.config._attn_implementation_internal = "flex_attention"
    blocks = PackedAttention(model, prefix_sharing=sharing)
    assert blocks.one_row
    assert not dense.one_row
    given = blocks.inputs(*where)["attention_mask"]
    pairs = [(masks, given)] if family == "Llama" else [(masks[k], given[k]) for k in masks]
    assert len(pairs) == (1 if family == "Llama" else 2)
    length = batch["input_ids"].shape[1]
    at = torch.arange(length)
    for mask, block in pairs:
        for q in range(length):
            seen = torch.stack(
                [block.mask_mod(torch.tensor(0), torch.tensor(0), torch.tensor(q), k) for k in at]
            )
            assert torch.equal(seen, mask[0, 0, q])


def test_bounds_of_the_sequences_for_varlen_kernels(rows: list[dict[str, Any]]) -> None:
    model = make("Llama", torch.float32)
    model.config._attn_implementation_internal = "flash_attention_2"
    attention = PackedAttention(model, prefix_sharing=False)
    assert attention.one_row
    batch = PackedCollator(0, one_row=True)(rows)
    given = attention.inputs(
        *(batch[n] for n in ("input_ids", "position_ids", "groups", "branches"))
    )
    lengths = [
        len(r["prompt_ids"]) + len(r[s]) for r in rows for s in ("chosen_ids", "rejected_ids")
    ]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    assert torch.equal(given["cu_seq_lens_q"], bounds)
    assert torch.equal(given["cu_seq_lens_k"], bounds)
    assert given["max_length_q"] == given["max_length_k"] == max(lengths)
    assert "attention_mask" not in given
