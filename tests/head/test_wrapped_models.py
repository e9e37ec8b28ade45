"""The head under PEFT, DDP, accelerate and FSDP2: same log-probs, same gradients as the plain logits path."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastpo
from fastpo import fused_head, model_logprobs
from fastpo.head import FusedHead


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Gradients to 1e-5 relative, none of them zero."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-2, name
        assert (got[name] - gradient).norm() / gradient.norm() <= 1e-5, name


def adapt(model, **settings):
    """LoRA with weights in B that are not zero, as after some training."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.5)
    return adapted


@pytest.fixture
def one_process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "settings", "method"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}, "fused"),
        ("phi", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "fused"),
        ("cohere", {"target_modules": ["q_proj", "lm_head"]}, "fused"),
        ("cohere", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "chunked"),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "chunked"),
    ],
)
def test_peft(name, settings, method, build_model, batch, plain_logprobs, gradients, monkeypatch):
    monkeypatch.setattr("fastpo.head.fallback.budget_bytes", lambda device: 16 * 101 * 5)  # 5 rows
    model = adapt(build_model(name), **settings).eval()
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    fallback = pytest.warns(UserWarning, match="head of .* is a Linear, not a plain linear layer")
    with fallback if method == "chunked" else contextlib.nullcontext():
        head = FusedHead(model, return_stats=True)
    assert head.method == method
    head_rows: list[int] = []
    if method == "chunked":
        layer = model.get_output_embeddings().base_layer
        layer.register_forward_hook(lambda m, args, out: head_rows.append(out.shape[-2]))
    with head:
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        with model.disable_adapter():  # the reference model, from the same weights
            base = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, out.log_probs), expected_gradients)
    assert max(head_rows, default=0) <= 5  # in the backward as well
    with model.disable_adapter():
        expected_base = plain_logprobs(model, batch)
    assert not torch.allclose(expected_base, expected, atol=0.1)
    torch.testing.assert_close(base.log_probs, expected_base, rtol=1e-5, atol=1e-5)
    assert out.token_stats.entropy.shape == batch.labels.shape


class Doubled(torch.nn.Linear):
    """Not W h + b, though a linear layer by its class."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("kind", ["subclass", "instance"])
def test_other_linear_layers(kind, build_model, batch, plain_logprobs, gradients):
    model = build_model("cohere")
    if kind == "subclass":
        model.lm_head.__class__ = Doubled
    else:
        forward = model.lm_head.forward
        model.lm_head.forward = lambda hidden: 2 * forward(hidden)
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    with pytest.warns(UserWarning, match="not a plain linear layer"):
        logps = model_logprobs(model, *batch)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients(model, logps), expected_gradients)
    assert (kind == "instance") == ("forward" in vars(model.lm_head))


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}, {}])
def test_ddp(options, one_process_group, build_model, batch, plain_logprobs, gradients):
    model = build_model("gemma2")
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    wrapped = DistributedDataParallel(model, **options)
    with fused_head(wrapped):
        for _ in range(2):  # DDP's static graph acts on the second
            out = wrapped(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            got = gradients(model, out.log_probs)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert_same(got, expected_gradients)


@pytest.fixture
def fresh_accelerator_state():
    """accelerate holds one mixed-precision setting per process, which any earlier test may have made."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("install", ["before", "after"])
def test_accelerate_mixed_precision(
    install, fresh_accelerator_state, build_model, batch, gradients
):
    """accelerate puts autocast around ``forward`` and takes it off again."""
    model = build_model("llama")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    head = FusedHead(model)
    if install == "before":
        head.install()
        prepared = accelerator.prepare_model(model)
    else:
        prepared = accelerator.prepare_model(model)
        head.install()
    logits = prepared(batch.input_ids, attention_mask=batch.attention_mask).logits
    out = prepared(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    head.remove()
    logps = torch.log_softmax(logits, -1)
    expected = logps.gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1)
    expected = torch.where(batch.labels == -100, 0.0, expected)
    # The reference has its logits rounded to bfloat16, of up to 32: 0.07 off.
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=0.15)
    assert not torch.equal(out.log_probs, expected)
    assert min(g.norm() for g in gradients(model, out.log_probs).values()) > 1e-2
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    model(batch.input_ids, labels=batch.labels).loss.backward()  # nothing of the head is left


@pytest.mark.parametrize("layout", ["root only", "head apart", "layers and head apart"])
@pytest.mark.parametrize("install", ["before", "after"])
def test_fsdp(layout, install, one_process_group, build_model, batch, plain_logprobs, gradients):
    model = build_model("phi")
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    head = FusedHead(model)
    if install == "before":
        head.install()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    if layout == "layers and head apart":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if layout != "root only":
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    if install == "after":
        head.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model, out.log_probs)
    assert_same({name: g.full_tensor() for name, g in got.items()}, expected_gradients)
    head.remove()
    logps = model_logprobs(model, *batch)
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_fsdp_on_two_processes(seed, tmp_path, build_model, make_batch, plain_logprobs):
    torch.manual_seed(seed)
    model = build_model("phi")
    batches = [make_batch(), make_batch()]
    coefficients = torch.randn(2, *batches[0].labels.shape)
    expected = [plain_logprobs(model, batch) for batch in batches]
    sum((logps * c).sum() / 2 for logps, c in zip(expected, coefficients, strict=True)).backward()
    expected_gradients = {name: p.grad for name, p in model.named_parameters()}

    worker = Path(__file__).with_name("fsdp_worker.py")
    folders = [str(worker.parent), str(Path(fastpo.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), tmp_path / "store", str(seed), out],
            env=environment,
        )
        for rank, out in enumerate(outs)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for out, logps in zip(outs, expected, strict=True):
        results = torch.load(out)
        assert len(results) == 3
        for got, gradients_of_layout in results.values():
            torch.testing.assert_close(got, logps.detach(), rtol=1e-5, atol=1e-5)
            assert_same(gradients_of_layout, expected_gradients)
