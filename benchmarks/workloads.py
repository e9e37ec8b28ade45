"""What the benchmarks run on: hidden states, a head and labels whose softmaxes look like a language model's.

Speed of anything that uses the sparsity of a softmax depends on the data, so there are two workloads:

- ``flat``: random states, logits of deviation 1; every nucleus is nearly the whole vocabulary, the worst case.
- ``lm``: states and head of a small trained language model (of ``lm_states``, or any safetensors file with
  ``hidden`` and ``weight``), brought to the asked shape and to the mean entropy of a large model:

  1. a vocabulary beyond the model's V₀ is filled with copies of its rows, in order, each with noise of
     head_noise·std(W)·N(0, 1) (σ); a smaller one keeps the first rows, which the tokenizer of ``lm_states``
     numbers from frequent to rare;
  2. states are drawn without repetition; beyond their number they are drawn again, each time with noise of
     STATE_NOISE of their deviation, since equal rows would share their nuclei and flatter a sparse method;
  3. the states are multiplied by the one factor that gives the stated mean entropy over the labelled rows;
  4. labels are drawn from the softmax, as an answer of the model would be;
  5. states and head are multiplied by one matrix with orthonormal columns (H₀ → H), which keeps every logit.

Everything is a function of the seed (per kind of device: CPU and CUDA draw other numbers) and is computed in
chunks on the device, so that N×V logits never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastpo.kernels.chunking import budget_bytes

IGNORE_INDEX = -100
ENTROPY_TOLERANCE = 0.02  # nats, of the mean
# With it, blocks of repeated states unite as many columns, for the size of their nuclei, as blocks of distinct
# states do (within 5 %; without noise 4 to 6 % fewer, with 0.3 about 4 to 10 % more).
STATE_NOISE = 0.1
PERIOD = 512  # ignored rows come first in every stretch of so many rows, as a prompt stands before its answer
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
FLAT_DEVIATION = 1.0


@dataclass(frozen=True)
class Workload:
    """Inputs of one benchmark, and what is known about them."""

    name: str
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,) int64, IGNORE_INDEX where the row does not count
    ignored: float  # share of such rows
    entropy: float  # mean entropy of the labelled rows, nats
    factor: float  # that the model's states were multiplied by; 1 for flat
    seed: int
    bias: Tensor | None = None  # (V,)


def flat(
    n: int,
    width: int,
    vocab: int,
    *,
    ignored: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Workload:
    """Random states (n, width) and head (vocab, width): Gaussian logits of deviation 1, uniform labels."""
    _check(n, width, vocab, ignored, dtype)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.empty(n, width, dtype=dtype, device=device)
    hidden.normal_(0, 1, generator=generator)
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    weight.normal_(0, FLAT_DEVIATION / math.sqrt(width), generator=generator)
    labels = torch.randint(vocab, (n,), generator=generator, device=device)
    labelled = _labelled(n, ignored, device)
    return Workload(
        name="flat",
        hidden=hidden,
        weight=weight,
        labels=labels.masked_fill_(~labelled, IGNORE_INDEX),
        ignored=1 - labelled.double().mean().item(),
        entropy=entropies(hidden[labelled][:1024], weight).mean().item(),
        factor=1.0,
        seed=seed,
    )


def lm(
    n: int,
    width: int,
    vocab: int,
    *,
    entropy: float,
    ignored: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    states: str | Path | None = None,
    head_noise: float = 1.0,
) -> Workload:
    """States (n, width) and head (vocab, width) of a language model with the stated mean entropy (nats) ± 0.02.

    ``states`` names a safetensors file with ``hidden`` (rows, H₀) and ``weight`` (V₀, H₀); by default the
    project's own model of ``seed`` is trained, once, and cached. Raises ValueError if width < H₀ (fewer
    dimensions cannot hold the same logits) or if no factor on the states reaches the entropy.
    """
    _check(n, width, vocab, ignored, dtype)
    if not 0 < entropy < math.log(vocab):
        raise ValueError(
            f"entropy must lie in (0, log(vocab) = {math.log(vocab):.2f}) nats, got {entropy}"
        )
    if head_noise < 0:
        raise ValueError(f"head_noise must be ≥ 0, got {head_noise}")
    device = torch.device(device)
    hidden, weight = _load(states, seed, device)
    if width < hidden.shape[1]:
        raise ValueError(
            f"width must be ≥ {hidden.shape[1]}, the hidden size of the states, got {width}"
        )
    generator = torch.Generator(device).manual_seed(seed)
    weight = _extend_head(weight, vocab, head_noise, generator)
    hidden = _extend_states(hidden, n, generator)
    labelled = _labelled(n, ignored, device)

    factor = factor_for(entropy, hidden[labelled], weight)
    hidden *= factor
    labels = torch.full((n,), IGNORE_INDEX, device=device)
    measured, labels[labelled] = _draw_labels(hidden[labelled], weight, generator)

    # Orthonormal columns: QᵀQ = 1, so (h Qᵀ)·(w Qᵀ) = h·w.
    gaussian = torch.randn(width, hidden.shape[1], generator=generator, device=device)
    rotation = torch.linalg.qr(gaussian).Q.T
    return Workload(
        name=f"lm-{entropy:g}",
        hidden=_rotate(hidden, rotation, dtype),
        weight=_rotate(weight, rotation, dtype),
        labels=labels,
        ignored=1 - labelled.double().mean().item(),
        entropy=measured,
        factor=factor,
        seed=seed,
    )


def entropies(hidden: Tensor, weight: Tensor) -> Tensor:
    """Entropy in nats of softmax(weight @ h) for every row h: (n,) float64."""
    return torch.cat([_moments(z)[0] for z in _logits(hidden, weight)])


@torch.no_grad()
def nucleus_sizes(
    hidden: Tensor,  # (n, H)
    weight: Tensor,  # (V, H)
    tol: float,
) -> Tensor:
    """Size of the smallest set of columns that leaves at most ``tol`` of each row's probability: (n,) int64.

    Exact, by sorting; logits in float32 (float64 for float64 inputs), probabilities in float64.
    """
    return nucleus_sizes_at(hidden, weight, [tol])[0]


@torch.no_grad()
def nucleus_sizes_at(hidden: Tensor, weight: Tensor, tols: Sequence[float]) -> Tensor:
    """:func:`nucleus_sizes` at several tolerances for one sort: (len(tols), n) int64."""
    if not all(0 <= tol < 1 for tol in tols):
        raise ValueError(f"tol must lie in [0, 1), got {list(tols)}")
    bounds = torch.tensor(tols, dtype=torch.float64, device=hidden.device)
    sizes = []
    for z in _logits(hidden, weight):
        # From the smallest up, so that the sums of the dropped entries are accurate.
        mass = z.sort(dim=1).values.double().softmax(dim=1).cumsum(dim=1)
        dropped = torch.searchsorted(mass, bounds.expand(len(z), -1).contiguous(), right=True)
        sizes.append(weight.shape[0] - dropped)
    return torch.cat(sizes).T if sizes else torch.empty(len(tols), 0, dtype=torch.int64)


def quantiles(sizes: Tensor, at: Sequence[float] = QUANTILES) -> dict[float, float]:
    """Quantiles of nucleus sizes (or of anything with one number per row), as the report lists them."""
    points = torch.tensor(at, dtype=torch.float64)
    return dict(zip(at, sizes.double().cpu().quantile(points).tolist(), strict=True))


def _check(n: int, width: int, vocab: int, ignored: float, dtype: torch.dtype) -> None:
    for name, value, least in (("n", n, 1), ("width", width, 1), ("vocab", vocab, 2)):
        if value < least:
            raise ValueError(f"{name} must be ≥ {least}, got {value}")
    if not 0 <= ignored < 1:
        raise ValueError(f"ignored must lie in [0, 1), got {ignored}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")


def _labelled(n: int, ignored: float, device: torch.device) -> Tensor:
    """(n,) bool. At least one row is labelled."""
    period = min(PERIOD, n)
    place = torch.arange(n, device=device) % period
    return place >= min(round(ignored * period), period - 1)


def _load(states: str | Path | None, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    from safetensors.torch import load_file

    if states is None:
        from .lm_states import states_file

        states = states_file(seed=seed)
    tensors = load_file(states, device=str(device))
    missing = {"hidden", "weight"} - tensors.keys()
    if missing:
        raise ValueError(
            f"states must hold 'hidden' and 'weight', {states} lacks {sorted(missing)}"
        )
    hidden, weight = tensors["hidden"].float(), tensors["weight"].float()
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "states must hold hidden (rows, H) and weight (V, H), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)} in {states}"
        )
    return hidden, weight


def _extend_head(weight: Tensor, vocab: int, noise: float, generator: torch.Generator) -> Tensor:
    base = weight.shape[0]
    if vocab <= base:
        return weight[:vocab].clone()
    deviation = noise * weight.std().item()
    extended = weight.repeat(-(-vocab // base), 1)[:vocab]
    added = extended[base:]
    added += deviation * torch.randn(added.shape, generator=generator, device=weight.device)
    return extended


def _extend_states(hidden: Tensor, n: int, generator: torch.Generator) -> Tensor:
    deviation = STATE_NOISE * hidden.std().item()
    parts = []
    for start in range(0, n, len(hidden)):
        order = torch.randperm(len(hidden), generator=generator, device=hidden.device)
        part = hidden[order[: n - start]]
        if start:
            part += deviation * torch.randn(part.shape, generator=generator, device=part.device)
        parts.append(part)
    return torch.cat(parts)


def _logits(hidden: Tensor, weight: Tensor) -> Iterable[Tensor]:
    """Logits of successive chunks of rows, (rows, V), in float32 (float64 for float64 inputs)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    budget = budget_bytes(hidden.device)
    head = weight.to(dtype).T
    for rows in hidden.split(max(1, budget // (weight.shape[0] * dtype.itemsize))):
        yield rows.to(dtype) @ head


def _moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy, and variance of the logits under their softmax, per row: (n,) float64 each."""
    z = logits - logits.amax(dim=1, keepdim=True)
    p = z.exp()
    total = p.sum(dim=1)
    p *= z
    mean = p.sum(dim=1) / total
    p *= z
    square = p.sum(dim=1) / total
    entropy = total.log() - mean
    return entropy.double(), (square - mean * mean).clamp_min(0).double()


def factor_for(target: float, hidden: Tensor, weight: Tensor) -> float:
    """The factor on ``hidden`` that gives the mean entropy ``target`` nats.

    d entropy / d log factor = −variance of the logits under their softmax, so entropy falls with the factor: a
    bisection on a few rows, then Newton steps on all of them.
    """
    few = torch.cat(list(_logits(hidden[:: -(-len(hidden) // 128)], weight)))
    low, high = 1e-3, 1e3
    for _ in range(24):
        middle = math.sqrt(low * high)
        if _moments(few * middle)[0].mean().item() > target:
            low = middle
        else:
            high = middle
    factor = middle
    for _ in range(8):
        moments = [_moments(z) for z in _logits(hidden * factor, weight)]
        error = torch.cat([entropy for entropy, _ in moments]).mean().item() - target
        if abs(error) < ENTROPY_TOLERANCE / 10:
            return factor
        slope = torch.cat([variance for _, variance in moments]).mean().item()
        factor *= math.exp(max(-0.5, min(0.5, error / max(slope, 1e-6))))
    raise ValueError(
        f"entropy {target} nats is out of reach of these states: "
        f"a factor of {factor:.3g} leaves it {error:+.3f} off"
    )


def _draw_labels(
    hidden: Tensor, weight: Tensor, generator: torch.Generator
) -> tuple[float, Tensor]:
    """Mean entropy of the rows and one label drawn from each row's softmax, (n,) int64."""
    entropy, labels = 0.0, []
    for z in _logits(hidden, weight):
        entropy += _moments(z)[0].sum().item()
        mass = z.softmax(dim=1).cumsum_(dim=1)
        u = torch.rand(len(z), 1, generator=generator, device=z.device)
        # In (0, total]: never a leading column without probability.
        u = (1 - u) * mass[:, -1:]
        labels.append(torch.searchsorted(mass, u).squeeze(1))
    return entropy / len(hidden), torch.cat(labels)


def _rotate(rows: Tensor, rotation: Tensor, dtype: torch.dtype) -> Tensor:
    rotated = torch.empty(len(rows), rotation.shape[1], dtype=dtype, device=rows.device)
    for into, part in zip(rotated.split(65536), rows.split(65536), strict=True):
        into.copy_(part @ rotation)
    return rotated
