"""The probe: what it finds, what it leaves untouched, and what happens to tails of another form."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from fastpo import model_logprobs
from fastpo.head import FusedHead


class WithTail(LlamaForCausalLM):
    """A Llama whose logits go through ``tail``."""

    def forward(self, input_ids=None, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = self.tail(self, out.logits)
        return out


@pytest.fixture
def with_tail(build_model):
    """A model with the given tail, a function of (model, logits)."""

    def build(tail):
        model = build_model("llama")
        model.__class__ = WithTail
        model.tail = tail
        model.learned = nn.Parameter(torch.tensor(1.5))
        return model

    return build


def in_place(model, z):
    z.div_(7.0).tanh_()
    return z.mul_(7.0)


def raises_on_float64(model, z):
    return z @ torch.eye(z.shape[-1], dtype=torch.float32)


def one_sided(model, z):
    z = z.clone()
    z[..., 4].clamp_(min=0)
    return z


def masks_entries(model, z):
    z = z.clone()
    z[..., 96:] = float("-inf")
    return z


@pytest.mark.parametrize(
    ("tail", "scale", "softcap"),
    [
        (lambda model, z: z, 1.0, None),
        (lambda model, z: z.float(), 1.0, None),
        (lambda model, z: z.contiguous() / 3, 1 / 3, None),
        (lambda model, z: -2.5 * z, -2.5, None),
        (lambda model, z: 50 * torch.tanh(z / 50), 1.0, 50.0),
        (lambda model, z: 0.25 * (50 * torch.tanh((z * 2).float() / 50)), 0.5, 12.5),
        (in_place, 1.0, 7.0),
    ],
)
def test_known_forms(tail, scale, softcap, with_tail, batch, plain_logprobs, recwarn):
    model = with_tail(tail)
    head = FusedHead(model)
    assert not recwarn.list
    assert head.method == "fused"
    assert head.tail.scale == pytest.approx(scale, rel=2e-7)
    assert head.tail.softcap == (None if softcap is None else pytest.approx(softcap, rel=2e-7))
    expected = plain_logprobs(model, batch)
    torch.testing.assert_close(model_logprobs(model, *batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tail",
    [
        masks_entries,
        lambda model, z: z + torch.linspace(0, 3, z.shape[-1]),
        lambda model, z: z + 1e-3 * torch.arange(z.shape[-1]).eq(17),
        one_sided,
        lambda model, z: z.clamp(-3, 3),
        lambda model, z: 5 * torch.nn.functional.softsign(z / 5),
        lambda model, z: z[..., :97],
        lambda model, z: z * model.learned,
        raises_on_float64,
    ],
    ids=[
        "mask",
        "ramp",
        "one entry",
        "one side",
        "clamp",
        "softsign",
        "slice",
        "learned",
        "raises",
    ],
)
def test_other_forms_fall_back(tail, with_tail, batch, plain_logprobs, gradients, monkeypatch):
    monkeypatch.setattr("fastpo.head.fallback.budget_bytes", lambda device: 16 * 101 * 5)  # 5 rows
    model = with_tail(tail)
    batch = batch._replace(labels=torch.where(batch.labels > 95, 95, batch.labels))
    expected = plain_logprobs(model, batch, temperature=0.7)
    expected_gradients = gradients(model, expected)
    with pytest.warns(UserWarning, match="neither a factor nor a tanh cap"):
        head = FusedHead(model, temperature=0.7, return_stats=True)
    assert head.method == "compact"
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with head:
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert seen == [(1, int((batch.labels != -100).sum()), 101)]  # no logits without a label
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model, out.log_probs)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits / 0.7
    kept = batch.labels != -100
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    stats = out.token_stats
    torch.testing.assert_close(stats.entropy, torch.where(kept, entropy, 0.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.top1, kept & (logits.argmax(-1) == batch.labels))


def test_fallback_without_labels_or_out_of_range(with_tail, batch):
    model = with_tail(masks_entries)
    nothing = torch.full_like(batch.labels, -100)
    with pytest.warns(UserWarning, match="neither"):
        logps = model_logprobs(model, *batch._replace(labels=nothing))
    assert (logps == 0).all()
    logps.sum().backward()
    assert (model.lm_head.weight.grad == 0).all()
    nothing[1, 2] = 101
    with (
        pytest.warns(UserWarning, match="neither"),
        pytest.raises(
            ValueError, match=r"labels: 1 of 1 outside \[0, 101\).* 101 at flat position 15"
        ),
    ):
        model_logprobs(model, *batch._replace(labels=nothing))


def test_probe_leaves_no_trace(build_model):
    model = build_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    state, weights = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    calls: list[tuple[bool, bool]] = []

    def observe(module, args, output):
        torch.rand(1)  # as some models do even in evaluation
        calls.append((torch.is_grad_enabled(), module.training))

    model.transformer.register_forward_hook(observe)
    FusedHead(model)
    assert calls == [(False, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert "forward" not in vars(model.lm_head)
    FusedHead(model, temperature=2.0)
    assert len(calls) == 1  # known by now


def test_probed_again_when_the_model_changes(build_model, batch, plain_logprobs):
    model = build_model("gemma2")
    assert FusedHead(model).tail.softcap == 30.0
    model.config.final_logit_softcapping = 5.0
    assert FusedHead(model).tail.softcap == 5.0
    cohere = build_model("cohere")
    assert FusedHead(cohere).tail.scale == 0.0625
    cohere.logit_scale = 0.5
    assert FusedHead(cohere).tail.scale == 0.5


def test_models_that_cannot_be_probed(build_model, with_tail):
    with pytest.raises(RuntimeError, match=r"logits of shapes \[\(1, 3, 101\), \(1, 3, 101\)\]"):
        FusedHead(with_tail(lambda model, z: z + model.lm_head(torch.ones(1, 3, 32))))
    broken = build_model("llama")
    broken.model.layers[0].mlp.up_proj = nn.Linear(7, 48)
    with pytest.raises(
        RuntimeError, match="could not be probed, its forward on 3 tokens failed with"
    ):
        FusedHead(broken)
    headless = build_model("llama")
    headless.unused = nn.Linear(32, 101)
    headless.get_output_embeddings = lambda: headless.unused
    with pytest.raises(RuntimeError, match="did not call its head"):
        FusedHead(headless)
    with pytest.raises(ValueError, match="meta device"):
        FusedHead(build_model("llama").to("meta"))
    tuples = build_model("llama")
    forward = tuples.forward
    tuples.forward = lambda *args, **kwargs: forward(*args, **kwargs).to_tuple()
    with pytest.raises(TypeError, match=r"returns a tuple, expected a ModelOutput"):
        FusedHead(tuples)


def test_a_model_that_waits_for_its_gpu_is_probed_with_plain_attention(build_model) -> None:
    """FSDP and DeepSpeed place a model later, and flash-attn does not run on a CPU."""
    model = build_model("llama")
    plain = FusedHead(model).tail
    ids = torch.arange(5)[None]
    other = build_model("llama")
    other.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(Exception, match=r"(?i)flash|cuda|cpu|kernels"):
        other(ids)
    head = FusedHead(other)
    assert head.method == "fused"
    assert head.tail == plain
    assert other.config._attn_implementation == "flash_attention_2"
