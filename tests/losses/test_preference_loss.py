"""PreferenceLoss: layouts, references, the SFT term, margins, metrics, masked sequences, errors."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from fastpo.losses import LOSSES, PreferenceLoss

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 7, 6, 11
SMOOTHING = {"exo_pair": 1e-2, "robust": 0.1}
NAMES = [name for name in LOSSES if name != "sigmoid"]


def dense_token_logps(hidden, weight, bias, labels):
    """Log-softmax over stored logits; 0 where ignored."""
    logps = (hidden @ weight.T + bias).log_softmax(-1)
    chosen = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0.0, chosen)


class Batch:
    """A half-and-half batch in float64, its reference, and its packed form."""

    def __init__(self) -> None:
        def draw():
            shapes = ((2 * PAIRS, TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
            return [torch.randn(s, dtype=torch.float64) for s in shapes]

        self.hidden, self.weight, self.bias = draw()
        self.ref_hidden, self.ref_weight, self.ref_bias = draw()
        self.labels = torch.randint(VOCAB, (2 * PAIRS, TOKENS))
        self.bounds = torch.randint(2, TOKENS + 1, (2 * PAIRS,))  # padding starts here
        columns = torch.arange(TOKENS)
        self.labels[(columns == 0) | (columns >= self.bounds[:, None])] = -100  # prompt and padding

    @property
    def args(self):
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def reference(self):
        return {
            "ref_hidden": self.ref_hidden,
            "ref_weight": self.ref_weight,
            "ref_bias": self.ref_bias,
        }

    def token_logps(self):
        return dense_token_logps(self.hidden, self.weight, self.bias, self.labels)

    def ref_logps(self):
        tokens = dense_token_logps(self.ref_hidden, self.ref_weight, self.ref_bias, self.labels)
        return tokens.sum(1)

    def lengths(self):
        return (self.labels != -100).sum(1)

    def packed(self, x):
        """Rows without their padding, one after the other."""
        return torch.cat([row[:end] for row, end in zip(x, self.bounds, strict=True)])

    def cu_seqlens(self):
        return torch.nn.functional.pad(self.bounds.cumsum(0), (1, 0))


@pytest.fixture
def batch(seed):
    return Batch()


def loss_of(name, **kwargs):
    kwargs = {"beta": 0.3, "label_smoothing": SMOOTHING.get(name, 0.0), "sft_weight": 0.0, **kwargs}
    return PreferenceLoss(name, **kwargs)


def margin_by_rank(gaps, gamma0):
    """A stand-in for DynamicMargin: mean γ0, larger for larger gaps."""
    rank = gaps.argsort().argsort().to(gaps.dtype)
    return gamma0 * (1 + (rank - rank.mean()) / len(gaps))


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_the_registered_function_of_dense_sums(name, batch):
    sums, ref, lengths = batch.token_logps().sum(1), batch.ref_logps(), batch.lengths()
    expected = LOSSES[name](
        *sums.chunk(2),
        *ref.chunk(2),
        chosen_lengths=lengths[:PAIRS],
        rejected_lengths=lengths[PAIRS:],
        beta=0.3,
        label_smoothing=SMOOTHING.get(name, 0.0),
        gamma0=0.5,
    )
    out = loss_of(name)(*batch.args, **batch.reference)
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.loss, expected.mean())
    torch.testing.assert_close(torch.cat([out.chosen_logps, out.rejected_logps]), sums)
    # the same from what an outer trainer may already hold
    for same in (
        loss_of(name).from_token_logps(batch.token_logps(), batch.labels, ref_logps=ref),
        loss_of(name).from_sequence_logps(*sums.chunk(2), *ref.chunk(2), *lengths.chunk(2)),
    ):
        torch.testing.assert_close(same.loss, out.loss)


@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "aot", "cpo"])
def test_packed_equals_padded(name, batch):
    padded_inputs = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    packed_inputs = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    padded = loss_of(name, sft_weight=0.5)(
        *padded_inputs, batch.labels, batch.bias, ref_logps=batch.ref_logps()
    )
    packed = loss_of(name, sft_weight=0.5)(
        batch.packed(packed_inputs[0]),
        packed_inputs[1],
        batch.packed(batch.labels),
        batch.bias,
        cu_seqlens=batch.cu_seqlens(),
        ref_hidden=batch.packed(batch.ref_hidden),
        ref_weight=batch.ref_weight,
        ref_bias=batch.ref_bias,
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(packed.losses, padded.losses)
    assert packed.metrics() == pytest.approx(padded.metrics(), rel=1e-9, abs=1e-9)
    for got, expected in zip(
        torch.autograd.grad(packed.loss, packed_inputs),
        torch.autograd.grad(padded.loss, padded_inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_no_gradient_reaches_the_reference(batch):
    for tensor in (batch.ref_hidden, batch.ref_weight, batch.ref_bias):
        tensor.requires_grad_()
    batch.hidden.requires_grad_()
    loss_of("dpo")(*batch.args, **batch.reference).loss.backward()
    assert batch.ref_hidden.grad is None
    assert batch.ref_weight.grad is None
    assert batch.hidden.grad.abs().sum() > 0


def test_logit_transform_reaches_policy_and_reference(batch):
    loss_fn = loss_of("dpo", logit_scale=0.5, softcap=3.0, temperature=0.7)

    def sums(hidden, weight, bias):
        logits = 3.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 3.0) / 0.7
        logps = (
            logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        )
        return torch.where(batch.labels == -100, 0.0, logps).sum(1)

    ratios = sums(batch.hidden, batch.weight, batch.bias)
    ratios = ratios - sums(batch.ref_hidden, batch.ref_weight, batch.ref_bias)
    expected = -torch.nn.functional.logsigmoid(0.3 * (ratios[:PAIRS] - ratios[PAIRS:]))
    torch.testing.assert_close(loss_fn(*batch.args, **batch.reference).losses, expected)


@pytest.mark.parametrize("name", ["dpo", "cpo", "orpo", "simpo"])
def test_sft_term(name, batch):
    chosen = batch.labels[:PAIRS] != -100
    nll = -batch.token_logps()[:PAIRS][chosen].mean()
    plain = loss_of(name)(*batch.args, **batch.reference)
    with_sft = loss_of(name, sft_weight=0.7)(*batch.args, **batch.reference)
    torch.testing.assert_close(with_sft.nll_loss, nll)
    torch.testing.assert_close(with_sft.loss, plain.loss + 0.7 * nll)
    assert plain.nll_loss is None
    assert "nll_loss" not in plain.metrics()
    assert PreferenceLoss(name).sft_weight == (1.0 if name in ("cpo", "orpo") else 0.0)


class TestMargin:
    @pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "ipo", "sigmoid_norm"])
    def test_gamma_is_solved_on_the_reward_gap(self, name, batch):
        """γ moves the gap one for one: loss(γ) with gap g is the fixed-margin loss of the shifted gap."""
        seen = {}

        def margin(gaps, gamma0):
            seen["gaps"], seen["gamma0"] = gaps, gamma0
            return margin_by_rank(gaps, gamma0)

        loss_fn = loss_of(name, gamma_beta_ratio=2.0, margin=margin)
        out = loss_fn(*batch.args, ref_logps=batch.ref_logps())
        assert seen["gamma0"] == pytest.approx(0.6)
        assert not seen["gaps"].requires_grad
        sums, lengths, ref = batch.token_logps().sum(1), batch.lengths(), batch.ref_logps()
        score = {
            "dpo": sums - ref,
            "simpo": sums / lengths,
            "cpo": sums,
            "ipo": (sums - ref) / lengths,
            "sigmoid_norm": (sums - ref) / lengths,
        }[name]
        gaps = 0.3 * (score[:PAIRS] - score[PAIRS:])
        torch.testing.assert_close(seen["gaps"], gaps)
        gamma = margin_by_rank(gaps, 0.6)
        torch.testing.assert_close(out.gamma, gamma)
        argument = gaps - (gamma if name == "simpo" else gamma - 0.6)
        if name == "ipo":
            expected = (argument / 0.3 - 1 / 0.6) ** 2
        else:
            expected = -torch.nn.functional.logsigmoid(argument)
        torch.testing.assert_close(out.losses, expected)

    def test_metrics(self, batch):
        gamma = torch.tensor([0.1, 0.2, 0.3, 1.4], dtype=torch.float64)
        out = loss_of("simpo", margin=lambda gaps, gamma0: gamma)(*batch.args)
        metrics = out.metrics()
        assert metrics["gamma/mean"] == pytest.approx(0.5)
        assert metrics["gamma/min"] == pytest.approx(0.1)
        assert metrics["gamma/max"] == pytest.approx(1.4)
        assert metrics["gamma/std"] == pytest.approx(math.sqrt((0.16 + 0.09 + 0.04 + 0.81) / 4))
        assert not any(k.startswith("gamma") for k in loss_of("simpo")(*batch.args).metrics())

    def test_target_names(self, batch):
        by_ratio = PreferenceLoss("simpo", beta=2.5, gamma_beta_ratio=0.2)(*batch.args).loss
        by_value = PreferenceLoss("simpo", beta=2.5, simpo_gamma=0.5)(*batch.args).loss
        default = PreferenceLoss("simpo", beta=2.5)(*batch.args).loss
        assert by_ratio == by_value == default
        assert PreferenceLoss("simpo", beta=2.5, simpo_gamma=0.9)(*batch.args).loss != default


def test_metrics_by_hand(batch):
    beta = 0.3
    metrics = loss_of("dpo")(*batch.args, **batch.reference).metrics()
    logits = batch.hidden @ batch.weight.T + batch.bias
    probs = logits.softmax(-1)
    kept = batch.labels != -100
    entropy = -(probs * probs.log()).sum(-1)
    top1 = logits.argmax(-1) == batch.labels
    sums = batch.token_logps().sum(1)
    chosen, rejected = (beta * (sums - batch.ref_logps())).chunk(2)
    half = kept.clone()
    half[PAIRS:] = False
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "logps/chosen": sums[:PAIRS].mean(),
        "logps/rejected": sums[PAIRS:].mean(),
        "logits/chosen": logits.mean(-1)[half].mean(),
        "logits/rejected": logits.mean(-1)[kept & ~half].mean(),
        "entropy": entropy[kept].mean(),
        "mean_token_accuracy": top1[half].double().mean(),
        "num_tokens": kept.sum(),
    }
    assert metrics == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9, abs=1e-9)
    assert all(type(v) is float for v in metrics.values())


def test_metrics_without_stats(batch):
    metrics = loss_of("dpo", return_stats=False)(*batch.args, **batch.reference).metrics()
    assert not {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"} & set(metrics)
    assert {"rewards/margins", "logps/chosen", "num_tokens"} <= set(metrics)


@pytest.mark.parametrize("half", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_a_pair_with_an_unlabelled_answer_counts_for_nothing(name, half, batch):
    rows = {"chosen": [1], "rejected": [PAIRS + 1], "both": [1, PAIRS + 1]}[half]
    batch.labels[rows] = -100
    batch.hidden.requires_grad_()
    out = loss_of(name, sft_weight=0.5)(*batch.args, **batch.reference)
    assert torch.isfinite(out.losses).all()
    assert all(math.isfinite(v) for v in out.metrics().values())
    out.loss.backward()
    assert torch.isfinite(batch.hidden.grad).all()
    assert (batch.hidden.grad[[1, PAIRS + 1]] == 0).all()
    assert batch.hidden.grad.abs().sum() > 0
    if not LOSSES[name].reorders_pairs:
        assert out.losses[1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_label_at_all(name, batch):
    batch.labels[:] = -100
    batch.hidden.requires_grad_()
    out = loss_of(name, sft_weight=0.5)(*batch.args, **batch.reference)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert (batch.hidden.grad == 0).all()
    assert all(math.isfinite(v) for v in out.metrics().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_dtypes(dtype, batch):
    args = [x.to(dtype) for x in (batch.hidden, batch.weight)]
    out = loss_of("dpo", sft_weight=1.0)(
        *args, batch.labels, batch.bias.to(dtype), ref_logps=batch.ref_logps().float()
    )
    for tensor in (out.loss, out.losses, out.chosen_logps, out.chosen_rewards, out.nll_loss):
        assert tensor.dtype == torch.float32


def test_state_stays_float64_in_a_module_that_is_cast(batch):
    loss_fn, cast = loss_of("beta_dpo"), loss_of("beta_dpo").to(torch.bfloat16)
    for _ in range(2):
        expected, got = (f(*batch.args, **batch.reference).loss for f in (loss_fn, cast))
        assert got == expected


def test_state_is_saved(batch):
    loss_fn = loss_of("beta_dpo", momentum=0.5)
    for _ in range(3):
        loss_fn(*batch.args, **batch.reference)
    other = loss_of("beta_dpo", momentum=0.5, seed=7)
    other.load_state_dict(loss_fn.state_dict())
    fresh = loss_of("beta_dpo", momentum=0.5).state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in other.state_dict().items())
    expected = loss_fn(*batch.args, **batch.reference).loss
    assert other(*batch.args, **batch.reference).loss == expected
    assert not loss_of("dpo").state_dict()


class TestErrors:
    def test_unknown_loss_names_the_nearest(self):
        with pytest.raises(ValueError, match=r"'simop'.*'simpo'"):
            PreferenceLoss("simop")

    def test_both_targets(self):
        with pytest.raises(ValueError, match="gamma_beta_ratio, simpo_gamma: got both"):
            PreferenceLoss("simpo", gamma_beta_ratio=0.5, simpo_gamma=1.0)

    @pytest.mark.parametrize(
        ("kwargs", "match"),
        [
            ({"beta": 0.0}, "beta: got 0.0"),
            ({"beta": -1.0}, "beta: got -1.0"),
            ({"label_smoothing": 0.5}, "label_smoothing: got 0.5"),
            ({"loss_type": "exo_pair"}, "label_smoothing: got 0"),
            ({"sft_weight": -1.0}, "sft_weight: got -1.0"),
            ({"simpo_gamma": -0.1}, "simpo_gamma: got -0.1"),
            ({"loss_type": "sft", "margin": margin_by_rank}, "'sft' takes no dynamic margin"),
        ],
    )
    def test_numbers(self, kwargs, match):
        with pytest.raises(ValueError, match=match):
            PreferenceLoss(**kwargs)

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="discopop_tau: not an option of loss 'dpo'"):
            PreferenceLoss("dpo", discopop_tau=0.1)

    def test_settings_without_effect_are_said(self):
        with pytest.warns(UserWarning, match="label_smoothing=0.1 has no effect on loss 'ipo'"):
            PreferenceLoss("ipo", label_smoothing=0.1)
        with pytest.warns(UserWarning, match="no effect on loss 'dpo' without a dynamic margin"):
            PreferenceLoss("dpo", simpo_gamma=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PreferenceLoss("dpo", simpo_gamma=1.0, margin=margin_by_rank, label_smoothing=0.1)
            PreferenceLoss("simpo", simpo_gamma=1.0)

    def test_odd_rows(self, batch):
        with pytest.raises(ValueError, match="labels: got 7 rows, expected an even number"):
            loss_of("cpo")(batch.hidden[1:], batch.weight, batch.labels[1:])
        with pytest.raises(ValueError, match="cu_seqlens: got 7 segments, expected an even number"):
            loss_of("cpo")(
                batch.packed(batch.hidden),
                batch.weight,
                batch.packed(batch.labels),
                cu_seqlens=batch.cu_seqlens()[:-1],
            )
        with pytest.raises(ValueError, match="labels: got 0 rows"):
            loss_of("cpo").from_token_logps(torch.zeros(0, 3), torch.zeros(0, 3).long())

    def test_reference(self, batch):
        loss_fn = loss_of("dpo")
        with pytest.raises(ValueError, match=r"ref_logps: got None.*'dpo' needs a reference"):
            loss_fn(*batch.args)
        with pytest.raises(ValueError, match=r"ref_chosen_logps.*'dpo'"):
            loss_fn.from_token_logps(batch.token_logps(), batch.labels)
        with pytest.raises(ValueError, match="ref_logps, ref_hidden: got both"):
            loss_fn(*batch.args, ref_logps=batch.ref_logps(), **batch.reference)
        with pytest.raises(ValueError, match="ref_weight: got None"):
            loss_fn(*batch.args, ref_hidden=batch.ref_hidden)
        with pytest.raises(ValueError, match="ref_hidden: got None"):
            loss_fn(*batch.args, ref_weight=batch.ref_weight)
        with pytest.raises(ValueError, match=r"ref_logps: got shape \(4,\), expected \(8,\)"):
            loss_fn(*batch.args, ref_logps=batch.ref_logps()[:PAIRS])
        with pytest.raises(ValueError, match="ref_logps: got device meta"):
            loss_fn(*batch.args, ref_logps=batch.ref_logps().to("meta"))
        with pytest.raises(
            ValueError, match="ref_hidden, ref_weight or ref_bias: labels: got shape"
        ):
            loss_fn(*batch.args, **batch.reference | {"ref_hidden": batch.ref_hidden[:, 1:]})

    def test_margins_of_another_shape(self, batch):
        for shape in ((PAIRS, 1), (PAIRS - 1,)):
            loss_fn = loss_of("simpo", margin=lambda gaps, gamma0, s=shape: torch.ones(s))
            with pytest.raises(
                ValueError, match=r"gamma: got shape .* a target margin for each pair"
            ):
                loss_fn(*batch.args)
