"""Log-probs and every parameter's gradient equal those of the plain logits path, on each architecture."""

from __future__ import annotations

import pytest
import torch

from fastpo import fused_head

TOLERANCE = 1e-5


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def is_zero_in_theory(name: str) -> bool:
    """A softmax over keys does not see what all keys share, as long as no rotation sets them apart."""
    return name.endswith("self_attn.k_proj.bias") and "decoder" in name  # OPT


@pytest.mark.parametrize("batch_fixture", ["batch", "unpadded_batch"])
def test_equals_plain_logits(
    architecture, expected_tail, batch_fixture, request, build_model, plain_logprobs, gradients
):
    model = build_model(architecture)
    batch = request.getfixturevalue(batch_fixture)
    expected = plain_logprobs(model, batch)
    expected_gradients = gradients(model, expected)
    # Nothing may hide behind small numbers: labels cost several nats, parameters matter.
    assert expected[batch.labels != -100].mean() < -2
    for name, gradient in expected_gradients.items():
        assert is_zero_in_theory(name) == (gradient.norm() < 1e-2), name

    with fused_head(model) as head:
        out = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    assert head.method == "fused"
    assert head.tail.scale == pytest.approx(expected_tail[0], rel=1e-12)
    assert head.tail.softcap == expected_tail[1]
    assert out.logits is None
    assert out.loss is None
    assert relative_error(out.log_probs, expected) <= TOLERANCE
    torch.testing.assert_close(out.log_probs, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert (out.log_probs[batch.labels == -100] == 0).all()

    got_gradients = gradients(model, out.log_probs)
    assert (
        got_gradients.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    )
    for name, gradient in expected_gradients.items():
        if is_zero_in_theory(name):
            assert got_gradients[name].norm() < 1e-3
        else:
            assert relative_error(got_gradients[name], gradient) <= TOLERANCE, name


def test_load_balancing_loss_survives(build_model, batch, plain_logprobs, gradients):
    model = build_model("qwen3_moe")
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    plain = model(**inputs, output_router_logits=True)
    expected = gradients(model, plain_logprobs(model, batch), 10 * plain.aux_loss)

    with fused_head(model):
        out = model(**inputs, labels=batch.labels, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    got = gradients(model, out.log_probs, 10 * out.aux_loss)
    assert max(relative_error(got[name], expected[name]) for name in expected) <= TOLERANCE
    without = gradients(model, plain_logprobs(model, batch))
    router = "model.layers.0.mlp.gate.weight"
    assert relative_error(without[router], expected[router]) > 1e-3
