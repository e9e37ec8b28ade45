"""LoRA on the head: log-probs and gradients equal those of PEFT's own logits, at the cost of few columns."""

from __future__ import annotations

import itertools
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fastpo
from fastpo import model_logprobs
from fastpo.head import FusedHead, lora
from fastpo.kernels import linear_logprobs_torch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set"
)
TARGETS = {"gpt2": ["c_attn", "lm_head"]}
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def adapt(model, targets=("q_proj", "lm_head"), **settings):
    """LoRA with a scale that is not 1 and with B as after some training."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": list(targets), **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    return fill(adapted).to(model.dtype)


def fill(adapted):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.4)
    return adapted.eval()


def assert_equals_plain(model, batch, plain_logprobs, gradients, got=None, seed=None, **options):
    """Log-probs, and gradients of all that is trained, as from the model's logits; the fused gradients."""
    dtype = next(model.parameters()).dtype
    torch.manual_seed(seed or 0)
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    torch.manual_seed(seed or 0)
    logps = got if got is not None else model_logprobs(model, *batch, options)
    limit = LIMIT[dtype]
    assert (logps - expected).abs().max() <= limit * expected.abs().max()
    got_gradients = gradients(model, logps)
    assert got_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert gradient.norm() > 1e-2, name
        assert (got_gradients[name] - gradient).norm() <= limit * gradient.norm(), name
    return got_gradients


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "phi", "cohere"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"backward": "exact"}),
        (torch.float64, {"backward": "certified", "tol": 1e-14}),
        (torch.float32, {"backward": "exact"}),
        (torch.float32, {"backward": "certified", "tol": 1e-7}),
    ],
)
def test_equals_peft(
    name, dtype, options, build_model, batch, unpadded_batch, plain_logprobs, gradients
):
    model = adapt(build_model(name).to(dtype), TARGETS.get(name, ("q_proj", "lm_head")))
    # Rows without a key that may be seen are NaN in Gemma 2's attention in float64.
    used = unpadded_batch if (name, dtype) == ("gemma2", torch.float64) else batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert FusedHead(model).method == "fused"
    got = assert_equals_plain(model, used, plain_logprobs, gradients, **options)
    of_head = {part for part in ("lora_A", "lora_B") if any(f"lm_head.{part}" in n for n in got)}
    assert of_head == {"lora_A", "lora_B"}
    assert all("lora_" in parameter for parameter in got)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"r": 16, "lora_alpha": 16},
        {"lora_bias": True, "bias": "none"},
        {"bias": "all"},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
def test_settings(settings, build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("phi").double(), **settings)
    if "lora_dropout" in settings:  # the same draw from the same seed: as the layer's own
        model.train()
    assert FusedHead(model).method == "fused"
    assert_equals_plain(model, batch, plain_logprobs, gradients, seed=3)


def test_dropout_is_on(build_model, batch):
    model = adapt(build_model("llama"), lora_dropout=0.3).train()
    head = FusedHead(model)
    with head:
        logps = [model(batch.input_ids, labels=batch.labels).log_probs for _ in range(2)]
        model.eval()
        still = [model(batch.input_ids, labels=batch.labels).log_probs for _ in range(2)]
    assert not torch.equal(*logps)
    assert torch.equal(*still)


def test_several_adapters(build_model, batch, plain_logprobs, gradients):
    """Two on the head and a third elsewhere, of which any may be active, under one FusedHead."""
    model = adapt(build_model("llama").double())
    for name, rank, targets in (("second", 3, ["lm_head"]), ("third", 2, ["v_proj"])):
        model.add_adapter(
            name, peft.LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
        )
    model = fill(model).double()
    head = FusedHead(model)
    seen = []
    for active in (["default"], ["second"], ["default", "second"], ["third"], ["third", "second"]):
        model.base_model.set_adapter(active)
        with head:
            out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        assert_equals_plain(model, batch, plain_logprobs, gradients, out.log_probs)
        seen.append(out.log_probs.detach())
    assert all((a - b).abs().max() > 1e-2 for a, b in itertools.pairwise(seen))


def test_disabled_merged_and_unmerged(build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("llama").double())
    head = FusedHead(model)

    def score():
        with head:
            return model(
                batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
            ).log_probs

    with torch.no_grad():
        adapted = score()
        with model.disable_adapter():
            base, expected = score(), plain_logprobs(model, batch)
        assert (base - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert (base - adapted).abs().max() > 0.1
        model.merge_adapter()
        torch.testing.assert_close(score(), adapted, rtol=1e-10, atol=1e-10)
        with model.disable_adapter():  # PEFT takes the adapter out of the weights again
            torch.testing.assert_close(score(), base, rtol=1e-10, atol=1e-10)
    assert_equals_plain(model, batch, plain_logprobs, gradients)


def test_gradient_checkpointing(build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("qwen3").double())
    expected = plain_logprobs(model, batch)
    expected = gradients(model, expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = gradients(model, model_logprobs(model, *batch))
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_trained_base_gets_its_gradient(build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("phi").double())
    model.get_output_embeddings().base_layer.requires_grad_(True)
    got = assert_equals_plain(model, batch, plain_logprobs, gradients)
    assert {n.rsplit(".", 1)[1] for n in got if "lm_head.base_layer" in n} == {"weight", "bias"}


def test_gradient_of_the_frozen_weight_is_not_made(build_model, batch, monkeypatch):
    made = []
    real = linear_logprobs_torch.backward
    monkeypatch.setattr(
        linear_logprobs_torch, "backward", lambda *a: made.append(real(*a)) or made[-1]
    )
    model = adapt(build_model("llama"), r=5)
    model_logprobs(model, *batch).sum().backward()
    ((d_hidden, d_weight, d_bias),) = made
    assert d_bias is None
    assert d_hidden.shape[1] == 48  # 32 and 5, filled up to a multiple of 16
    assert d_weight.shape == (101, 16)
    made.clear()
    model.get_output_embeddings().lora_B.requires_grad_(False)
    model_logprobs(model, *batch).sum().backward()
    assert [gradient is None for gradient in made[0]] == [False, True, True]
    model.requires_grad_(False)
    assert not model_logprobs(model, *batch).requires_grad


def test_other_precisions(build_model, batch, plain_logprobs, gradients):
    """A base in bfloat16 under an adapter in float32; and autocast: no less exact than PEFT's own logits."""
    exact = adapt(build_model("llama").double())
    expected = plain_logprobs(exact, batch)
    expected_gradients = gradients(exact, expected)
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "lm_head"]}
    for way in ("bfloat16 base", "autocast"):
        base = build_model("llama")
        if way == "bfloat16 base":
            base = base.bfloat16()
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        model.load_state_dict(exact.state_dict())
        assert model.get_output_embeddings().lora_B["default"].weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            plain = plain_logprobs(model, batch).float()
            logps = model_logprobs(model, *batch)
        assert logps.dtype == torch.float32
        errors = [(each - expected).norm() for each in (logps, plain)]
        assert errors[0] <= 1.2 * errors[1], way
        got = gradients(model, logps)
        for name, gradient in expected_gradients.items():
            assert got[name].dtype == torch.float32
            assert (got[name] - gradient).norm() <= 0.15 * gradient.norm(), (way, name)


def test_dora_added_later_is_scored_right(build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("llama"))
    head = FusedHead(model)
    settings = {"r": 4, "target_modules": ["lm_head"], "task_type": "CAUSAL_LM", "use_dora": True}
    model.add_adapter("dora", peft.LoraConfig(**settings))
    model.base_model.set_adapter(["dora"])
    fill(model)
    with head:
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert_equals_plain(model, batch, plain_logprobs, gradients, out.log_probs)


def test_operation_of_ones_own(build_model, batch, plain_logprobs):
    model = adapt(build_model("llama"))
    seen = []

    def operation(hidden, weight, labels, bias, **options):
        seen.append(weight)
        return fastpo.linear_logprobs(hidden, weight, labels, bias, **options)

    with torch.no_grad(), FusedHead(model, operation=operation):
        with model.disable_adapter():
            out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            expected = plain_logprobs(model, batch)
        torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
        assert seen[0] is model.get_output_embeddings().base_layer.weight
        with pytest.raises(ValueError, match=r"operation: .*adapter default, expected it disabled"):
            model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)


def test_an_adapter_per_row_is_refused(build_model, batch):
    model = adapt(build_model("llama"))
    names = ["default", "__base__", "default"]
    with FusedHead(model), pytest.raises(ValueError, match=r"adapter_names: got \['default'"):
        model(input_ids=batch.input_ids, labels=batch.labels, adapter_names=names)
    assert model(input_ids=batch.input_ids, adapter_names=names).logits.shape[0] == 3


def test_nothing_is_left_behind(build_model, batch):
    model = adapt(build_model("llama"))
    model_logprobs(model, *batch)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_compiled(build_model, batch, plain_logprobs, gradients):
    torch.compiler.reset()
    model = adapt(build_model("llama"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with FusedHead(compiled):
        out = compiled(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels,
            use_cache=False,
        )  # fmt: skip
    assert_equals_plain(model, batch, plain_logprobs, gradients, out.log_probs)


@pytest.fixture
def one_process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["root only", "head apart", "every layer of the head apart"])
def test_fsdp(layout, one_process_group, build_model, batch, plain_logprobs, gradients):
    model = adapt(build_model("phi"))
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    head = FusedHead(model)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    layer = model.get_output_embeddings()
    units = {
        "root only": [],
        "head apart": [layer],
        "every layer of the head apart": [
            layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
        ],
    }  # fmt: skip
    for unit in units[layout]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    with head, warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model, out.log_probs)
    assert got.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (got[name].full_tensor() - gradient).norm()
        assert error <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize(
    "fault", ["scale left out", "gradient of B left out", "gradient of A left out"]
)
def test_faults_are_seen(fault, build_model, batch, plain_logprobs, gradients, monkeypatch):
    """Each makes the comparison above fail."""
    real = lora._adapter

    def faulty(layer, name, hidden):
        u, b, c = real(layer, name, hidden)
        if fault == "scale left out":
            u = u / layer.scaling[name]
        elif fault == "gradient of B left out":
            b = (b - b.detach()) * 0 + b.detach()
        else:
            u = u.detach() + 0 * u
        return u, b, c

    model = adapt(build_model("llama").double())
    assert_equals_plain(model, batch, plain_logprobs, gradients)
    monkeypatch.setattr(lora, "_adapter", faulty)
    with pytest.raises(AssertionError):
        assert_equals_plain(model, batch, plain_logprobs, gradients)
