"""The registry of losses: what each one is called, what it needs, and which margin it takes."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import batch_coupled, pairwise, pointwise
from .pairs import Pairs, Score

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ScoreName = Literal["logps", "mean_logps", "logratios", "mean_logratios"]

# What the caller of a loss decides; the other keywords of its function are options of that loss alone.
_SHARED = {"self", "pairs", "beta", "label_smoothing", "margin", "group"}


@dataclass(frozen=True)
class Loss:
    """One loss of the registry, callable on sequence log-probs; its ``function``'s keywords say what it takes.

    Attributes:
        name: its name in ``LOSSES``.
        function: ``(pairs, *, …) → (B,)``, or the class of a module whose ``forward`` is that.
        needs_reference: whether it requires the log-probs of a reference.
        reward: the score that, times β, is an answer's logged reward (TRL's choice where TRL has the loss).
        gap: the score whose difference within a pair, times β, is the gap g that γ is solved on.
        margin: what a dynamic margin changes: the ``"target"`` γ that the loss has anyway, or, by the
            ``"deviation"`` γ − γ0, a target that the loss has not; None: it takes no margin.
        sft_weight: weight of the SFT term unless the user says otherwise.
        needs_label_smoothing: whether ε = 0 makes it infinite.
        reorders_pairs: whether the i-th of the returned losses belongs to another pair than the i-th.
    """

    name: str
    function: Callable[..., Tensor] | type[nn.Module]
    needs_reference: bool
    reward: ScoreName
    gap: ScoreName
    margin: Literal["target", "deviation"] | None = None
    sft_weight: float = 0.0
    needs_label_smoothing: bool = False
    reorders_pairs: bool = False

    @property
    def supports_dynamic_margin(self) -> bool:
        """Whether ``gamma`` may be given."""
        return self.margin is not None

    @property
    def uses_label_smoothing(self) -> bool:
        """Whether ``label_smoothing`` changes it."""
        return "label_smoothing" in self._parameters

    @property
    def batch_coupled(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the micro-step, over all ranks of ``group``."""
        return "group" in self._parameters

    @property
    def options(self) -> dict[str, float]:
        """Keywords of this loss alone, with their defaults."""
        parameters = inspect.signature(self.function).parameters
        return {k: p.default for k, p in parameters.items() if k not in _SHARED}

    @functools.cached_property
    def _parameters(self) -> set[str]:
        function = self.function
        return set(inspect.signature(getattr(function, "forward", function)).parameters)

    def bind(self, **options: float) -> Callable[..., Tensor]:
        """The function with its options fixed; for a loss with state a new module.

        Raises:
            TypeError: an option that this loss does not have.
        """
        for option in options:
            if option not in self.options:
                raise TypeError(
                    f"{option}: not an option of loss {self.name!r}, expected "
                    + (f"one of {', '.join(self.options)}" if self.options else "none")
                )
        if isinstance(self.function, type):
            return self.function(**options)
        return functools.partial(self.function, **options)

    def check(self, beta: float, label_smoothing: float) -> None:
        """Raise ValueError unless β > 0 and ε is in [0, 1/2), or (0, 1/2) where the loss needs one."""
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta: got {beta}, expected a finite number > 0")
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing: got {label_smoothing}, expected a number in [0, 0.5)"
            )
        if self.needs_label_smoothing and label_smoothing == 0:
            raise ValueError(
                f"label_smoothing: got 0, expected a number in (0, 0.5) for loss {self.name!r}, e.g. 1e-3"
            )

    def check_margin(self) -> None:
        """Raise ValueError if this loss takes no dynamic margin."""
        if not self.supports_dynamic_margin:
            takers = ", ".join(n for n, loss in LOSSES.items() if loss.supports_dynamic_margin)
            raise ValueError(f"loss {self.name!r} takes no dynamic margin; those that do: {takers}")

    def check_noise(self) -> None:
        """Raise ValueError if this loss has no reference for DNPO to put noise into."""
        if not self.needs_reference:
            takers = ", ".join(n for n, loss in LOSSES.items() if loss.needs_reference)
            raise ValueError(
                f"loss {self.name!r} has no reference to put noise into; those that do: {takers}"
            )

    def rewards(self, pairs: Pairs, beta: float) -> Score:
        """β · ``reward`` of every answer, detached."""
        chosen, rejected = getattr(pairs, self.reward)
        return Score(beta * chosen.detach(), beta * rejected.detach())

    def gaps(self, pairs: Pairs, beta: float) -> Tensor:
        """g = r_w − r_l, (B,), detached: what γ is solved on."""
        gap: Tensor = getattr(pairs, self.gap).gap
        return beta * gap.detach()

    def evaluate(
        self,
        function: Callable[..., Tensor],
        pairs: Pairs,
        *,
        beta: float,
        label_smoothing: float,
        gamma: Tensor | None,
        gamma0: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        """Losses (B,) float64 of a ``function`` that :meth:`bind` returned.

        Raises:
            TypeError: ``gamma`` is not a tensor.
            ValueError: ``gamma`` is not (B,).
        """
        if not (gamma is None or isinstance(gamma, Tensor)):
            raise TypeError(f"gamma: got {type(gamma).__name__}, expected a tensor (B,)")
        if gamma is not None and gamma.shape != pairs.chosen_logps.shape:
            raise ValueError(
                f"gamma: got shape {tuple(gamma.shape)}, expected {tuple(pairs.chosen_logps.shape)}, "
                "a target margin for each pair"
            )
        if self.margin == "target":
            margin = gamma0 if gamma is None else gamma
        else:
            margin = 0.0 if gamma is None else gamma - gamma0
        shared = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "margin": margin,
            "group": group,
        }
        return function(pairs, **{k: v for k, v in shared.items() if k in self._parameters})

    def __call__(
        self,
        chosen_logps: Tensor,  # (B,)
        rejected_logps: Tensor,  # (B,)
        ref_chosen_logps: Tensor | None = None,  # (B,)
        ref_rejected_logps: Tensor | None = None,  # (B,)
        *,
        chosen_lengths: Tensor | None = None,  # (B,)
        rejected_lengths: Tensor | None = None,  # (B,)
        beta: float,
        label_smoothing: float = 0.0,
        gamma: Tensor | None = None,  # (B,)
        gamma0: float = 0.0,
        group: ProcessGroup | None = None,
        **options: Any,
    ) -> Tensor:  # (B,)
        """Losses of B pairs.

        Args:
            chosen_logps: log-probs of the chosen answers, nats, always summed over their labelled tokens.
            rejected_logps: same for the rejected ones.
            ref_chosen_logps: same under the reference; None for losses without one.
            ref_rejected_logps: same.
            chosen_lengths: labelled tokens of each chosen answer; None for losses that do not use them.
            rejected_lengths: same for the rejected ones.
            beta: β > 0.
            label_smoothing: ε in [0, 1/2): share of labels taken to be flipped. Ignored where the loss has
                none.
            gamma: target margin γ_i of each pair; None: no dynamic margin.
            gamma0: mean target γ0: simpo's fixed target, and what is subtracted from ``gamma`` elsewhere.
            group: ranks that batch-coupled losses reach over; None: this process alone.
            options: keywords of this loss alone, see :attr:`options`.

        Returns:
            (B,) in the dtype of ``chosen_logps``, at least float32, computed in float64; differentiable. A
            loss with state starts from a fresh one at every call; :class:`fastpo.PreferenceLoss` keeps it.

        Raises:
            TypeError: an unknown option, or arguments of the wrong dtype.
            ValueError: β or ε out of range, wrong shapes, ``gamma`` for a loss without a margin, or a missing
                reference or missing lengths.
        """
        self.check(beta, label_smoothing)
        if gamma is not None:
            self.check_margin()
        function = self.bind(**options)
        pairs = Pairs.build(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_lengths,
            rejected_lengths,
        )
        self.check_reference(pairs)
        losses = self.evaluate(
            function,
            pairs,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            gamma0=gamma0,
            group=group,
        )
        return losses.to(torch.promote_types(chosen_logps.dtype, torch.float32))

    def check_reference(self, pairs: Pairs) -> None:
        """Raise ValueError if the reference is missing and needed."""
        if self.needs_reference and pairs.ref_chosen_logps is None:
            raise ValueError(
                f"ref_chosen_logps, ref_rejected_logps: got None, expected (B,) each for loss {self.name!r}"
            )


def _with_reference(
    name: str,
    function: Callable[..., Tensor] | type[nn.Module],
    gap: ScoreName = "logratios",
    **facts: Any,
) -> Loss:
    return Loss(name, function, needs_reference=True, reward="logratios", gap=gap, **facts)


def _without_reference(
    name: str, function: Callable[..., Tensor], score: ScoreName, **facts: Any
) -> Loss:
    return Loss(name, function, needs_reference=False, reward=score, gap=score, **facts)


# The gap of ipo and sigmoid_norm is that of their averaged log-ratios, which their margin is measured on;
# their rewards are logged as TRL does, from the sums.
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        _with_reference("dpo", pairwise.dpo, margin="deviation"),
        _with_reference("ipo", pairwise.ipo, "mean_logratios", margin="deviation"),
        _with_reference("hinge", pairwise.hinge, margin="deviation"),
        _with_reference("exo_pair", pairwise.exo_pair, needs_label_smoothing=True),
        _with_reference("nca_pair", pointwise.nca_pair),
        _with_reference("robust", pairwise.robust, margin="deviation"),
        _with_reference("bco_pair", pointwise.bco_pair),
        _with_reference("sppo_hard", pointwise.sppo_hard),
        _with_reference("aot", batch_coupled.aot, reorders_pairs=True),
        _with_reference("aot_unpaired", batch_coupled.aot_unpaired, reorders_pairs=True),
        _with_reference("apo_zero", pointwise.apo_zero),
        _with_reference("apo_down", pointwise.apo_down),
        _with_reference("discopop", pairwise.discopop),
        _without_reference("sft", pointwise.sft, "logratios"),
        _with_reference(
            "sigmoid_norm", pairwise.sigmoid_norm, "mean_logratios", margin="deviation"
        ),
        _without_reference("simpo", pairwise.simpo, "mean_logps", margin="target"),
        _without_reference("cpo", pairwise.cpo, "logps", margin="deviation", sft_weight=1.0),
        _without_reference("orpo", pairwise.orpo, "mean_logps", sft_weight=1.0),
        _with_reference("rdpo", pairwise.rdpo, margin="deviation"),
        _with_reference("beta_dpo", batch_coupled.BetaDPO),
        _with_reference("kto_pair", batch_coupled.kto_pair),
        _with_reference("spin", pairwise.spin, margin="deviation"),
    )
}
LOSSES["sigmoid"] = LOSSES["dpo"]  # TRL's name


def find_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: unknown; the message names the nearest known one.
    """
    if name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"loss_type: got {name!r}, did you mean {near!r}? Known: {', '.join(LOSSES)}"
        )
    return LOSSES[name]
