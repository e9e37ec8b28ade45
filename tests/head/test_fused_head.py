"""What a call in ``fused_head`` returns, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

import fastpo
from fastpo import TokenStats, fused_head, model_logprobs
from fastpo.head import FusedHead


def patches(model: torch.nn.Module) -> list[str]:
    """Everything that could have stayed on the model."""
    return [
        f"{name}: {what}"
        for name, module in model.named_modules()
        for what in ("forward", "_forward_hooks", "_forward_pre_hooks")
        if vars(module).get(what)
    ]


def call(model, batch, **kwargs):
    return model(
        batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **kwargs
    )


def test_output(build_model, batch, plain_logprobs):
    model = build_model("llama")
    with fused_head(model):
        out = call(model, batch, output_hidden_states=True)
    assert isinstance(out, CausalLMOutputWithPast)
    assert out.logits is None
    assert "logits" not in out
    assert out.log_probs.shape == batch.labels.shape
    assert out.log_probs.dtype == torch.float32
    assert out["log_probs"] is out.log_probs
    assert out.token_stats is None
    assert len(out.hidden_states) == 3
    assert out.past_key_values.get_seq_length() == batch.input_ids.shape[1]
    leaves, structure = torch.utils._pytree.tree_flatten(out)
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, structure)
    assert rebuilt.log_probs is out.log_probs  # as wrappers do that look for tensors in an output


def test_operation_of_ones_own(build_model, batch, plain_logprobs):
    """It gets the head's arguments, the tail's constants among them, and its result is the model's."""
    model = build_model("gemma2")
    seen = []

    def operation(hidden, weight, labels, bias, **options):
        seen.append(options)
        return 2 * fastpo.linear_logprobs(hidden, weight, labels, bias, **options)

    with fused_head(model):
        expected = call(model, batch).log_probs
        with fused_head(model, operation=operation, temperature=1.0, tol=0.0):
            got = call(model, batch).log_probs
        again = call(model, batch).log_probs
    assert torch.equal(got, 2 * expected)
    assert torch.equal(again, expected)
    (options,) = seen
    assert (options["softcap"], options["logit_scale"], options["tol"]) == (30.0, 1.0, 0.0)


def test_operation_needs_a_plain_linear_head(build_model):
    model = build_model("llama")

    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.lm_head = Scaled(32, 101, bias=False)
    with pytest.raises(
        ValueError, match="operation: the head of LlamaForCausalLM is a Scaled, expected a plain"
    ):
        fused_head(model, operation=lambda *_, **__: None)


def test_token_stats(build_model, batch):
    model = build_model("cohere")
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    with fused_head(model, return_stats=True):
        out = call(model, batch)
    stats = out.token_stats
    assert isinstance(stats, TokenStats)
    kept = batch.labels != -100
    p = torch.softmax(logits, -1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(stats.entropy, torch.where(kept, entropy, 0.0), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.top1, kept & (logits.argmax(-1) == batch.labels))
    mean = torch.where(kept, logits.mean(-1), 0.0)
    torch.testing.assert_close(stats.logit_mean, mean, rtol=1e-5, atol=1e-5)


def test_temperature_and_ignore_index(build_model, batch):
    model = build_model("gemma2")
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits / 0.7
    labels = torch.where(batch.labels == -100, -1, batch.labels)
    logps = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    with fused_head(model, temperature=0.7, ignore_index=-1):
        out = call(model, batch._replace(labels=labels))
    expected = torch.where(labels == -1, 0.0, logps)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_without_labels_as_usual(build_model, unpadded_batch):
    model = build_model("gemma2")
    ids = unpadded_batch.input_ids
    expected, generated = model(ids), model.generate(ids, max_new_tokens=5, do_sample=False)
    signature = inspect.signature(model.forward)
    with fused_head(model):
        out = model(ids)
        assert type(out) is type(expected)
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), generated)
        assert inspect.signature(model.forward) == signature
        assert model(ids, logits_to_keep=1).logits.shape == (3, 1, 101)
    assert patches(model) == []


def test_model_logprobs(build_model, batch, plain_logprobs):
    model = build_model("granite")
    expected = plain_logprobs(model, batch)
    logps = model_logprobs(model, *batch)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    logps, stats = model_logprobs(model, *batch, {"return_stats": True}, output_attentions=False)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(stats, TokenStats)
    no_mask = model_logprobs(model, batch.input_ids, None, batch.labels)
    assert not torch.allclose(no_mask[2], expected[2])  # the mask is not lost on the way
    assert patches(model) == []


def test_all_rows_ignored(build_model, batch):
    model = build_model("llama")
    logps = model_logprobs(model, *batch._replace(labels=torch.full_like(batch.labels, -100)))
    assert (logps == 0).all()
    logps.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_embeddings_instead_of_ids(build_model, batch, plain_logprobs):
    model = build_model("llama")
    with fused_head(model):
        out = model(
            inputs_embeds=model.get_input_embeddings()(batch.input_ids),
            attention_mask=batch.attention_mask,
            labels=batch.labels,
        )
    expected = plain_logprobs(model, batch)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_nesting(build_model, batch):
    model = build_model("llama")
    outer, inner = FusedHead(model), FusedHead(model, temperature=2.0, return_stats=True)
    plain, warm = model_logprobs(model, *batch), model_logprobs(model, *batch, {"temperature": 2.0})
    assert not torch.allclose(plain, warm)
    with outer:
        with inner:
            assert torch.equal(call(model, batch).log_probs, warm)
            with outer, inner:  # entered again
                assert torch.equal(call(model, batch).log_probs, warm)
        assert torch.equal(call(model, batch).log_probs, plain)
        assert call(model, batch).token_stats is None
    assert patches(model) == []
    outer.install()
    inner.install()
    outer.remove()  # not the order of a with block
    assert torch.equal(call(model, batch).log_probs, warm)
    inner.remove()
    assert patches(model) == []
    with pytest.raises(RuntimeError, match=r"remove\(\) without install"):
        inner.remove()


def test_two_models(build_model, batch, plain_logprobs):
    policy, reference = build_model("llama"), build_model("gemma2")
    expected = plain_logprobs(policy, batch), plain_logprobs(reference, batch)
    with fused_head(policy), fused_head(reference):
        first, second = call(policy, batch).log_probs, call(reference, batch).log_probs
    torch.testing.assert_close(first, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, expected[1], rtol=1e-5, atol=1e-5)
    assert patches(policy) == patches(reference) == []


def test_exception_inside(build_model, batch, plain_logprobs):
    model = build_model("llama")
    with fused_head(model):
        handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(model, batch)
        handle.remove()
        assert model(batch.input_ids).logits.shape == (*batch.input_ids.shape, 101)
        expected = plain_logprobs(model, batch)
        torch.testing.assert_close(call(model, batch).log_probs, expected, rtol=1e-5, atol=1e-5)
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), fused_head(model):
        call(model, batch)
    handle.remove()
    assert patches(model) == []


def test_copy_while_installed(build_model, batch, plain_logprobs):
    model = build_model("llama")
    with fused_head(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(0.5)
        assert not torch.allclose(call(twin, batch).log_probs, call(model, batch).log_probs)
    expected = plain_logprobs(twin, batch)
    torch.testing.assert_close(call(twin, batch).log_probs, expected, rtol=1e-5, atol=1e-5)
    call(twin, batch).log_probs.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_module_hooks_fire(build_model, batch):
    """What FSDP and DeepSpeed rely on: hooks around the head, on its real output, which carries the graph."""
    model = build_model("llama")
    seen: list[tuple[str, tuple[int, ...], bool]] = []
    with fused_head(model):
        for module in (model.lm_head, model):  # after the installation, as wrappers do
            module.register_forward_pre_hook(lambda *_: seen.append(("before", (), True)))
        model.lm_head.register_forward_hook(
            lambda m, args, out: seen.append(("head", tuple(out.shape), out.requires_grad))
        )
        model.register_forward_hook(
            lambda m, args, out: seen.append(("model", tuple(out.log_probs.shape), True))
        )
        call(model, batch)
    shape = tuple(batch.labels.shape)
    before = ("before", (), True)
    assert seen == [before, before, ("head", shape, True), ("model", shape, True)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, build_model, batch, plain_logprobs, gradients):
    model = build_model("llama")
    expected = gradients(model, plain_logprobs(model, batch))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    recomputed: list[bool] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: recomputed.append(True))
    model.train()
    with fused_head(model):
        recomputed.clear()
        logps = call(model, batch, use_cache=False).log_probs
    got = gradients(model, logps)  # after the head has been removed
    assert len(recomputed) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


def test_compiled_model(build_model, batch, plain_logprobs, gradients):
    model = build_model("gemma2", num_hidden_layers=1)
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fused_head(compiled):
        out = call(compiled, batch, use_cache=False)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model, out.log_probs)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)
    assert compiled(batch.input_ids).logits.shape == (*batch.input_ids.shape, 101)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"labels": torch.zeros(3, 5, dtype=torch.int64)},
            ValueError,
            r"labels: got shape \(3, 5\)",
        ),
        ({"labels": [1, 2]}, TypeError, "labels: got list"),
        ({"labels": torch.full((3, 13), 101)}, ValueError, r"labels: 39 of 39 outside \[0, 101\)"),
        ({"labels": torch.zeros(3, 13)}, TypeError, "labels: got dtype torch.float32"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep: got 1"),
        ({"logits_to_keep": torch.tensor([0])}, ValueError, "logits_to_keep: got tensor"),
        ({"return_dict": False}, TypeError, "return_dict: the model returned a tuple"),
    ],
)
def test_bad_calls(change, error, message, build_model, batch):
    model = build_model("llama")
    with fused_head(model):
        with pytest.raises(error, match=message):
            model(**{**batch._asdict(), **change})
        assert model(batch.input_ids).logits is not None
    assert patches(model) == []


def test_unknown_options(build_model):
    with pytest.raises(TypeError, match=r"op_kwargs: got \['softcap'\], expected some of"):
        fused_head(build_model("llama"), softcap=1.0)


def test_refused_models():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    bert = transformers.BertConfig(**small, intermediate_size=32)
    t5 = transformers.T5Config(
        d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=50
    )
    gemma = transformers.Gemma3Config(
        text_config={**small, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )  # fmt: skip
    for model, message in (
        (transformers.BertModel(bert), "BertModel has no output embedding"),
        (transformers.BertForMaskedLM(bert), "BertForMaskedLM is a masked language model"),
        (
            transformers.T5ForConditionalGeneration(t5),
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            transformers.Gemma3ForConditionalGeneration(gemma),
            "ConditionalGeneration is a multimodal",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fused_head(model)
    with pytest.raises(TypeError, match="Linear without a transformers model"):
        fused_head(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str, expected a transformers causal LM"):
        fused_head("gpt2")


def test_data_parallel_is_refused(build_model):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in nn\.DataParallel"):
        fused_head(torch.nn.DataParallel(build_model("llama")))


def test_exchanged_head(build_model, batch):
    model = build_model("llama")
    with fused_head(model):
        model.lm_head = torch.nn.Linear(32, 101, bias=False)
        with pytest.raises(RuntimeError, match="the head has been exchanged"):
            call(model, batch)
    assert patches(model) == []


def test_no_warning_on_the_fused_path(build_model, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_logprobs(build_model("llama"), *batch)
