"""PreferenceLoss with a noise generator: both players' gradients, SPIN as the zero-noise case, γ, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastpo
from fastpo.losses import LOSSES, PreferenceLoss
from fastpo.losses.noisy_reference import score_with_noise

PAIRS, TOKENS, HIDDEN, VOCAB = 4, 7, 6, 11
SMOOTHING = {"exo_pair": 1e-2, "robust": 0.1}
WITH_REFERENCE = [n for n, loss in LOSSES.items() if loss.needs_reference and n != "sigmoid"]


class Batch:
    """A half-and-half batch in float64, its reference, a generator and its packed form."""

    def __init__(self, rank: int | None = None, sigma: float = 0.7) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        self.hidden = draw(2 * PAIRS, TOKENS, HIDDEN).requires_grad_()
        self.weight = draw(VOCAB, HIDDEN).requires_grad_()
        self.labels = torch.randint(VOCAB, (2 * PAIRS, TOKENS))
        for row in range(2 * PAIRS):
            self.labels[row, int(torch.randint(1, TOKENS + 1, ())) :] = -100
        self.reference = {
            "ref_hidden": draw(2 * PAIRS, TOKENS, HIDDEN),
            "ref_weight": draw(VOCAB, HIDDEN),
            "ref_bias": draw(VOCAB),
        }
        self.generator = fastpo.NoiseGenerator(
            HIDDEN, VOCAB, rank=rank, init_std=sigma, dtype=torch.float64
        )
        with torch.no_grad():
            self.generator.bias.normal_(std=max(sigma, 1e-300)).mul_(sigma > 0)

    @property
    def players(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.hidden, self.weight], list(self.generator.parameters())

    def run(self, loss_fn: PreferenceLoss, **options: Any) -> Any:
        return loss_fn(
            self.hidden, self.weight, self.labels, **self.reference, **({"noise_seed": 5} | options)
        )

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Dense: (2B,) policy, (2B,) reference, (B,) noisy rejected reference, (2B,) lengths; (N, V) σ."""
        ref = self.reference
        policy = self.hidden @ self.weight.t()
        clean = ref["ref_hidden"] @ ref["ref_weight"].t() + ref["ref_bias"]
        inner = ref["ref_hidden"]
        if self.generator.proj is not None:
            inner = inner @ self.generator.proj.t()
        sigma = inner @ self.generator.weight.t() + self.generator.bias
        index = torch.arange(self.labels.numel()).view(self.labels.shape)
        epsilon = fastpo.philox_normal(5, index[..., None], torch.arange(VOCAB)).double()
        kept = self.labels != -100

        def score(logits: Tensor) -> Tensor:
            tokens = logits.log_softmax(-1).gather(2, self.labels.clamp(min=0)[..., None])[..., 0]
            return torch.where(kept, tokens, 0.0).sum(1)

        rejected = kept.clone()
        rejected[:PAIRS] = False
        noisy = score(clean + sigma * epsilon)[PAIRS:]
        return score(policy), score(clean), noisy, kept.sum(1), sigma[rejected]


def make(batch: Batch, loss_type: str = "spin", **options: Any) -> PreferenceLoss:
    return PreferenceLoss(
        loss_type,
        noise=batch.generator,
        label_smoothing=SMOOTHING.get(loss_type, 0.0),
        **{"beta": 0.3, "noise_alpha": 0.4, **options},
    )


def gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]


def assert_all_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [None, 2], ids=["full rank", "low rank"])
@pytest.mark.parametrize("loss_type", WITH_REFERENCE)
def test_joint_gradients_are_those_of_the_two_losses(
    loss_type: str, rank: int | None, seed: int
) -> None:
    """Against dense float64: θ gets ∇ℓ, θσ gets −∇ℓ + α∇mean(σ²), from one backward."""
    batch = Batch(rank)
    policy, noise = batch.players
    out = batch.run(make(batch, loss_type))

    own, ref, noisy, lengths, sigma = batch.sums()
    model_loss = LOSSES[loss_type](
        own[:PAIRS], own[PAIRS:], ref[:PAIRS].detach(), noisy,
        chosen_lengths=lengths[:PAIRS], rejected_lengths=lengths[PAIRS:],
        beta=0.3, label_smoothing=SMOOTHING.get(loss_type, 0.0),
    ).mean()  # fmt: skip
    penalty = sigma.square().mean()
    noise_loss = -model_loss + 0.4 * penalty
    assert_all_close(gradients(out.loss, policy), gradients(model_loss, policy))
    assert_all_close(gradients(out.loss, noise), gradients(noise_loss, noise))
    metrics = out.metrics()
    expected = {
        "loss/model": model_loss, "loss/noise": noise_loss, "noise/penalty": penalty,
        "noise/sigma_mean": penalty.sqrt(),
    }  # fmt: skip
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), rel=1e-9, abs=1e-9), name
    total = metrics["loss/model"] + metrics["loss/noise"]
    assert out.loss.item() == pytest.approx(total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("loss_type", ["spin", "ipo", "kto_pair"])
def test_one_joint_step_equals_the_two_players_steps(loss_type: str, seed: int) -> None:
    batch = Batch()
    policy, noise = batch.players
    joint, model, generator = (
        batch.run(make(batch, loss_type, sft_weight=0.2), player=p)
        for p in ("both", "model", "noise")
    )
    assert_all_close(gradients(joint.loss, policy), gradients(model.loss, policy))
    assert_all_close(gradients(joint.loss, noise), gradients(generator.loss, noise))
    assert not any(g.any() for g in gradients(model.loss + 0 * joint.loss, noise))
    assert not any(g.any() for g in gradients(generator.loss + 0 * joint.loss, policy))
    values = [out.loss.item() for out in (joint, model, generator)]
    assert values[0] == pytest.approx(values[1] + values[2], abs=1e-9)
    assert values[1] == joint.metrics()["loss/model"]
    assert values[2] == pytest.approx(joint.metrics()["loss/noise"], abs=1e-9)


def stepped(batch: Batch, frozen: list[Tensor], size: float) -> tuple[float, float, list[Tensor]]:
    """The noisy margin before and after a joint gradient step of that size in which ``frozen`` stays."""

    def margin(out: Any) -> float:
        rewards = out.chosen_rewards - out.rejected_rewards
        return float(rewards.mean()) + out.metrics()["noise/margin_shift"]

    for tensor in frozen:
        tensor.requires_grad_(False)
    moving = [t for player in batch.players for t in player if t.requires_grad]
    before = [t.detach().clone() for t in moving]
    loss_fn = make(batch, noise_alpha=0.0)
    out = batch.run(loss_fn)
    found = torch.autograd.grad(out.loss, moving)
    with torch.no_grad():
        for tensor, gradient in zip(moving, found, strict=True):
            tensor -= size * gradient / sum(float(g.square().sum()) for g in found) ** 0.5
    return margin(out), margin(batch.run(loss_fn)), before


@pytest.mark.parametrize("frozen", ["policy", "generator"])
def test_a_frozen_player_does_not_move_and_the_other_moves_the_margin_its_way(
    frozen: str, seed: int
) -> None:
    """One pair, so that ℓ falls with its margin; a step small enough for the first order to decide."""
    batch = Batch()
    batch.labels[:, 0] = torch.randint(VOCAB, (2 * PAIRS,))
    keep = [0, PAIRS]
    batch.hidden = batch.hidden.detach()[keep].requires_grad_()
    batch.labels = batch.labels[keep]
    batch.reference["ref_hidden"] = batch.reference["ref_hidden"][keep]
    policy, noise = batch.players
    fixed = policy if frozen == "policy" else noise
    held = [t.detach().clone() for t in fixed]
    before, after, _ = stepped(batch, fixed, 1e-5)
    assert all(torch.equal(t, h) for t, h in zip(fixed, held, strict=True))
    assert after < before if frozen == "policy" else after > before


@pytest.mark.parametrize("loss_type", WITH_REFERENCE)
def test_without_noise_it_is_the_same_loss(loss_type: str, seed: int) -> None:
    """σ = 0 exactly: losses, rewards and the policy's gradient are those of the plain loss, to the last bit."""
    batch = Batch(sigma=0.0)
    plain = PreferenceLoss(loss_type, beta=0.3, label_smoothing=SMOOTHING.get(loss_type, 0.0))
    expected = plain(batch.hidden, batch.weight, batch.labels, **batch.reference)
    for player in ("both", "model"):
        out = batch.run(make(batch, loss_type), player=player)
        assert torch.equal(out.losses, expected.losses)
        assert torch.equal(out.rejected_rewards, expected.rejected_rewards)
        for ours, theirs in zip(
            gradients(out.loss, batch.players[0]),
            gradients(expected.loss, batch.players[0]),
            strict=True,
        ):
            assert torch.equal(ours, theirs)
    assert out.metrics()["noise/margin_shift"] == 0


def test_spin_is_the_logistic_loss_of_the_noisy_margin(seed: int) -> None:
    """METHODS: m = λ[(log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_noise(y_l))], ℓ = −log σ(m)."""
    batch = Batch()
    out = batch.run(make(batch))
    own, ref, noisy, _, _ = batch.sums()
    margin = 0.3 * ((own - ref)[:PAIRS] - (own[PAIRS:] - noisy))
    assert_all_close([out.losses.detach()], [-logsigmoid(margin).detach()])
    clean = 0.3 * ((own - ref)[:PAIRS] - (own - ref)[PAIRS:])
    metrics = out.metrics()
    assert metrics["noise/margin_shift"] == pytest.approx(float((margin - clean).mean()), abs=1e-9)
    assert metrics["rewards/margins"] == pytest.approx(float(clean.mean()), abs=1e-9)


def test_no_rejected_token_in_any_rank_is_no_penalty(seed: int) -> None:
    batch = Batch()
    batch.labels[:] = -100
    noisy = score_with_noise(
        batch.generator, batch.reference["ref_hidden"], batch.reference["ref_weight"], batch.labels,
        seed=5, mean_tokens=torch.zeros((), dtype=torch.float64),
    )  # fmt: skip
    assert noisy.weight == 0.0
    assert noisy.penalty.item() == 0.0


def test_evaluation_is_clean(seed: int) -> None:
    batch = Batch()
    loss_fn = make(batch).eval()
    out = batch.run(loss_fn, noise_seed=None)
    plain = PreferenceLoss("spin", beta=0.3)
    expected = plain(batch.hidden, batch.weight, batch.labels, **batch.reference)
    assert torch.equal(out.loss, expected.loss)
    assert not out.noise
    assert "loss/noise" not in out.metrics()


@pytest.mark.parametrize("loss_type", ["spin", "ipo"])
def test_gamma_is_solved_once_on_the_noisy_gaps(loss_type: str, seed: int) -> None:
    batch = Batch()
    margin = fastpo.DynamicMargin(tau=0.5, queue_size=8)
    out = batch.run(make(batch, loss_type, margin=margin, gamma_beta_ratio=0.4))
    own, ref, noisy, lengths, _ = batch.sums()
    ratios = own - torch.cat([ref[:PAIRS], noisy])
    if loss_type == "ipo":
        ratios = ratios / lengths
    gaps = (0.3 * (ratios[:PAIRS] - ratios[PAIRS:])).detach()
    expected = fastpo.solve_margins(gaps, 0.3 * 0.4, 0.5)
    torch.testing.assert_close(out.gamma, expected, rtol=1e-8, atol=1e-10, check_dtype=False)
    assert (margin.queued, margin.draws) == (PAIRS, 1)
    torch.testing.assert_close(margin.queue[:PAIRS], gaps, rtol=1e-9, atol=1e-9)
    clean = (0.3 * (own - ref)).detach()
    assert not torch.allclose(gaps, clean[:PAIRS] - clean[PAIRS:])


def test_packed_batch_and_token_index(seed: int) -> None:
    """The noise belongs to tokens, not to places: a packed batch with the same token indices is the same."""
    batch = Batch()
    index = torch.arange(2 * PAIRS)[:, None] * 1000 + torch.arange(TOKENS)
    padded = batch.run(make(batch), token_index=index)
    kept = batch.labels != -100
    lengths = kept.sum(1)
    packed = make(batch)(
        batch.hidden[kept], batch.weight, batch.labels[kept],
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        noise_seed=5, token_index=index[kept],
        **{**batch.reference, "ref_hidden": batch.reference["ref_hidden"][kept]},
    )  # fmt: skip
    torch.testing.assert_close(packed.losses, padded.losses, rtol=1e-6, atol=1e-7)
    assert packed.metrics() == pytest.approx(padded.metrics(), rel=1e-6, abs=1e-7)
    _, noise = batch.players
    assert_all_close(gradients(packed.loss, noise), gradients(padded.loss, noise))
    other = batch.run(make(batch), token_index=index + 1)
    assert not torch.allclose(other.losses, padded.losses, rtol=1e-9)


def test_generator_is_part_of_the_module_and_of_its_state(seed: int) -> None:
    batch = Batch(rank=2)
    loss_fn = make(batch)
    assert set(loss_fn.state_dict()) == {"noise.weight", "noise.bias", "noise.proj"}
    assert len(list(loss_fn.parameters())) == 3


def test_bad_arguments_are_refused(seed: int) -> None:
    batch = Batch()
    for alpha in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"noise_alpha: got {alpha}, expected a finite number"):
            make(batch, noise_alpha=alpha)
    with pytest.raises(
        ValueError, match="loss 'simpo' has no reference to put noise into; those that do: dpo"
    ):
        make(batch, "simpo")
    with pytest.warns(
        UserWarning, match=r"noise_alpha=0\.5 has no effect without a noise generator"
    ):
        PreferenceLoss("spin", noise_alpha=0.5)
    loss_fn = make(batch)
    for value, error, message in (
        (None, ValueError, "noise_seed: got None, expected an integer"),
        (-1, ValueError, "noise_seed: got -1, expected an integer in"),
        (1.5, TypeError, "noise_seed: got float, expected an integer"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"^{message}"):
            batch.run(loss_fn, noise_seed=value)
    with pytest.raises(
        ValueError, match="noise_seed, token_index: got one without a noise generator"
    ):
        batch.run(PreferenceLoss("spin"))
    with pytest.raises(
        ValueError, match="player: got 'policy', expected one of both, model, noise"
    ):
        batch.run(loss_fn, player="policy")
    with pytest.raises(ValueError, match=r"ref_hidden: got None, .*scored anew"):
        loss_fn(
            batch.hidden, batch.weight, batch.labels,
            ref_logps=torch.zeros(2 * PAIRS).double(), noise_seed=5,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"^token_index: got torch\.int64 of shape \(3,\)"):
        batch.run(loss_fn, token_index=torch.arange(3))
    with pytest.raises(TypeError, match="noise: got Linear, expected a NoiseGenerator"):
        PreferenceLoss("spin", noise=torch.nn.Linear(HIDDEN, VOCAB))
    with pytest.raises(
        ValueError, match="player: got 'noise', expected 'both' where there is no n"
    ):
        batch.run(make(batch).eval(), player="noise")
    tokens = torch.zeros_like(batch.labels, dtype=torch.float32)
    with pytest.raises(
        ValueError, match="noisy_reference: got None, expected the rejected answers"
    ):
        loss_fn.from_token_logps(tokens, batch.labels, ref_logps=torch.zeros(2 * PAIRS).double())
    with pytest.raises(
        ValueError, match="noise: got a generator, expected None or evaluation mode"
    ):
        loss_fn.from_sequence_logps(*torch.zeros(4, PAIRS))
    narrow = PreferenceLoss("spin", noise=fastpo.NoiseGenerator(HIDDEN - 1, VOCAB))
    with pytest.raises(
        ValueError, match=rf"expected \(\.\.\., {HIDDEN - 1}\), the width of the noise gen"
    ):
        batch.run(narrow)
    small = PreferenceLoss("spin", noise=fastpo.NoiseGenerator(HIDDEN, VOCAB - 1))
    with pytest.raises(ValueError, match="the vocabulary of the noise generator"):
        batch.run(small)
