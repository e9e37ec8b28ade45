"""``PreferenceLoss``: any loss of the registry, from hidden states, token log-probs or sequence log-probs."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpo.kernels.preference_epilogue_torch import PAIR_LOSSES, pair_loss
from fastpo.margins import DynamicMargin
from fastpo.noise import NoiseGenerator
from fastpo.ops.certified import DEFAULT_TOL
from fastpo.ops.checks import check_everything
from fastpo.ops.linear_logprobs import TokenStats, linear_logprobs
from fastpo.ops.philox import check_seed
from fastpo.ops.preference_epilogue import epilogue_backend, preference_epilogue
from fastpo.ops.sequence_logprobs import sequence_sums

from .across_ranks import mean_over_ranks
from .metrics import PreferenceOutput, token_means
from .noisy_reference import NoisyReference, check_player, reversed_gradient, score_with_noise
from .pairs import Pairs
from .pointwise import sft
from .registry import find_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DEFAULT_GAMMA0 = 0.5  # TRL's simpo_gamma
DEFAULT_NOISE_ALPHA = 1.0


class PreferenceLoss(nn.Module):
    """A preference loss straight from hidden states and the LM head; the logits of the batch never exist.

    The loss is mean_i ℓ(pair i) + sft_weight · NLL, NLL the mean over all labelled tokens of the chosen
    answers (as in TRL's CPO; TRL's ORPO also averages over prompt tokens, which carry no label here). All
    arithmetic after the token log-probs is float64. A pair with an answer that has no labelled token
    contributes 0, to the loss and to the gradient, and still counts among the B of the mean.

    Args:
        loss_type: a name of ``fastpo.losses.LOSSES``.
        beta: β > 0; usual values are 0.01–0.5 for losses with a reference, 2–10 for ``simpo``.
        gamma_beta_ratio: mean target margin γ0 in units of β, as SimPO and γ-PO name it; or
        simpo_gamma: γ0 ≥ 0 itself, as TRL names it. Without both γ0 = 0.5, TRL's default. Only ``simpo`` and
            losses with a dynamic margin have a target.
        label_smoothing: ε in [0, 1/2), the share of labels taken to be flipped.
        sft_weight: weight of the SFT term; None: the loss's own (1 for ``cpo`` and ``orpo``, else 0).
        margin: dynamic margins, ``margin(gaps, gamma0) → γ`` for (B,) float64 gaps
            (:class:`fastpo.DynamicMargin`, γ-PO); None: the fixed target γ0 for ``simpo``, none for the others.
        noise: DNPO's noise generator, for a loss with a reference; see below. None: no noise.
        noise_alpha: weight α ≥ 0 of the penalty on the variance of the noise; None: 1. With ``noise`` alone.
        ignore_index: label of tokens that do not count.
        logit_scale, softcap, temperature, backward, tol, low_memory, backend: see
            :func:`fastpo.linear_logprobs`. ``low_memory`` is the policy's alone: the log-probs under noise have
            one sweep.
        return_stats: compute the token statistics that the metrics ``entropy``, ``logits/*`` and
            ``mean_token_accuracy`` need.
        group: ranks over which batch-coupled terms (``batch_coupled`` losses and the token mean of the SFT
            term) are taken, per micro-step and with equally many pairs on each; None: this process alone. The
            mean of the ranks' losses is then the loss of the global batch, and so is the averaged gradient.
            The margin has a group of its own.
        options: keywords of the chosen loss alone: ``discopop_tau``, ``rdpo_alpha``, or β-DPO's ``a``,
            ``momentum``, ``sample_fraction``, ``seed``.

    With ``noise`` (DNPO, Yang et al., arXiv 2502.05400) the reference's log-probs of the rejected answers are,
    in training mode, those under softmax(z + σ∘ε). Two players meet: the policy θ lowers ℓ, the generator θσ
    raises it, and pays α·mean(σ²), the mean over the rejected answers' labelled tokens and the vocabulary:

        ℓ(m(θ, sg θσ)) − ℓ(m(sg θ, θσ)) + α·mean(σ²),   sg: no gradient flows

    so each gets the gradient of its own loss from one backward. γ is solved on the noisy gaps, those that the
    loss sees. In evaluation mode there is no noise: the loss is that of the same ``loss_type`` without it.

    State (that of ``beta_dpo``, of the margin and of the noise generator) is in ``state_dict()``; that of the
    first two changes in training mode only.

    Raises:
        TypeError: an option that the loss does not have.
        ValueError: an unknown loss, a number out of range, γ0 given twice, a margin for a loss without, or
            noise for a loss without a reference.
    """

    def __init__(
        self,
        loss_type: str = "dpo",
        *,
        beta: float = 0.1,
        gamma_beta_ratio: float | None = None,
        simpo_gamma: float | None = None,
        label_smoothing: float = 0.0,
        sft_weight: float | None = None,
        margin: Callable[[Tensor, float], Tensor] | None = None,
        noise: NoiseGenerator | None = None,
        noise_alpha: float | None = None,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        backward: str = "auto",
        tol: float = DEFAULT_TOL,
        low_memory: bool = False,
        backend: str = "auto",
        return_stats: bool = True,
        group: ProcessGroup | None = None,
        **options: float,
    ) -> None:
        super().__init__()
        self.spec = find_loss(loss_type)
        self.spec.check(beta, label_smoothing)
        if margin is not None:
            self.spec.check_margin()
        if label_smoothing and not self.spec.uses_label_smoothing:
            _warn(f"label_smoothing={label_smoothing} has no effect on loss {self.spec.name!r}")
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.gamma0 = _mean_target(beta, gamma_beta_ratio, simpo_gamma)
        target_given = gamma_beta_ratio is not None or simpo_gamma is not None
        if target_given and margin is None and self.spec.margin != "target":
            _warn(
                "gamma_beta_ratio and simpo_gamma have no effect on loss "
                f"{self.spec.name!r} without a dynamic margin"
            )
        self.sft_weight = self.spec.sft_weight if sft_weight is None else sft_weight
        if not 0 <= self.sft_weight < math.inf:
            raise ValueError(f"sft_weight: got {sft_weight}, expected a finite number ≥ 0")
        self.margin = margin
        self.noise_alpha = DEFAULT_NOISE_ALPHA if noise_alpha is None else noise_alpha
        if not 0 <= self.noise_alpha < math.inf:
            raise ValueError(f"noise_alpha: got {noise_alpha}, expected a finite number ≥ 0")
        if noise is not None:
            if not isinstance(noise, NoiseGenerator):
                raise TypeError(
                    f"noise: got {type(noise).__name__}, expected a NoiseGenerator or None"
                )
            self.spec.check_noise()
        elif noise_alpha is not None:
            _warn(f"noise_alpha={noise_alpha} has no effect without a noise generator")
        self.noise = noise
        self.function = self.spec.bind(**options)
        self.ignore_index = ignore_index
        self.return_stats = return_stats
        self.group = group
        self.operation_options: dict[str, Any] = {
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "backward": backward,
            "tol": tol,
            "low_memory": low_memory,
            "backend": backend,
            "ignore_index": ignore_index,
        }

    def extra_repr(self) -> str:
        return f"{self.spec.name!r}, beta={self.beta}, label_smoothing={self.label_smoothing}"

    def forward(
        self,
        hidden: Tensor,  # (2B, T, H) or packed (N, H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (2B, T) or (N,)
        bias: Tensor | None = None,  # (V,)
        *,
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        ref_logps: Tensor | None = None,  # (2B,)
        ref_hidden: Tensor | None = None,  # like hidden
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        noise_seed: int | None = None,
        token_index: Tensor | None = None,  # like labels
        player: str = "both",
    ) -> PreferenceOutput:
        """Loss of B pairs from the last hidden states.

        Args:
            hidden: rows 0…B−1 the chosen answers, B…2B−1 the rejected ones, in the same order.
            weight: the LM head.
            labels: int64, already shifted (see :func:`fastpo.shift_labels`), ``ignore_index`` on prompts and
                padding.
            bias: of the LM head.
            cu_seqlens: bounds of the 2B segments of a packed batch, segments 0…B−1 chosen.
            ref_logps: the reference's log-probs, summed per answer; or, not both,
            ref_hidden, ref_weight, ref_bias: what computes them, without gradient, on the same labels and with
                the same ``logit_scale``, ``softcap`` and ``temperature``; for a reference of another kind
                give ``ref_logps``. Under noise the rejected answers need them at every step.
            noise_seed: seed of this step's noise, in [0, 2⁶⁴), another one at every step. With ``noise`` and in
                training mode alone, where it must be given.
            token_index: int64, which token each position is, as the noise is to see it, so that it does not
                depend on how the batch is laid out; None: the position in ``labels``.
            player: whose loss is returned and differentiated under noise: ``"both"``; ``"model"``, ℓ with the
                generator frozen; or ``"noise"``, −ℓ + α·mean(σ²) with the policy frozen.

        Raises:
            TypeError, ValueError: dtypes, shapes or devices that do not fit; an odd number of rows; no
                reference where the loss needs one, or two; no seed where there is noise, or one where there is
                none.
        """
        _check_even(labels, cu_seqlens)
        check_player(player)
        noisy = None
        if self.noise is None and (noise_seed is not None or token_index is not None):
            raise ValueError("noise_seed, token_index: got one without a noise generator")
        self._check_turn(player)
        if ref_hidden is not None:
            if ref_logps is not None:
                raise ValueError("ref_logps, ref_hidden: got both, expected one of them")
            if ref_weight is None:
                raise ValueError("ref_weight: got None, expected (V, H) with ref_hidden")
            try:
                if self.noise is not None and self.training:
                    with torch.set_grad_enabled(torch.is_grad_enabled() and player != "model"):
                        ref_logps, noisy = self._noisy_reference(
                            ref_hidden,
                            ref_weight,
                            labels,
                            ref_bias,
                            cu_seqlens,
                            noise_seed,
                            token_index,
                        )
                else:
                    ref_logps = self._reference(
                        ref_hidden, ref_weight, labels, ref_bias, cu_seqlens
                    )
            except (TypeError, ValueError) as error:
                if str(error).startswith(("noise_", "token_index:")):
                    raise
                raise type(error)(f"ref_hidden, ref_weight or ref_bias: {error}") from error
        elif self.noise is not None and self.training:
            raise ValueError(
                "ref_hidden: got None, expected (…, H) with ref_weight: the rejected answers are scored anew "
                "under noise at every step"
            )
        elif ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_hidden: got None, expected (…, H) with ref_weight or ref_bias")
        if self.spec.needs_reference and ref_logps is None:
            raise ValueError(
                f"ref_logps: got None, expected (2B,), or ref_hidden and ref_weight: loss {self.spec.name!r} "
                "needs a reference"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and player != "noise"):
            result: Any = linear_logprobs(
                hidden,
                weight,
                labels,
                bias,
                return_stats=self.return_stats,
                **self.operation_options,
            )
        token_logps, stats = result if self.return_stats else (result, None)
        return self.from_token_logps(
            token_logps,
            labels,
            cu_seqlens=cu_seqlens,
            ref_logps=ref_logps,
            noisy_reference=noisy,
            player=player,
            stats=stats,
        )

    def _check_turn(self, player: str) -> None:
        if player != "both" and not (self.noise is not None and self.training):
            raise ValueError(
                f"player: got {player!r}, expected 'both' where there is no noise: without a generator, and in "
                "evaluation mode"
            )

    @torch.no_grad()
    def _reference(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """The reference's log-prob sums of all answers, (2B,) float64."""
        tokens = linear_logprobs(hidden, weight, labels, bias, **self.operation_options)
        return sequence_sums(tokens, labels, cu_seqlens=cu_seqlens, ignore_index=self.ignore_index)[
            0
        ]

    def _noisy_reference(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        seed: int | None,
        token_index: Tensor | None,
    ) -> tuple[Tensor, NoisyReference]:
        """The same, each answer scored once: the rejected ones with and without noise."""
        assert self.noise is not None
        if seed is None:
            raise ValueError(
                "noise_seed: got None, expected an integer in [0, 2**64) with noise in training"
            )
        try:
            check_seed(seed)
        except (TypeError, ValueError) as error:
            raise type(error)(f"noise_{error}") from error
        if token_index is not None and (
            token_index.dtype != torch.int64 or token_index.shape != labels.shape
        ):
            raise ValueError(
                f"token_index: got {token_index.dtype} of shape {tuple(token_index.shape)}, expected "
                f"torch.int64 of that of labels, {tuple(labels.shape)}"
            )
        chosen, rejected = (
            labels.masked_fill(~mask, self.ignore_index)
            for mask in _token_masks(labels, cu_seqlens, self.ignore_index)
        )
        mean_tokens = None
        if self.group is not None:
            mean_tokens = mean_over_ranks(
                (rejected != self.ignore_index).sum().double(), self.group
            )
        noisy = score_with_noise(
            self.noise, hidden, weight, rejected, bias, seed=seed, token_index=token_index,
            cu_seqlens=cu_seqlens, mean_tokens=mean_tokens, **self.operation_options,
        ).second_half()  # fmt: skip
        logps = self._reference(hidden, weight, chosen, bias, cu_seqlens)
        return torch.cat([logps.chunk(2)[0], noisy.clean_logps]), noisy

    def from_token_logps(
        self,
        token_logps: Tensor,  # (2B, T) or packed (N,)
        labels: Tensor,  # same shape
        *,
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        ref_logps: Tensor | None = None,  # (2B,)
        noisy_reference: NoisyReference | None = None,
        player: str = "both",
        stats: TokenStats | None = None,
    ) -> PreferenceOutput:
        """Loss of B pairs from token log-probs in nats, laid out as in :meth:`forward`.

        ``ref_logps`` have no noise in them; ``noisy_reference`` are the B rejected answers under noise.
        """
        _check_even(labels, cu_seqlens)
        check_player(player)
        self._check_turn(player)
        if self.noise is not None and self.training and noisy_reference is None:
            raise ValueError(
                "noisy_reference: got None, expected the rejected answers under noise in training with noise"
            )
        output = self._preference_epilogue(
            token_logps, labels, cu_seqlens, ref_logps, noisy_reference, player
        )
        if stats is not None:
            chosen, rejected = _token_masks(labels, cu_seqlens, self.ignore_index)
            output.token_means = token_means(stats, chosen, rejected)
        return output

    def from_sequence_logps(
        self,
        chosen_logps: Tensor,  # (B,)
        rejected_logps: Tensor,  # (B,)
        ref_chosen_logps: Tensor | None = None,  # (B,)
        ref_rejected_logps: Tensor | None = None,  # (B,)
        chosen_lengths: Tensor | None = None,  # (B,)
        rejected_lengths: Tensor | None = None,  # (B,)
    ) -> PreferenceOutput:
        """Loss of B pairs from log-probs in nats, summed over each answer's ``lengths`` labelled tokens.

        Lengths may be left out for losses that do not use them, without an SFT term.

        Raises:
            ValueError: shapes that do not fit, or noise in training mode, which needs tokens.
        """
        if self.noise is not None and self.training:
            raise ValueError(
                "noise: got a generator, expected None or evaluation mode: noise needs tokens"
            )
        pairs = Pairs.build(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths,
            rejected_lengths,
        )
        return self._score(pairs, torch.promote_types(chosen_logps.dtype, torch.float32))

    def _preference_epilogue(
        self,
        token_logps: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        ref_logps: Tensor | None,
        noisy: NoisyReference | None,
        player: str,
    ) -> PreferenceOutput:
        """Token log-probs → sums, lengths → gaps → γ → losses: in one launch where it can, else in PyTorch."""
        sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        # That launch has no gradient for the reference's log-probs.
        if noisy is None and self._fits_one_launch(token_logps, sequences // 2):
            return self._one_launch(token_logps, labels, cu_seqlens, ref_logps)
        sums, lengths = sequence_sums(
            token_logps, labels, cu_seqlens=cu_seqlens, ignore_index=self.ignore_index
        )
        ref_chosen, ref_rejected = None, None
        if ref_logps is not None:
            if ref_logps.shape != sums.shape:
                raise ValueError(
                    f"ref_logps: got shape {tuple(ref_logps.shape)}, expected {tuple(sums.shape)}, "
                    "one sum per answer"
                )
            if ref_logps.device != sums.device:
                raise ValueError(
                    f"ref_logps: got device {ref_logps.device}, expected that of the log-probs, {sums.device}"
                )
            ref_chosen, ref_rejected = ref_logps.chunk(2)
        chosen, rejected = sums.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        pairs = Pairs.build(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths
        )
        dtype = torch.promote_types(token_logps.dtype, torch.float32)
        if noisy is None:
            return self._score(pairs, dtype)
        return self._score_noisy(pairs, dtype, noisy, player)

    def _fits_one_launch(self, token_logps: Tensor, pairs: int) -> bool:
        """Whether the Triton epilogue computes this loss.

        γ over several ranks needs their gaps in between, and ``FASTPO_CHECK=1`` wants to see them.
        """
        margin = self.margin
        solvable = margin is None or (
            type(margin) is DynamicMargin and margin.solver == "exact" and margin.ranks == 1
        )
        extra = margin.sample_size if isinstance(margin, DynamicMargin) else 0
        backend = self.operation_options["backend"]
        return (
            self.spec.name in PAIR_LOSSES
            and solvable
            and not self.sft_weight
            and not check_everything()
            and epilogue_backend(token_logps, pairs, extra, backend) == "triton"
        )

    def _one_launch(
        self,
        token_logps: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        ref_logps: Tensor | None,
    ) -> PreferenceOutput:
        """The same by the one-launch operation, for a loss and a margin that it knows."""
        margin = self.margin if isinstance(self.margin, DynamicMargin) else None
        sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        options = self.function.keywords if isinstance(self.function, functools.partial) else {}
        result = preference_epilogue(
            token_logps,
            labels,
            pair_loss(self.spec.name, label_smoothing=self.label_smoothing, **options),
            beta=self.beta,
            gamma0=self.gamma0,
            tau=None if margin is None else margin.tau,
            cu_seqlens=cu_seqlens,
            ref_logps=ref_logps,
            extra_gaps=None if margin is None else margin.context(sequences // 2),
            ignore_index=self.ignore_index,
            backend="triton",
        )
        if margin is not None and margin.training:
            margin.push(result.gaps)
        chosen_logps, rejected_logps = result.logps.chunk(2)
        references = (None, None) if ref_logps is None else ref_logps.chunk(2)
        pairs = Pairs.build(
            chosen_logps.detach(), rejected_logps.detach(), *references, *result.lengths.chunk(2)
        )
        rewards = self.spec.rewards(pairs, self.beta)
        return PreferenceOutput(
            loss=result.losses.mean(),
            losses=result.losses,
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            chosen_rewards=rewards.chosen.float(),
            rejected_rewards=rewards.rejected.float(),
            gamma=result.gamma,
            nll_loss=None,
            num_tokens=result.lengths.sum(),
        )

    def _score_noisy(
        self, pairs: Pairs, dtype: torch.dtype, noisy: NoisyReference, player: str
    ) -> PreferenceOutput:
        """The loss of one player or both. ``pairs`` have no noise; their policy log-probs carry the gradient.

        One evaluation of ℓ serves both players: the gradient to the noise is that of ℓ with its sign changed.
        """
        if player == "model":
            noisy = noisy.detach()
        if player == "noise":
            pairs = replace(
                pairs,
                chosen_logps=pairs.chosen_logps.detach(),
                rejected_logps=pairs.rejected_logps.detach(),
            )
        under_noise = replace(pairs, ref_rejected_logps=reversed_gradient(noisy.logps.double()))
        output = self._score(under_noise, torch.float64)
        value = output.losses.detach().mean()
        penalty = self.noise_alpha * noisy.weight * noisy.penalty.double()
        model_loss = output.loss.detach()
        loss = output.loss
        if player == "both":
            loss = loss - value + penalty
        elif player == "noise":
            loss = loss - model_loss - value + penalty
        rewards = self.spec.rewards(pairs, self.beta)
        shift = self.spec.gaps(under_noise, self.beta) - self.spec.gaps(pairs, self.beta)
        noise = {
            "loss/model": model_loss.to(dtype),
            "loss/noise": penalty.detach() - value,
            "noise/penalty": noisy.penalty.detach(),
            "noise/sigma_mean": noisy.penalty.detach().sqrt(),
            "noise/sigma_peak": noisy.sigma_peak,
            "noise/margin_shift": shift.mean(),
        }
        changed = {
            "loss": loss,
            "chosen_rewards": rewards.chosen,
            "rejected_rewards": rewards.rejected,
        }
        tensors = {
            name: tensor.to(dtype)
            for name, tensor in (vars(output) | changed).items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        }
        return replace(output, **tensors, noise=noise)  # type: ignore[arg-type]

    def _score(self, pairs: Pairs, dtype: torch.dtype) -> PreferenceOutput:
        """Gaps → γ → losses, in float64, and the results in ``dtype``."""
        spec = self.spec
        spec.check_reference(pairs)
        scored, labelled = pairs.without_unlabelled()
        gamma = None
        if self.margin is not None:
            gamma = self.margin(spec.gaps(scored, self.beta), self.gamma0)
        losses = spec.evaluate(
            self.function,
            scored,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=gamma,
            gamma0=self.gamma0,
            group=self.group,
        )
        if labelled is not None and not spec.reorders_pairs:
            losses = torch.where(labelled, losses, 0.0)
        loss = losses.mean()
        nll_loss = None
        if self.sft_weight:
            nll_loss = sft(scored, group=self.group).mean()
            loss = loss + self.sft_weight * nll_loss
        rewards = spec.rewards(pairs, self.beta)
        return PreferenceOutput(
            loss=loss.to(dtype),
            losses=losses.to(dtype),
            chosen_logps=pairs.chosen_logps.to(dtype),
            rejected_logps=pairs.rejected_logps.to(dtype),
            chosen_rewards=rewards.chosen.to(dtype),
            rejected_rewards=rewards.rejected.to(dtype),
            gamma=None if gamma is None else gamma.to(dtype),
            nll_loss=None if nll_loss is None else nll_loss.to(dtype),
            num_tokens=None if labelled is None else torch.cat(pairs.lengths).sum().long(),
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _mean_target(beta: float, gamma_beta_ratio: float | None, simpo_gamma: float | None) -> float:
    """γ0 from the one of its two names that was given."""
    if gamma_beta_ratio is not None and simpo_gamma is not None:
        raise ValueError(
            f"gamma_beta_ratio, simpo_gamma: got both ({gamma_beta_ratio} and {simpo_gamma}), expected one: "
            "simpo_gamma = beta · gamma_beta_ratio"
        )
    for name, value in (("gamma_beta_ratio", gamma_beta_ratio), ("simpo_gamma", simpo_gamma)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value}, expected a finite number ≥ 0")
    if gamma_beta_ratio is not None:
        return beta * gamma_beta_ratio
    return DEFAULT_GAMMA0 if simpo_gamma is None else simpo_gamma


def _check_even(labels: Tensor, cu_seqlens: Tensor | None) -> None:
    """Half the rows are chosen answers, half rejected ones."""
    rows = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if rows % 2 or rows < 2:
        name, unit = ("labels", "rows") if cu_seqlens is None else ("cu_seqlens", "segments")
        raise ValueError(
            f"{name}: got {rows} {unit}, expected an even number ≥ 2: the first half chosen answers, "
            "the second half rejected ones"
        )


def _token_masks(
    labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Which tokens are labelled ones of chosen, and of rejected answers; both shaped like ``labels``."""
    labelled = labels != ignore_index
    if cu_seqlens is None:
        first_half = torch.arange(labels.shape[0], device=labels.device) < labels.shape[0] // 2
        first_half = first_half.unsqueeze(1)
    else:
        position = torch.arange(labels.shape[0], device=labels.device)
        first_half = position < cu_seqlens[cu_seqlens.numel() // 2]
        labelled = labelled & (position < cu_seqlens[-1])
    return labelled & first_half, labelled & ~first_half
