"""Hidden states that wait on the host: the same gradients, nothing left on the device, masks not copied."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from fastpo.head import FusedHead
from fastpo.trainer import PreferenceConfig, PreferenceTrainer, activation_offloading
from fastpo.trainer.activation_offloading import (
    bring_back,
    keep_on_host,
    offload_activations,
)

Runner = Callable[..., PreferenceTrainer]
CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": True}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"], "init_lora_weights": False}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Copies on the host that a run makes."""
    made: list[Tensor] = []

    def recording(tensor: Tensor) -> Any:
        device, kept = keep_on_host(tensor)
        if device is not None:
            assert kept.data_ptr() != tensor.data_ptr()
            assert torch.equal(kept, tensor)
            made.append(kept)
        return device, kept

    monkeypatch.setattr(activation_offloading, "keep_on_host", recording)
    return made


def with_lora(model: LlamaForCausalLM) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **LORA))


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 8),
        ({"prefix_sharing": True}, 8),
        ({"padding_free": True, "tokens_per_batch": 60}, 8),
        ({"gradient_accumulation_steps": 3, "prefix_sharing": True}, 22),  # 3 + 3 + 2 + 3 micro-steps
        ({"peft": LORA}, 8),
        ({"peft": LORA, "prefix_sharing": True, "gradient_accumulation_steps": 2}, 16),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, 8),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, 4),
        ({"loss_type": "simpo", "beta": 2.0, "backward": "certified"}, 8),
    ],
    ids=[
        "plain", "shared", "budget", "accumulated", "LoRA", "LoRA, shared", "reentrant", "every other",
        "certified",
    ],
)  # fmt: skip
def test_a_run_stays_the_same(
    options: dict[str, Any],
    copies: int,
    trainer: Runner,
    model: LlamaForCausalLM,
    copied: list[Tensor],
) -> None:
    options = {**options, "max_steps": 4, "attn_implementation": "sdpa"}
    adapted = options.pop("peft", None)
    runs = []
    for more in ({}, CHECKPOINTS | {"activation_offloading": True}):
        fields = {k: v for k, v in options.items() if more or "checkpointing" not in k}
        start = with_lora(model) if adapted else None
        runs.append(trainer(model=start, **fields, **more))
        runs[-1].train()
    # Of both layers in every micro-step; the reference's and the evaluation's forwards keep nothing.
    assert len(copied) == copies
    plain, offloaded = runs
    for (name, ours), theirs in zip(
        offloaded.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.fixture
def scored(model: LlamaForCausalLM) -> Callable[[], Tensor]:
    """Log-probs of a few random tokens under ``model``, in training, its layers checkpointed."""
    FusedHead(model).install()
    model.gradient_checkpointing_enable()
    model.train()
    ids = torch.randint(3, model.config.vocab_size, (2, 9))
    return lambda: model(ids, labels=ids, use_cache=False).log_probs


def test_nothing_of_it_stays_on_the_device(
    model: LlamaForCausalLM, scored: Callable[[], Tensor]
) -> None:
    """Between forward and backward the storages of the layers' inputs are gone, and their copies are there."""
    gone: list[bool] = []
    kept: list[Tensor] = []

    def to_host(tensor: Tensor) -> Any:
        device, host = keep_on_host(tensor)
        if device is not None:
            place = len(gone)
            gone.append(False)
            weakref.finalize(tensor.untyped_storage(), gone.__setitem__, place, True)
            kept.append(host)
        return device, host

    offload_activations(model, to_host=to_host)
    logps = scored()
    assert gone == [True, True]
    assert [t.device.type for t in kept] == ["cpu", "cpu"]
    assert all(t.shape == (2, 9, model.config.hidden_size) for t in kept)
    logps.sum().backward()

    # The measure sees checkpoints that stay.
    gone.clear()
    model.gradient_checkpointing_enable()  # gives the layers transformers' own function again

    def to_nowhere(tensor: Tensor) -> Any:
        to_host(tensor)
        return None, tensor

    offload_activations(model, to_host=to_nowhere)
    logps = scored()
    assert gone == [False, False]


def test_gradients_come_from_what_was_kept(
    model: LlamaForCausalLM, scored: Callable[[], Tensor]
) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        scored().sum().backward()
        return [p.grad.clone() for p in model.model.layers.parameters()]

    stayed = gradients()
    offload_activations(model)
    assert all(map(torch.equal, gradients(), stayed))
    model.gradient_checkpointing_enable()  # gives the layers transformers' own function again
    offload_activations(model, to_device=lambda kept: bring_back(kept).roll(1, dims=1))
    assert not any(map(torch.equal, gradients(), stayed))


def test_switched_on_twice_it_copies_once(
    model: LlamaForCausalLM, scored: Callable[[], Tensor], copied: list[Tensor]
) -> None:
    for _ in range(2):
        offload_activations(model)
    scored()
    assert len(copied) == model.config.num_hidden_layers


def test_masks_are_not_copied_for_every_layer(seed: int, copied: list[Tensor]) -> None:
    """GPT-2 passes its mask on by position, so that checkpoints save it."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, attn_implementation="eager")
    )
    model.gradient_checkpointing_enable()
    model.train()
    offload_activations(model)
    ids = torch.randint(50, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert [tuple(t.shape) for t in copied] == 3 * [(2, 7, 16)]


def test_tensors_without_a_gradient_stay() -> None:
    mask = torch.ones(2, 1, 3, 3)
    assert bring_back(keep_on_host(mask)) is mask
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    device, host = keep_on_host(hidden)
    assert (device, host.dtype, host.requires_grad) == (hidden.device, torch.bfloat16, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "activation_offloading: got True, expected gradient_checkpointing: true"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}},
            "gradient_checkpointing_kwargs: got offload beside activation_offloading",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    fields: dict[str, Any], message: str, settings: Callable[..., PreferenceConfig]
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(activation_offloading=True, **fields)


def test_a_model_that_checkpoints_nothing() -> None:
    with pytest.raises(
        ValueError, match="activation_offloading: got True, but Linear has no layer"
    ):
        offload_activations(nn.Linear(2, 2))
