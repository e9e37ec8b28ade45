"""Dynamic target margins γ of γ-PO: ``solve_margins`` for a given set of gaps, ``DynamicMargin`` for training.

Sun et al. 2025, "Robust Preference Optimization via Dynamic Target Margins", arXiv 2506.03690. The solvers
are in ``fastpo.kernels.margins_torch`` and ``fastpo.kernels.margins_triton``.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpo.kernels import margins_torch
from fastpo.kernels.backends import choose_backend
from fastpo.ops.checks import check_everything

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SOLVERS = ("exact", "mirror")
SCOPES = ("batch", "queue")
MIRROR_STEPS = 20  # the authors'


def solve_margins(
    gaps: Tensor,  # (n,)
    gamma0: float,
    tau: float,
    *,
    solver: str = "exact",
    steps: int = MIRROR_STEPS,
) -> Tensor:  # (n,)
    """Target margins γ of n pairs, given their reward gaps g = r_w − r_l (arXiv 2506.03690).

    With p on the simplex and γ_i = γ0·n·p_i, minimises (1/n) Σ softplus(γ_i − g_i) + τ·KL(p ‖ uniform). The
    minimiser is unique; its mean is γ0, and it is non-decreasing in the gap: ambiguous pairs get a small
    target.

    Args:
        gaps: (n,) floating point, nats (times β); n may be 0.
        gamma0: mean target γ0 ≥ 0.
        tau: τ > 0, how strongly targets are held together: τ → ∞ gives γ_i = γ0. The authors use 3 to 20.
        solver: ``"exact"`` (nested Newton iterations, the minimiser to rounding) or ``"mirror"``, the
            authors' recursion of ``steps`` exponentiated-gradient steps of size min(0.5/τ, 1), which has not
            converged for small τ.
        steps: of the mirror solver.

    Returns:
        (n,) γ in the dtype of ``gaps``, solved in float64; no gradient flows through it.

    Raises:
        TypeError: ``gaps`` is not a floating-point tensor, or ``steps`` not an integer.
        ValueError: another number of dimensions, γ0, τ or ``steps`` out of range, an unknown solver, or a gap
            that is not finite. On CUDA that is looked for under ``FASTPO_CHECK=1`` only, as looking waits for
            the device; without it such a gap makes all γ NaN.
    """
    _check_arguments(gaps, gamma0)
    _check_solver(tau, solver)
    if not isinstance(steps, int):
        raise TypeError(f"steps: got {type(steps).__name__}, expected an integer ≥ 1")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected an integer ≥ 1")
    check = gaps.device.type == "cpu" or check_everything()
    return _solve_margins(gaps.detach(), float(gamma0), float(tau), solver, steps, check)


@torch.library.custom_op("fastpo::solve_margins", mutates_args=())
def _solve_margins(
    gaps: Tensor, gamma0: float, tau: float, solver: str, steps: int, check: bool
) -> Tensor:
    if check:
        finite = torch.isfinite(gaps)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            raise ValueError(
                f"gaps: got {float(gaps[first])} at position {first}, expected finite numbers"
            )
    wide = gaps.double()
    if solver == "mirror":
        return margins_torch.mirror_margins(wide, gamma0, tau, steps).to(gaps.dtype)
    # The solver is float64 whatever the gaps are; float32 asks for the backend of this device.
    if choose_backend("auto", gaps.device, torch.float32) == "triton":
        from fastpo.kernels import margins_triton

        if margins_triton.supported(wide) is None:
            return margins_triton.exact_margins(wide, gamma0, tau).to(gaps.dtype)
    return margins_torch.exact_margins(wide, gamma0, tau).to(gaps.dtype)


@_solve_margins.register_fake
def _(gaps: Tensor, gamma0: float, tau: float, solver: str, steps: int, check: bool) -> Tensor:
    return gaps.new_empty(gaps.shape)


class DynamicMargin(nn.Module):
    """γ for every pair of a batch, solved together with the other ranks' pairs and with earlier ones.

    ``margin(gaps, gamma0)`` returns (B,) γ for the (B,) gaps of this rank's pairs. The set that γ is solved
    over, and over which its mean is γ0, are the gaps of all ranks in rank order (``scope="batch"``), joined,
    with ``scope="queue"``, by earlier ones until there are ``sample_size``.

    In training these are drawn without replacement from a first-in-first-out queue of the last ``queue_size``
    gaps, which the batch enters afterwards. In evaluation (``eval()``) nothing is queued, and the newest gaps
    of the queue are taken instead of drawn ones, so that a result does not depend on when it is computed.

    Args:
        tau: τ > 0, see :func:`fastpo.solve_margins`.
        scope: ``"queue"`` (the authors' default) or ``"batch"``.
        queue_size: gaps kept, ≥ 1 (authors: 2048).
        sample_size: gaps that γ is solved over, ≥ 1; more if the batch alone has more (authors: 256).
        solver: ``"exact"`` or ``"mirror"`` (20 steps).
        seed: of the draws, ≥ 0, the same on all ranks. The t-th draw is a function of (seed, t) alone.
        group: ranks whose pairs belong together, all of which must call; None: all ranks, if
            ``torch.distributed`` is initialised. Ranks may have different numbers of pairs. With a group that
            communicates on the GPU only, the exchange of these numbers waits for the device.

    The authors' queue is per rank, begins with eight draws of N(0, 1) and is not saved. This one begins
    empty, is the same on all ranks, and is in ``state_dict()`` with the draws' state: ``queue`` (queue_size,)
    float64 and an int64 tensor (gaps queued so far, draws so far, seed). Loading it makes γ continue exactly.

    Raises:
        TypeError: a size or seed that is not an integer.
        ValueError: an argument out of range; loading a state with another ``queue_size``; in a call, on all
            ranks: settings, mode or state that are not the same on all of them (see :meth:`forward`).
    """

    queue: Tensor

    def __init__(
        self,
        tau: float,
        *,
        scope: str = "queue",
        queue_size: int = 2048,
        sample_size: int = 256,
        solver: str = "exact",
        seed: int = 0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_solver(tau, solver)
        if scope not in SCOPES:
            raise ValueError(f"scope: got {scope!r}, expected one of {', '.join(SCOPES)}")
        for name, value, least in (
            ("queue_size", queue_size, 1),
            ("sample_size", sample_size, 1),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int):
                raise TypeError(
                    f"{name}: got {type(value).__name__}, expected an integer ≥ {least}"
                )
            if value < least:
                raise ValueError(f"{name}: got {value}, expected an integer ≥ {least}")
        self.tau = tau
        self.scope = scope
        self.queue_size = queue_size if scope == "queue" else 0
        self.sample_size = sample_size
        self.solver = solver
        self.seed = seed
        self.group = group
        self.queued = 0  # gaps, since the beginning
        self.draws = 0
        self._loaded = 0  # digest of the queue that was loaded, 0 if none was
        self.register_buffer("queue", torch.zeros(self.queue_size, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"tau={self.tau}, scope={self.scope!r}, queue_size={self.queue_size}, solver={self.solver!r}"

    @property
    def ranks(self) -> int:
        """How many processes' pairs γ is solved over."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def forward(self, gaps: Tensor, gamma0: float) -> Tensor:
        """γ (B,) for this rank's gaps (B,), in their dtype, detached.

        Where a gap is not finite, all γ and hence the loss are NaN, for the training loop to see; under
        ``FASTPO_CHECK=1`` it is an error here.

        Ranks must solve the same problem. Together with how many gaps it brings each tells the others its
        settings, γ0, its counters and a digest of the queue that it loaded; all ranks raise where these differ.
        What entered the queues since then was gathered, and is the same.

        Raises:
            TypeError, ValueError: as :func:`fastpo.solve_margins`; ValueError also where the ranks differ,
                naming what differs and on which of them.
        """
        _check_arguments(gaps, gamma0)
        known, first = self._all_ranks(gaps.detach(), float(gamma0))
        context = self.context(known.numel())
        joined = torch.cat([known.double(), context.to(known.device)])
        joined = torch.where(torch.isfinite(joined).all(), joined, torch.nan)
        gamma = _solve_margins(
            joined, float(gamma0), float(self.tau), self.solver, MIRROR_STEPS, check_everything()
        )
        if self.training:
            self.push(known)
        return gamma[first : first + gaps.numel()].to(gaps.dtype)

    @torch.compiler.disable
    def context(self, batch: int) -> Tensor:
        """The earlier gaps that γ of a batch of ``batch`` pairs (of all ranks) is solved with, float64.

        In training every call is a draw of its own.
        """
        length = min(self.queued, self.queue_size)
        count = max(0, min(length, self.sample_size - batch))
        if self.training and self.scope == "queue":
            generator = np.random.default_rng((self.seed, self.draws))
            self.draws += 1
            return self.queue[self._positions(generator.choice(length, count, replace=False))]
        return self.queue[self._positions(np.arange(self.queued - count, self.queued))]

    @torch.compiler.disable
    def push(self, gaps: Tensor) -> None:
        """Queue the gaps (of all ranks) after those that are there; the oldest ones leave."""
        if self.scope == "batch":
            return
        # A queue follows the gaps to their device, and stays float64 whatever the module was cast to.
        self.queue = self.queue.to(gaps.device, torch.float64)
        stop = self.queued + gaps.numel()
        start = max(self.queued, stop - self.queue_size)
        # A gap that is not finite would spoil every γ until it left.
        newest = torch.nan_to_num(gaps.detach().double(), nan=0.0, posinf=0.0, neginf=0.0)
        newest = newest[gaps.numel() - (stop - start) :]
        self.queue[self._positions(np.arange(start, stop))] = newest
        self.queued = stop

    def _positions(self, numbers: np.ndarray[Any, Any]) -> Tensor:
        """Where the gaps with these numbers are, without waiting for the device."""
        positions = torch.from_numpy(np.asarray(numbers % max(self.queue_size, 1), dtype=np.int64))
        return positions.to(self.queue.device, non_blocking=True)

    def _all_ranks(self, gaps: Tensor, gamma0: float) -> tuple[Tensor, int]:
        """The gaps of all ranks in rank order, and where this rank's begin."""
        ranks = self.ranks
        if ranks == 1:
            return gaps, 0
        on_host = "cpu" in dist.get_backend_config(self.group)
        facts = self._facts(gamma0)
        own = torch.tensor(
            [gaps.numel(), *map(_to_integer, facts.values())],
            device="cpu" if on_host else gaps.device,
        )
        brought = own.new_empty(ranks * len(own))
        dist.all_gather_into_tensor(brought, own, group=self.group)
        sizes, *columns = zip(*brought.view(ranks, -1).tolist(), strict=True)
        members = dist.get_process_group_ranks(self.group)
        for column, (name, value) in zip(columns, facts.items(), strict=True):
            if len(set(column)) > 1:
                found = (_from_integer(integer, value) for integer in column)
                raise ValueError(
                    f"DynamicMargin: the ranks differ in {name}, expected the same on all: got "
                    + ", ".join(
                        f"{x} on rank {rank}" for x, rank in zip(found, members, strict=True)
                    )
                )
        width = max(sizes)
        padded = gaps.new_zeros(width)
        padded[: gaps.numel()] = gaps
        gathered = gaps.new_empty(ranks * width)
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        parts = [part[:size] for part, size in zip(gathered.split(width), sizes, strict=True)]
        return torch.cat(parts), sum(sizes[: dist.get_rank(self.group)])

    def _facts(self, gamma0: float) -> dict[str, float | int | str]:
        """What must be the same on all ranks, by name."""
        return {
            "tau": float(self.tau),
            "gamma0": gamma0,
            "scope": self.scope,
            "solver": self.solver,
            "queue_size": self.queue_size,
            "sample_size": self.sample_size,
            "seed": self.seed,
            "training mode": int(self.training),
            "the number of gaps queued": self.queued,
            "the number of draws": self.draws,
            "the queue that was loaded (its digest, 0: none)": self._loaded,
        }

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.queued, self.draws, self.seed])

    def set_extra_state(self, state: Tensor) -> None:
        self.queued, self.draws, self.seed = state.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}queue")
        if saved is not None and saved.shape != self.queue.shape:
            raise ValueError(
                f"queue_size: got {self.queue_size}, expected {saved.numel()} as in the state that is loaded "
                "(0: scope 'batch')"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if saved is not None:
            held = self.queue.detach().double().cpu()
            digest = hashlib.sha256(held.numpy().tobytes()).digest()[:7] if held.any() else b""
            self._loaded = int.from_bytes(digest, "big")


def _to_integer(value: float | int | str) -> int:
    """A setting as an int64, one for one."""
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return (*SCOPES, *SOLVERS).index(value) if isinstance(value, str) else value


def _from_integer(integer: int, like: float | int | str) -> float | int | str:
    """The setting that :func:`_to_integer` made the integer of; ``like`` is one of its type."""
    if isinstance(like, float):
        return float(struct.unpack("<d", struct.pack("<q", integer))[0])
    return (*SCOPES, *SOLVERS)[integer] if isinstance(like, str) else integer


def _check_solver(tau: float, solver: str) -> None:
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau: got {tau}, expected a finite number > 0")
    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, expected one of {', '.join(SOLVERS)}")


def _check_arguments(gaps: Tensor, gamma0: float) -> None:
    if not isinstance(gaps, Tensor) or not gaps.is_floating_point():
        got = gaps.dtype if isinstance(gaps, Tensor) else type(gaps).__name__
        raise TypeError(f"gaps: got {got}, expected a floating-point tensor (n,)")
    if gaps.dim() != 1:
        raise ValueError(f"gaps: got shape {tuple(gaps.shape)}, expected (n,)")
    if not (math.isfinite(gamma0) and gamma0 >= 0):
        raise ValueError(f"gamma0: got {gamma0}, expected a finite number ≥ 0")
