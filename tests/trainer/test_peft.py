"""Runs with adapters: LoRA with the head, DoRA, a quantised base; the reference is the base without adapter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from fastpo.head import FusedHead
from fastpo.trainer import PreferenceConfig, PreferenceTrainer
from fastpo.trainer.launch import model_to_train
from fastpo.trainer.model import add_adapter, is_quantized, load_model

BATCH, BETA = 5, 0.7
HEAD = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "lm_head"]}
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes")
FOUR_BITS = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
}

Settings = Callable[..., PreferenceConfig]
Runner = Callable[..., PreferenceTrainer]


def dense_gaps(model: torch.nn.Module, rows: Mapping[str, Any]) -> Tensor:
    """Difference of the answers' log-prob sums per row, from full logits, one unpadded row at a time."""
    sums = []
    for answer in ("chosen_ids", "rejected_ids"):
        for prompt, ids in zip(rows["prompt_ids"], rows[answer], strict=True):
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0].double()
            scored = logits[len(prompt) - 1 : -1].log_softmax(-1)
            sums.append(scored.gather(1, torch.tensor(ids)[:, None]).sum())
    chosen, rejected = torch.stack(sums).chunk(2)
    return chosen - rejected


def dense_dpo(model: Any, rows: Mapping[str, Any]) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = dense_gaps(model, rows)
    gaps = dense_gaps(model, rows) - reference
    assert gaps.abs().max() > 1e-2  # the adapter makes a difference
    return -logsigmoid(BETA * gaps).mean()


def trained_somewhat(adapted: Any) -> Any:
    """B as after some training: zero, it would leave A without a gradient."""
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted


def check_first_step(
    adapted: Any, pairs: datasets.Dataset, trainer: Runner, **settings: Any
) -> PreferenceTrainer:
    """One step of SGD at rate 1 moves all that is trained by the gradient of the dense loss."""
    rows = pairs.select(range(BATCH))
    adapted.eval()
    expected = dense_dpo(adapted, rows[:])
    expected.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    adapted.zero_grad()
    run = trainer(
        adapted, rows, per_device_train_batch_size=BATCH, beta=BETA, max_steps=1, max_grad_norm=1e9,
        optim="sgd", learning_rate=1.0, **settings,
    )  # fmt: skip
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in adapted.named_parameters():
        moved = before[name] - parameter.detach()
        if name in gradients:
            assert gradients[name].norm() > 1e-3, name
            assert (moved - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name
        else:
            assert not moved.any(), name
    return run


@pytest.mark.parametrize(
    "adapter",
    [
        HEAD,
        HEAD | {"use_rslora": True},
        {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    ],
    ids=["LoRA", "rsLoRA", "DoRA"],
)
@pytest.mark.parametrize("way", ["live", "precomputed", "checkpointing"])
def test_first_step_equals_dense_arithmetic(
    adapter: dict[str, Any], way: str, model: Any, pairs: datasets.Dataset, trainer: Runner
) -> None:
    adapted = trained_somewhat(add_adapter(model, adapter))
    assert FusedHead(adapted).method == "fused"
    options: dict[str, Any] = {
        "live": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "checkpointing": {"gradient_checkpointing": True},
    }[way]
    run = check_first_step(adapted, pairs, trainer, **options)
    assert run.ref_model is None


def test_dora_on_the_head_is_trained_through_its_logits(
    model: Any, pairs: datasets.Dataset, trainer: Runner
) -> None:
    adapted = trained_somewhat(add_adapter(model, HEAD | {"use_dora": True}))
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        check_first_step(adapted, pairs, trainer)


@pytest.fixture
def quantizable(tmp_path: Path, tokenizer: Any, seed: int) -> Path:
    """A model whose layers consist of whole blocks of 64 inputs."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=128, **sizes
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(tmp_path / "quantizable")
    return tmp_path / "quantizable"


@pytest.fixture
def stored(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_reentrant_checkpoints_reach_the_adapters(
    stored: Path, pairs: datasets.Dataset, trainer: Runner, settings: Settings
) -> None:
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    config = settings(model_name_or_path=str(stored), peft=HEAD, **options)
    check_first_step(trained_somewhat(model_to_train(config)), pairs, trainer, **options)


def test_base_in_few_bits_keeps_the_rest_in_float32(model: Any) -> None:
    model = model.bfloat16()
    model.is_quantized = True  # as transformers marks it
    adapted = add_adapter(model, HEAD)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}
    assert {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quantization", "error", "message"),
    [
        ("4bit", TypeError, r"quantization_config: got str, expected a mapping"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant": "nf4"},
            ValueError,
            r"has no field 'bnb_4bit_quant', did you mean 'bnb_4bit_quant_",
        ),
        ({"load_in_4bits": True}, ValueError, r"could not be loaded with quantization_config"),
        pytest.param(
            FOUR_BITS,
            ValueError,
            r"model_name_or_path: .*with quantization_config .* requires bitsandbytes",
            marks=pytest.mark.skipif(BITSANDBYTES, reason="bitsandbytes is installed"),
        ),
    ],
)
def test_bad_quantization_is_named(
    quantization: Any, error: type[Exception], message: str, stored: Path, settings: Settings
) -> None:
    config = settings(
        model_name_or_path=str(stored), model_init_kwargs={"quantization_config": quantization}
    )
    with pytest.raises(error, match=message):
        load_model(config)


@needs_bitsandbytes
def test_quantised_weights_need_an_adapter(quantizable: Path, settings: Settings) -> None:
    config = settings(
        model_name_or_path=str(quantizable), model_init_kwargs={"quantization_config": FOUR_BITS}
    )
    with pytest.raises(ValueError, match=r"peft: got None, expected a mapping"):
        model_to_train(config)


@needs_bitsandbytes
@pytest.mark.parametrize("adapter", [HEAD, HEAD | {"target_modules": ["q_proj"], "use_dora": True}])
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=str)
def test_qlora(
    adapter: dict[str, Any],
    options: dict[str, Any],
    quantizable: Path,
    pairs: datasets.Dataset,
    trainer: Runner,
    settings: Settings,
) -> None:
    config = settings(
        model_name_or_path=str(quantizable),
        model_init_kwargs={"quantization_config": FOUR_BITS},
        peft=adapter,
        dtype="bfloat16",
    )
    adapted = trained_somewhat(model_to_train(config))
    assert is_quantized(adapted)
    layers = {type(module).__name__ for module in adapted.modules()}
    assert "Linear4bit" in layers
    assert FusedHead(adapted).method == "fused"
    check_first_step(adapted, pairs, trainer, **options)


@needs_bitsandbytes
def test_quantised_head_makes_its_own_logits(
    quantizable: Path, pairs: datasets.Dataset, trainer: Runner, settings: Settings
) -> None:
    config = settings(
        model_name_or_path=str(quantizable),
        model_init_kwargs={"quantization_config": FOUR_BITS | {"llm_int8_skip_modules": ["none"]}},
        peft=HEAD,
    )
    adapted = trained_somewhat(model_to_train(config))
    assert type(adapted.get_output_embeddings().base_layer).__name__ == "Linear4bit"
    with pytest.warns(UserWarning, match="a Linear4bit, not a plain linear layer"):
        check_first_step(adapted, pairs, trainer)


@needs_bitsandbytes
def test_evaluation_leaves_the_quantised_layers_differentiable(
    quantizable: Path, settings: Settings
) -> None:
    config = settings(
        model_name_or_path=str(quantizable),
        model_init_kwargs={"quantization_config": FOUR_BITS},
        peft=HEAD,
    )
    adapted = trained_somewhat(model_to_train(config)).eval()
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=ids)
    adapted.train()(input_ids=ids).logits.square().sum().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all(p.grad is not None and p.grad.any() for p in trained)
