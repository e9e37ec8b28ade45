"""Every loss of the registry as a function: values, gradients, limits, margins."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastpo.losses import LOSSES
from fastpo.losses.batch_coupled import BetaDPO
from fastpo.losses.pairs import Pairs

NAMES = [name for name in LOSSES if name != "sigmoid"]
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}
MARGIN_LOSSES = {"simpo", "dpo", "robust", "rdpo", "spin", "cpo", "hinge", "ipo", "sigmoid_norm"}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def smoothed(x: float, eps: float) -> float:
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)


def reference_with_margin(
    name: str, pair: dict[str, float], beta: float, eps: float, gamma: float, gamma0: float
) -> float:
    """The nine losses that take a dynamic margin, for one pair, as METHODS and DESIGN write them."""
    w, l = pair["chosen_logps"], pair["rejected_logps"]
    rw, rl = pair["ref_chosen_logps"], pair["ref_rejected_logps"]
    nw, nl = pair["chosen_lengths"], pair["rejected_lengths"]
    delta = (w - rw) - (l - rl)
    mean_delta = (w - rw) / nw - (l - rl) / nl
    shift = gamma - gamma0
    if name == "simpo":
        return smoothed(beta * w / nw - beta * l / nl - gamma, eps)
    if name in ("dpo", "spin"):
        return smoothed(beta * delta - shift, eps)
    if name == "rdpo":
        return smoothed(beta * (delta - 0.05 * (nw - nl)) - shift, eps)
    if name == "cpo":
        return smoothed(beta * (w - l) - shift, eps)
    if name == "sigmoid_norm":
        return smoothed(beta * (mean_delta - shift / beta), eps)
    if name == "hinge":
        return max(0.0, 1 - (beta * delta - shift))
    if name == "ipo":
        return (mean_delta - shift / beta - 1 / (2 * beta)) ** 2
    assert name == "robust"
    x = beta * delta - shift
    return (-(1 - eps) * log_sigmoid(x) + eps * log_sigmoid(-x)) / (1 - 2 * eps)


def reference_kto_pair(pairs, beta):
    """The authors' 2B terms: 1 − σ(β(ratio_w − KL_l)) and 1 − σ(β(KL_w − ratio_l)); their mean is the loss."""
    ratio_w = (pairs["chosen_logps"] - pairs["ref_chosen_logps"]).tolist()
    ratio_l = (pairs["rejected_logps"] - pairs["ref_rejected_logps"]).tolist()
    kl_w, kl_l = (max(0.0, sum(r) / len(r)) for r in (ratio_w, ratio_l))
    terms = [1 - math.exp(log_sigmoid(beta * (r - kl_l))) for r in ratio_w]
    terms += [1 - math.exp(log_sigmoid(beta * (kl_w - r))) for r in ratio_l]
    return sum(terms) / len(terms)


def split(pairs, i):
    return {name: float(values[i]) for name, values in pairs.items()}


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES))
def test_dynamic_margin_matches_reference(name, eps, make_pairs):
    pairs = make_pairs(6)
    gamma = torch.rand(6, dtype=torch.float64) * 2
    got = LOSSES[name](**pairs, beta=0.3, label_smoothing=eps, gamma=gamma, gamma0=0.7)
    expected = [
        reference_with_margin(name, split(pairs, i), 0.3, eps, float(gamma[i]), 0.7)
        for i in range(6)
    ]
    torch.testing.assert_close(
        got, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def test_registry_knows_which_losses_take_a_margin(make_pairs):
    assert {n for n in NAMES if LOSSES[n].supports_dynamic_margin} == MARGIN_LOSSES
    pairs = make_pairs(3)
    for name in set(NAMES) - MARGIN_LOSSES:
        with pytest.raises(ValueError, match=f"{name}.*takes no dynamic margin"):
            LOSSES[name](
                **pairs, beta=0.1, label_smoothing=SMOOTHING.get(name, 0), gamma=torch.ones(3)
            )


def test_a_margin_is_one_number_per_pair(make_pairs):
    with pytest.raises(ValueError, match=r"gamma: got shape \(3, 1\), expected \(3,\)"):
        LOSSES["simpo"](**make_pairs(3), beta=2.0, gamma=torch.ones(3, 1))
    with pytest.raises(TypeError, match="gamma: got float, expected a tensor"):
        LOSSES["simpo"](**make_pairs(3), beta=2.0, gamma=0.5)


def test_tensors_on_different_devices_are_named(make_pairs):
    pairs = make_pairs(3)
    pairs["rejected_lengths"] = pairs["rejected_lengths"].to("meta")
    with pytest.raises(
        ValueError, match="rejected_lengths: got device meta, expected that of chosen_logps"
    ):
        LOSSES["simpo"](**pairs, beta=2.0)


@pytest.mark.parametrize("name", sorted(MARGIN_LOSSES))
def test_a_margin_equal_to_its_mean_changes_nothing(name, make_pairs):
    pairs = make_pairs()
    fixed = LOSSES[name](**pairs, beta=0.3, label_smoothing=0.1, gamma0=0.6)
    dynamic = LOSSES[name](
        **pairs, beta=0.3, label_smoothing=0.1, gamma0=0.6, gamma=torch.full((7,), 0.6).double()
    )
    torch.testing.assert_close(dynamic, fixed)


def test_kto_pair_matches_reference(make_pairs):
    pairs = make_pairs()
    got = LOSSES["kto_pair"](**pairs, beta=0.1).mean()
    assert got.item() == pytest.approx(reference_kto_pair(pairs, 0.1), abs=1e-12)


def test_sft_is_the_mean_over_chosen_tokens(make_pairs):
    pairs = make_pairs()
    got = LOSSES["sft"](**pairs, beta=0.1)
    expected = -pairs["chosen_logps"].sum() / pairs["chosen_lengths"].sum()
    torch.testing.assert_close(got.mean(), expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "beta_dpo"])
def test_gradients_match_finite_differences(name, make_pairs):
    pairs = make_pairs(5)
    logps = [pairs.pop(k).requires_grad_() for k in ("chosen_logps", "rejected_logps")]
    gamma = torch.rand(5, dtype=torch.float64) if name in MARGIN_LOSSES else None

    def losses(chosen, rejected):
        return LOSSES[name](
            chosen,
            rejected,
            **pairs,
            beta=0.2,
            label_smoothing=SMOOTHING.get(name, 0.0),
            gamma=gamma,
        )

    assert torch.autograd.gradcheck(losses, logps)


@pytest.mark.parametrize("beta", [0.1, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logps_stay_finite(name, beta):
    huge, one = -2e4, 0.0  # log-probs of an impossible and of a certain answer
    grid = [(w, l, rw, rl) for w in (huge, -5.0, one) for l in (huge, -3.0, one)
            for rw in (huge, one) for rl in (huge, one)]  # fmt: skip
    w, l, rw, rl = torch.tensor(grid, dtype=torch.float32).T.contiguous()
    logps = [w.requires_grad_(), l.requires_grad_()]
    lengths = {"chosen_lengths": torch.ones_like(w), "rejected_lengths": torch.ones_like(w)}
    losses = LOSSES[name](
        *logps, rw, rl, **lengths, beta=beta, label_smoothing=SMOOTHING.get(name, 0.0)
    )
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all(), losses
    for grad in torch.autograd.grad(losses.sum(), logps, allow_unused=name == "sft"):
        assert grad is None or torch.isfinite(grad).all(), grad


@pytest.mark.parametrize("name", NAMES)
def test_zero_lengths_do_not_divide(name, make_pairs):
    pairs = make_pairs(3)
    for half in ("chosen", "rejected"):
        for values in (f"{half}_logps", f"ref_{half}_logps", f"{half}_lengths"):
            pairs[values][1] = 0
    losses = LOSSES[name](**pairs, beta=0.1, label_smoothing=SMOOTHING.get(name, 0.0))
    assert torch.isfinite(losses).all()
    everywhere_zero = {k: torch.zeros_like(v) for k, v in pairs.items()}
    losses = LOSSES[name](**everywhere_zero, beta=0.1, label_smoothing=SMOOTHING.get(name, 0.0))
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize(
    "name", ["dpo", "spin", "rdpo", "sigmoid_norm", "cpo", "simpo", "aot_unpaired"]
)
def test_smoothing_spreads_the_loss_over_both_orders(name, make_pairs):
    """ℓ_ε = (1−ε) ℓ_0(pair) + ε ℓ_0(swapped pair)."""
    pairs = make_pairs()
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {k: pairs[re.sub("chosen|rejected", lambda m: other[m[0]], k)] for k in pairs}

    def mean(p, eps):
        return LOSSES[name](**p, beta=0.3, label_smoothing=eps).mean()

    torch.testing.assert_close(mean(pairs, 0.3), 0.7 * mean(pairs, 0) + 0.3 * mean(swapped, 0))


@pytest.mark.parametrize("name", ["dpo", "robust", "hinge", "ipo", "exo_pair", "discopop", "spin"])
def test_a_better_gap_costs_less(name, make_pairs):
    """Raising the chosen answer of a pair that is ranked wrongly lowers its loss."""
    pairs = make_pairs()
    pairs["chosen_logps"] = pairs["ref_chosen_logps"] - 5
    pairs["rejected_logps"] = pairs["ref_rejected_logps"]
    eps = SMOOTHING.get(name, 0.0)
    before = LOSSES[name](**pairs, beta=0.1, label_smoothing=eps)
    pairs["chosen_logps"] = pairs["chosen_logps"] + 0.5
    assert (LOSSES[name](**pairs, beta=0.1, label_smoothing=eps) < before).all()


def test_large_sums_keep_their_small_gap():
    """Sums of −3000 nats that differ by 1e-3: float32 arithmetic on them would lose the gap."""
    sums = torch.tensor([-3000.0], dtype=torch.float64)
    losses = LOSSES["dpo"](sums + 1e-3, sums, sums, sums, beta=1.0)
    assert losses.item() == pytest.approx(-log_sigmoid(1e-3), abs=1e-12)


class TestBetaDPO:
    @staticmethod
    def reference(gaps, beta, a, mean):
        return max(1e-3, beta * (1 + a * (sum(gaps) / len(gaps) - mean)))

    def build(self, pairs):
        return Pairs.build(*pairs.values())

    def gaps(self, pairs, beta):
        return (beta * self.build(pairs).logratios.gap).tolist()

    def test_beta_follows_the_gaps_of_all_pairs(self, make_pairs):
        """With every pair sampled nothing is random: two steps against the recursion."""
        beta, module = 0.3, BetaDPO(a=0.6, sample_fraction=1.0)
        mean, std = 0.0, 1.0
        for _ in range(3):
            pairs = make_pairs()
            g = self.gaps(pairs, beta)
            beta_used = self.reference(g, beta, 0.6, mean)
            expected = [smoothed(beta_used * x / beta, 0.1) for x in g]
            got = module(self.build(pairs), beta=beta, label_smoothing=0.1)
            assert got.tolist() == pytest.approx(expected, abs=1e-12)
            batch_mean = sum(g) / 7
            batch_std = math.sqrt(sum((x - batch_mean) ** 2 for x in g) / 6)
            mean, std = 0.9 * mean + 0.1 * batch_mean, 0.9 * std + 0.1 * batch_std
            assert module.gap_mean.item() == pytest.approx(mean, abs=1e-12)
            assert module.gap_std.item() == pytest.approx(std, abs=1e-12)

    def test_outliers_are_not_sampled(self):
        """Gaps 0 with deviation 1 and one of 60: its weight is e^−1800, the others' 1."""
        chosen = torch.tensor([0.0, 0.0, 60.0, 0.0, 0.0], dtype=torch.float64)
        zeros = torch.zeros(5, dtype=torch.float64)
        got = LOSSES["beta_dpo"](chosen, zeros, zeros, zeros, beta=1.0)
        assert got[2].item() == pytest.approx(-log_sigmoid(60.0), rel=1e-9)

    def test_sampling_frequencies(self, seed):
        """Two gaps of weights 1 and e^−½, one of them drawn: the first with probability 1/(1 + e^−½)."""
        module = BetaDPO(sample_fraction=0.5, seed=seed)
        gaps = torch.tensor([0.0, 1.0], dtype=torch.float64)
        draws = 4000
        first = sum(int(module._sample(gaps)[0] == 0) for _ in range(draws)) / draws
        assert first == pytest.approx(1 / (1 + math.exp(-0.5)), abs=5 * 0.5 / math.sqrt(draws))

    def test_no_gradient_through_beta(self, make_pairs):
        pairs = make_pairs()
        pairs["chosen_logps"].requires_grad_()
        module = BetaDPO(sample_fraction=1.0)
        beta_used = self.reference(self.gaps(pairs, 0.3), 0.3, 0.6, 0.0)
        losses = module(self.build(pairs), beta=0.3, label_smoothing=0.0)
        (got,) = torch.autograd.grad(losses.sum(), pairs["chosen_logps"], retain_graph=True)
        gap = self.build(pairs).logratios.gap
        (expected,) = torch.autograd.grad(
            -torch.nn.functional.logsigmoid(beta_used * gap).sum(), pairs["chosen_logps"]
        )
        torch.testing.assert_close(got, expected)

    def test_state_resumes(self, make_pairs):
        steps = [self.build(make_pairs(10)) for _ in range(5)]
        whole = BetaDPO(seed=3)
        expected = [whole(p, beta=0.2, label_smoothing=0.0) for p in steps]
        first = BetaDPO(seed=3)
        for p in steps[:3]:
            first(p, beta=0.2, label_smoothing=0.0)
        state = first.state_dict()
        assert all(isinstance(v, torch.Tensor) for v in state.values())
        second = BetaDPO(seed=99)
        second.load_state_dict(state)
        for p, want in zip(steps[3:], expected[3:], strict=True):
            assert torch.equal(second(p, beta=0.2, label_smoothing=0.0), want)

    def test_evaluation_leaves_the_state_alone(self, make_pairs):
        module, pairs = BetaDPO(), self.build(make_pairs(10))
        module(pairs, beta=0.2, label_smoothing=0.0)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        module.eval()
        once = module(pairs, beta=0.2, label_smoothing=0.0)
        assert torch.equal(once, module(pairs, beta=0.2, label_smoothing=0.0))
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])

    def test_a_single_pair(self, make_pairs):
        module = BetaDPO()
        assert torch.isfinite(
            module(self.build(make_pairs(1)), beta=0.2, label_smoothing=0.0)
        ).all()
        assert torch.isfinite(module.gap_std)


class TestErrors:
    @pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
    def test_beta(self, beta, make_pairs):
        with pytest.raises(ValueError, match="beta: got"):
            LOSSES["dpo"](**make_pairs(), beta=beta)

    @pytest.mark.parametrize(
        ("name", "eps"), [("dpo", -0.1), ("dpo", 0.5), ("robust", 0.5), ("exo_pair", 0.0)]
    )
    def test_label_smoothing(self, name, eps, make_pairs):
        with pytest.raises(ValueError, match="label_smoothing: got"):
            LOSSES[name](**make_pairs(), beta=0.1, label_smoothing=eps)

    @pytest.mark.parametrize("name", NAMES)
    def test_reference(self, name, make_pairs):
        pairs = make_pairs()
        with_reference = LOSSES[name](**pairs, beta=0.1, label_smoothing=SMOOTHING.get(name, 0))
        pairs["ref_chosen_logps"] = pairs["ref_rejected_logps"] = None
        if name in ("simpo", "cpo", "orpo", "sft"):
            assert not LOSSES[name].needs_reference
            assert torch.equal(LOSSES[name](**pairs, beta=0.1), with_reference)
        else:
            with pytest.raises(ValueError, match=f"ref_chosen_logps.*{name}"):
                LOSSES[name](**pairs, beta=0.1, label_smoothing=SMOOTHING.get(name, 0))

    def test_lengths(self, make_pairs):
        pairs = make_pairs()
        pairs["chosen_lengths"] = pairs["rejected_lengths"] = None
        assert LOSSES["dpo"](**pairs, beta=0.1).shape == (7,)
        with pytest.raises(ValueError, match="chosen_lengths"):
            LOSSES["simpo"](**pairs, beta=0.1)

    def test_shapes_and_dtypes(self, make_pairs):
        pairs = make_pairs()
        with pytest.raises(ValueError, match=r"rejected_logps: got shape \(6,\)"):
            LOSSES["dpo"](**{**pairs, "rejected_logps": pairs["rejected_logps"][:6]}, beta=0.1)
        with pytest.raises(ValueError, match="ref_chosen_logps, ref_rejected_logps: got one"):
            LOSSES["dpo"](**{**pairs, "ref_chosen_logps": None}, beta=0.1)
        with pytest.raises(TypeError, match=r"chosen_logps: got dtype torch\.int64"):
            LOSSES["dpo"](**{**pairs, "chosen_logps": pairs["chosen_lengths"]}, beta=0.1)
        with pytest.raises(TypeError, match="ref_chosen_logps: got float"):
            LOSSES["dpo"](**{**pairs, "ref_chosen_logps": 0.0}, beta=0.1)
        with pytest.raises(ValueError, match="chosen_logps: got shape"):
            LOSSES["cpo"](torch.zeros(0), torch.zeros(0), beta=0.1)

    @pytest.mark.parametrize(
        ("name", "option", "value"),
        [
            ("discopop", "discopop_tau", 0.0),
            ("beta_dpo", "momentum", 1.0),
            ("beta_dpo", "sample_fraction", 0.0),
        ],
    )
    def test_option_values(self, name, option, value, make_pairs):
        with pytest.raises(ValueError, match=f"{option}: got {value}"):
            LOSSES[name](**make_pairs(), beta=0.1, **{option: value})

    def test_unknown_option(self, make_pairs):
        with pytest.raises(TypeError, match=r"discopop_tau.*'dpo'.*none"):
            LOSSES["dpo"](**make_pairs(), beta=0.1, discopop_tau=0.1)
        with pytest.raises(TypeError, match=r"tau: not an option.*discopop_tau"):
            LOSSES["discopop"](**make_pairs(), beta=0.1, tau=0.1)
