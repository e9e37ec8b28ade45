"""Loading models and tokenizers, dropout, adapters, mixtures of experts, Liger's layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastpo.trainer import PreferenceConfig, PreferenceTrainer
from fastpo.trainer.model import (
    add_adapter,
    disable_dropout,
    load_model,
    load_tokenizer,
    router_coefficient,
)

Runner = Callable[..., PreferenceTrainer]
Settings = Callable[..., PreferenceConfig]


# ---- Loading ----


@pytest.fixture
def checkpoint(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_checkpoint_is_loaded_in_the_wanted_dtype(
    checkpoint: Path, model: Any, settings: Settings
) -> None:
    loaded = load_model(settings(model_name_or_path=str(checkpoint), attn_implementation="eager"))
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "eager"
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    halved = load_model(settings(model_name_or_path=str(checkpoint), dtype="bfloat16"))
    assert halved.dtype == torch.bfloat16
    halved.save_pretrained(checkpoint.parent / "halved")
    again = {"model_name_or_path": str(checkpoint.parent / "halved")}
    assert load_model(settings(**again, dtype="auto")).dtype == torch.bfloat16
    assert load_model(settings(**again)).dtype == torch.float32


def test_directories_that_are_no_checkpoint(
    checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    def load(path: Path | str | None, field: str = "model_name_or_path") -> None:
        load_model(settings(**{field: None if path is None else str(path)}), field)

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        ValueError, match=r"model_name_or_path: .*no config\.json \(it holds nothing\)"
    ):
        load(empty)
    (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"it has no weights.*\(it holds .*config\.json"):
        load(checkpoint, "ref_model_name_or_path")
    (empty / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        load(empty)
    with pytest.raises(
        FileNotFoundError, match=r"ref_model_name_or_path: .*nowhere is not a directory"
    ):
        load(tmp_path / "nowhere", "ref_model_name_or_path")
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="model_name_or_path: got None"):
        load(None)


def test_tokenizer_pads_with_eos_and_takes_a_template(
    checkpoint: Path, tokenizer: Any, settings: Settings, tmp_path: Path
) -> None:
    bare = load_tokenizer(settings(model_name_or_path=str(checkpoint)))
    assert bare.pad_token_id == tokenizer.pad_token_id
    assert bare.chat_template == tokenizer.chat_template
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    for given in ("{{ messages }}", str(tmp_path / "template.jinja")):
        config = settings(model_name_or_path=str(checkpoint), chat_template=given)
        assert load_tokenizer(config).chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match=r"chat_template: none\.jinja is neither"):
        load_tokenizer(settings(model_name_or_path=str(checkpoint), chat_template="none.jinja"))
    unpadded = tmp_path / "unpadded"
    tokenizer.save_pretrained(unpadded)
    file = unpadded / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"pad_token": "<pad>"', '"pad_token": null'))
    other = load_tokenizer(settings(tokenizer_name_or_path=str(unpadded)))
    assert other.pad_token_id == other.eos_token_id
    (tmp_path / "no tokenizer").mkdir()
    with pytest.raises(ValueError, match="tokenizer_name_or_path: no tokenizer could be loaded"):
        load_tokenizer(settings(tokenizer_name_or_path=str(tmp_path / "no tokenizer")))
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"^model_name_or_path: no tokenizer could be loaded"):
        load_tokenizer(settings(model_name_or_path=str(checkpoint)))


# ---- Refusals ----


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(**small, image_size=8, patch_size=4, projection_dim=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=64))
    )


def bert() -> Any:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder model"),
        (llava, "LlavaForConditionalGeneration is a multimodal model"),
        (bert, "BertForMaskedLM is a masked language model"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(
    build: Callable[[], Any], message: str, trainer: Runner
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(build())


def test_reference_of_another_kind_is_refused(trainer: Runner) -> None:
    with pytest.raises(ValueError, match="T5ForConditionalGeneration"):
        trainer(ref_model=t5())


def test_arguments_of_another_class_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args: got TrainingArguments, expected a PreferenceConfig"):
        PreferenceTrainer(model, TrainingArguments(str(tmp_path)), processing_class=tokenizer)


# ---- Dropout and adapters ----


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2,
                  word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.3, layerdrop=0.3)
    )  # fmt: skip


@pytest.mark.parametrize("build", [gpt2, opt], ids=["modules", "numbers"])
def test_no_dropout_is_left(build: Callable[[], Any], seed: int) -> None:
    model = build().train()
    ids = torch.randint(3, 64, (2, 12))
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    torch.testing.assert_close(model(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_adapter_settings(model: Any) -> None:
    adapted = add_adapter(model, {"r": 2, "target_modules": ["q_proj"]})
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("q_proj.lora_" in name for name in trained)
    assert adapted.peft_config["default"].r == 2
    assert adapted.peft_config["default"].task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match="no field 'target_module', did you mean 'target_modules'"):
        add_adapter(model, {"target_module": "q_proj"})
    with pytest.raises(ValueError, match=r"^peft: .*'nope'.* not found in the base model"):
        add_adapter(adapted.unload(), {"target_modules": ["nope"]})


def test_adapter_without_peft(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install fastpo\[peft\]"):
        add_adapter(model, {})


# ---- Mixtures of experts ----


def moe(vocab: int) -> Any:
    torch.manual_seed(1)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, router_aux_loss_coef=0.5,
        )
    )  # fmt: skip


def test_router_coefficient(model: Any) -> None:
    mixture = moe(64)
    assert router_coefficient(mixture, None) == 0.5
    assert router_coefficient(mixture, 0.1) == 0.1
    assert router_coefficient(mixture, 0.0) == 0.0
    assert router_coefficient(model, None) == router_coefficient(model, 0.0) == 0.0
    with pytest.raises(ValueError, match="LlamaForCausalLM is no mixture of experts"):
        router_coefficient(model, 0.1)


def test_load_balancing_loss_is_added(
    trainer: Runner, tokenizer: Any, pairs: datasets.Dataset
) -> None:
    rows = pairs.select(range(4))
    options: dict[str, Any] = {
        "train_dataset": rows, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9,
    }  # fmt: skip
    plain = trainer(moe(len(tokenizer)), router_aux_loss_coef=0.0, **options)
    added = trainer(moe(len(tokenizer)), **options)
    model = moe(len(tokenizer)).train()
    batch = added.data_collator(list(rows))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    balance = model(**inputs, output_router_logits=True).aux_loss
    balance.backward()
    plain.train()
    added.train()
    first, other = added.state.log_history[0], plain.state.log_history[0]
    assert first["aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    assert "aux_loss" not in other
    assert first["loss"] == pytest.approx(other["loss"] + 0.5 * balance.item(), rel=1e-5)
    gate = "model.layers.0.mlp.gate.weight"
    expected = -0.5 * model.get_parameter(gate).grad
    moved = added.model.get_parameter(gate) - plain.model.get_parameter(gate)
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


# ---- Liger's layers ----


def test_liger_patches_policy_and_reference_but_neither_loss_nor_head(
    trainer: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's own patching runs as transformers starts it; its Triton layers themselves need a GPU."""
    patching = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    from transformers.models.llama import modeling_llama

    for name in (
        "apply_rotary_pos_emb",
        "LlamaRMSNorm",
        "LlamaMLP",
    ):  # what Liger exchanges in the module
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    calls: list[tuple[Any, bool, bool]] = []
    original = patching.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]

    def watched(
        rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True, swiglu: bool = True, model: Any = None,
    ) -> None:  # fmt: skip
        calls.append((model, cross_entropy, fused_linear_cross_entropy))
        original(rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, model)

    monkeypatch.setitem(patching.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", watched)
    run = trainer(use_liger_kernel=True)
    assert calls == [(run.model, False, False), (run.ref_model, False, False)]
    for model in (run.model, run.ref_model):
        assert "Liger" in model.model.layers[0].input_layernorm.forward.__func__.__qualname__
        assert type(model.forward).__module__.startswith(
            "fastpo.head"
        )  # not Liger's forward with its loss


def test_trained_model_is_as_usual_without_labels(trainer: Runner, model: Any) -> None:
    run = trainer(model, max_steps=1, learning_rate=0.0)
    run.train()
    ids = torch.tensor([[1, 5, 6, 7]])
    assert run.model(input_ids=ids).logits.shape == (1, 4, model.config.vocab_size)
    assert run.model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 4


# ---- What TrainingArguments offers ----


def test_several_visible_gpus_do_not_end_in_data_parallel(
    model: Any, tokenizer: Any, pairs: datasets.Dataset, settings: Settings
) -> None:
    config = settings()
    config._n_gpu = 2
    run = PreferenceTrainer(model, config, train_dataset=pairs, processing_class=tokenizer)
    assert run.args.n_gpu == 1
    run.train()
    assert run.model_wrapped is run.model


def test_batches_of_like_lengths(
    trainer: Runner, pairs: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = datasets.concatenate_datasets(
        [pairs] * 10
    )  # transformers sorts within 50 batches or fewer

    def spread(**options: Any) -> list[int]:
        run = trainer(train_dataset=many, max_steps=15, **options)
        widths = []
        original = run.compute_loss

        def watch(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            longest = (
                inputs["attention_mask"].view(2, -1, inputs["input_ids"].shape[1]).sum(-1).amax(0)
            )
            widths.append(int(longest.max() - longest.min()))
            return original(model, inputs, *args, **kwargs)

        monkeypatch.setattr(run, "compute_loss", watch)
        run.train()
        return widths

    assert sum(spread(train_sampling_strategy="group_by_length")) < 0.6 * sum(spread())
