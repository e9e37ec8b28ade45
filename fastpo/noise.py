"""``NoiseGenerator``: DNPO's trainable noise, a linear layer from hidden states to the σ of every logit.

σ = U h + b, with a rank U = W A. The variance penalty mean(σ²) over N tokens and V vocabulary entries needs no
N×V numbers: with the mean h̄ and the covariance C of the hidden states,

    mean(σ²) = (1/V) Σ_v [ u_vᵀ C u_v + (u_vᵀ h̄ + b_v)² ]

which is one product of U with an H×H matrix (with a rank, of W with A C Aᵀ, r×r). Centred like this it is a sum
of terms that are not negative, so nothing cancels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from fastpo.atomic_write import write_atomically
from fastpo.kernels.chunking import budget_bytes, plan_tile, spans
from fastpo.kernels.precision import accumulation_dtype, full_precision
from fastpo.kernels.products_torch import add_product, multiply
from fastpo.ops.noisy_linear_logprobs import noisy_linear_logprobs


class NoiseGenerator(nn.Module):
    """σ = U h + b for the logits of a reference model: the trainable part of DNPO's noise z + σ∘ε.

    Yang et al., arXiv 2502.05400. The sign of σ is free, as ε is symmetric, so nothing keeps σ positive. The
    generator is needed in training alone and is no part of the trained model.

    Args:
        hidden_size: H of the reference model.
        vocab_size: V, rows of its LM head.
        rank: None: U is ``weight``, V×H parameters. r ≥ 1: U = ``weight`` · ``proj``, r·(V + H) parameters.
        init_std: standard deviation of the entries of U at the start, ≥ 0; ``bias`` starts at 0. σ then starts
            with a deviation of ``init_std`` · ‖h‖. With 0 there is no noise until training makes some.
        device, dtype: of the parameters, as in ``torch.nn``; None: the defaults.

    Attributes:
        weight: (V, H), or (V, r) with a rank; drawn from N(0, init_std²).
        bias: (V,).
        proj: (r, H), drawn from N(0, 1/r); None without a rank.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size < 1, or ``init_std`` negative or not finite.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    proj: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        rank: int | None = None,
        init_std: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("hidden_size", hidden_size),
            ("vocab_size", vocab_size),
            ("rank", 1 if rank is None else rank),
        ):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: got {type(size).__name__}, expected an integer ≥ 1")
            if size < 1:
                raise ValueError(f"{name}: got {size}, expected an integer ≥ 1")
        if not 0 <= init_std < math.inf:
            raise ValueError(f"init_std: got {init_std}, expected a finite number ≥ 0")
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.rank = rank
        self.init_std = init_std
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = hidden_size if rank is None else rank
        self.weight = nn.Parameter(torch.empty(vocab_size, width, **factory))
        self.bias = nn.Parameter(torch.empty(vocab_size, **factory))
        proj = None if rank is None else nn.Parameter(torch.empty(rank, hidden_size, **factory))
        self.register_parameter("proj", proj)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew from PyTorch's generator."""
        nn.init.normal_(self.weight, std=self.init_std)
        nn.init.zeros_(self.bias)
        if self.proj is not None and self.rank is not None:
            nn.init.normal_(self.proj, std=self.rank**-0.5)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, rank={self.rank}"

    def forward(
        self,
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (...)
        *,
        seed: int,
        token_index: Tensor | None = None,  # (...)
        **options: Any,
    ) -> Any:
        """Log-probs of the labels under the logits with this noise: :func:`fastpo.noisy_linear_logprobs`.

        ``hidden`` and ``weight`` are the reference's; ``options`` are the operation's others, ``bias`` and
        ``return_clean`` among them.

        Raises:
            TypeError, ValueError: as the operation does; hidden states or a head of other sizes than this
                generator's.
        """
        self.check_sizes(hidden, weight)
        return noisy_linear_logprobs(
            hidden,
            weight,
            labels,
            self.weight,
            self.bias,
            noise_proj=self.proj,
            seed=seed,
            token_index=token_index,
            **options,
        )

    def penalty(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """mean(σ²) over tokens and vocabulary, exactly and without a pass over N×V.

        It costs N·H² + V·H² multiplications, its gradient V·H² again; with a rank r² stands for the second H².

        Args:
            hidden: (..., H) floating point, the reference's last hidden states; no gradient flows into them.
            mask: (...) bool, the tokens that count; None: all.

        Returns:
            () float32 (float64 where ``hidden`` or the parameters are), differentiable once in the parameters;
            its root is the root mean square of σ. 0 if no token counts. Beyond the inputs and the gradients it
            holds a few H×H matrices and slices of bounded size.

        Raises:
            TypeError: ``mask`` is not boolean.
            ValueError: shapes or devices that do not fit.
        """
        return self.penalty_and_peak(hidden, mask)[0]

    def penalty_and_peak(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`penalty`, and from the same pass the largest root mean square of σ of a vocabulary entry.

        The second, max_v (mean_t σ_tv²)^½, () in the same dtype and detached, shows noise that grows on few
        entries, which a mean over the vocabulary hides.
        """
        rows = self._rows(hidden, mask)
        dtype = self._accumulator(rows)
        if rows.shape[0] == 0:
            return self.bias[:0].sum(dtype=dtype), torch.zeros((), dtype=dtype, device=rows.device)
        mean, covariance = _moments(rows, dtype)
        penalty, largest = _MeanSquare.apply(self.weight, self.bias, self.proj, mean, covariance)
        return penalty, largest.sqrt()

    @torch.no_grad()
    def sigma_max(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """max |σ| over tokens and vocabulary: one pass over N×V, tile by tile, so for log lines alone.

        Arguments and errors as for :meth:`penalty`; () in the same dtype, detached, 0 if no token counts.
        """
        rows = self._rows(hidden, mask)
        dtype = self._accumulator(rows)
        largest = torch.zeros((), dtype=dtype, device=rows.device)
        vocab = self.vocab_size
        tile = plan_tile(rows.shape[0], vocab, self.hidden_size, rows.device, dtype)
        with full_precision(rows.device):
            for span in spans(rows.shape[0], tile.rows):
                inner = rows[span].to(dtype)
                if self.proj is not None:
                    inner = multiply(inner, self.proj.to(dtype))
                for cols in spans(vocab, tile.cols):
                    sigma = multiply(inner, self.weight[cols].to(dtype))
                    sigma += self.bias[cols]
                    largest = torch.maximum(largest, sigma.abs_().max())
        return largest

    def save(self, path: str | Path) -> None:
        """Write the parameters as safetensors, under a temporary name that is then renamed."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(Path(path), save(tensors))

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, in place.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged, holds something else, or a generator of another rank, hidden size or
                vocabulary.
        """
        path = Path(path)
        try:
            tensors = load(path.read_bytes())
        except FileNotFoundError:
            raise FileNotFoundError(f"path: no file {str(path)!r}") from None
        except SafetensorError as error:
            raise ValueError(f"path: {path} is not a safetensors file: {error}") from error
        self.check_state(tensors, str(path))
        self.load_state_dict(tensors)

    def check_state(self, tensors: dict[str, Tensor], source: str) -> None:
        """Raise ValueError, naming ``source``, unless ``tensors`` are the state of a generator like this."""
        if not {"weight", "bias"} <= tensors.keys() <= {"weight", "bias", "proj"}:
            held = ", ".join(sorted(tensors)[:4]) or "nothing"
            raise ValueError(f"{source}: is no noise generator: it holds {held}")
        proj = tensors.get("proj")
        for name, tensor in tensors.items():
            if tensor.dim() != (1 if name == "bias" else 2):
                raise ValueError(
                    f"{source}: is no noise generator: {name} has shape {tuple(tensor.shape)}"
                )
        vocab, width = tensors["weight"].shape
        if tensors["bias"].shape != (vocab,) or (proj is not None and proj.shape[0] != width):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"{source}: is no noise generator: its shapes do not fit, {shapes}")
        saved = {
            "rank": None if proj is None else width,
            "hidden_size": width if proj is None else proj.shape[1],
            "vocab_size": vocab,
        }
        for name, value in saved.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected {value}, that of the noise generator "
                    f"in {source}"
                )

    def check_sizes(self, hidden: Tensor, weight: Tensor) -> None:
        """Raise ValueError unless hidden states (..., H) and a head (V, H) are of this generator's sizes."""
        if hidden.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"hidden: got shape {tuple(hidden.shape)}, expected (..., {self.hidden_size}), the width of "
                "the noise generator"
            )
        if weight.shape[:1] != (self.vocab_size,):
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}, expected ({self.vocab_size}, "
                f"{self.hidden_size}), the vocabulary of the noise generator"
            )

    def _accumulator(self, rows: Tensor) -> torch.dtype:
        return accumulation_dtype(torch.promote_types(rows.dtype, self.weight.dtype))

    def _rows(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The (N, H) hidden states that count, detached."""
        if hidden.shape[-1:] != (self.hidden_size,) or not hidden.is_floating_point():
            raise ValueError(
                f"hidden: got {hidden.dtype} of shape {tuple(hidden.shape)}, expected floating point "
                f"(..., {self.hidden_size}), the width of the noise generator"
            )
        if hidden.device != self.weight.device:
            raise ValueError(
                f"hidden: got device {hidden.device}, expected that of the noise generator, "
                f"{self.weight.device}"
            )
        hidden = hidden.detach()
        if mask is None:
            return hidden.reshape(-1, self.hidden_size)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: got dtype {mask.dtype}, expected torch.bool")
        if mask.shape != hidden.shape[:-1]:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {tuple(hidden.shape[:-1])} for hidden "
                f"{tuple(hidden.shape)}"
            )
        return hidden[mask]


def _moments(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean (H,) and covariance (H, H) of N ≥ 1 hidden states (N, H), in two passes over them."""
    count, width = rows.shape
    step = _slice_rows(width, dtype, rows.device)
    mean = torch.zeros(width, dtype=torch.float64, device=rows.device)
    for span in spans(count, step):
        mean += rows[span].sum(0, dtype=torch.float64)
    mean /= count
    covariance = torch.zeros(width, width, dtype=dtype, device=rows.device)
    with full_precision(rows.device):
        for span in spans(count, step):
            centred = (rows[span] - mean).to(dtype)
            add_product(covariance, centred.t(), centred)
    return mean.to(dtype), covariance.div_(count)


class _MeanSquare(torch.autograd.Function):
    """mean(σ²), and max_v mean_t σ_tv², from the parameters and the hidden states' mean (H,) and covariance
    (H, H).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        weight: Tensor,
        bias: Tensor,
        proj: Tensor | None,
        mean: Tensor,
        covariance: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with full_precision(weight.device):
            inner_mean, inner_covariance = _projected(proj, mean, covariance)
            total = torch.zeros((), dtype=torch.float64, device=weight.device)
            largest = torch.zeros((), dtype=mean.dtype, device=weight.device)
            for span, part in _slices(weight, mean.dtype):
                squares = multiply(part, inner_covariance).mul_(part).sum(1)  # it is symmetric
                offset = torch.addmv(bias[span].to(mean.dtype), part, inner_mean)
                squares += offset.square_()
                total += squares.sum(dtype=torch.float64)
                largest = torch.maximum(largest, squares.max())
        ctx.save_for_backward(weight, bias, proj, mean, covariance)  # type: ignore[arg-type]
        ctx.mark_non_differentiable(largest)
        return (total / weight.shape[0]).to(mean.dtype), largest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, bias, proj, mean, covariance = ctx.saved_tensors  # type: ignore[attr-defined]
        d_weight, d_bias = torch.empty_like(weight), torch.empty_like(bias)
        scale = 2 * grad / weight.shape[0]
        with full_precision(weight.device):
            inner_mean, inner_covariance = _projected(proj, mean, covariance)
            d_mean = torch.zeros_like(inner_mean)
            gram = torch.zeros_like(inner_covariance)
            for span, part in _slices(weight, mean.dtype):
                offset = torch.addmv(bias[span].to(mean.dtype), part, inner_mean)
                product = multiply(part, inner_covariance).addr_(offset, inner_mean)
                d_weight[span] = product.mul_(scale)
                d_bias[span] = offset * scale
                if proj is not None:
                    add_product(gram, part.t(), part)
                    d_mean.addmv_(part.t(), offset)
            d_proj = None
            if proj is not None:
                d_proj = gram @ (proj.to(mean.dtype) @ covariance)
                d_proj = d_proj.addr_(d_mean, mean).mul_(scale).to(proj.dtype)
        return d_weight, d_bias, d_proj, None, None


def _projected(proj: Tensor | None, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of A h."""
    if proj is None:
        return mean, covariance
    proj = proj.to(mean.dtype)
    return proj @ mean, proj @ covariance @ proj.t()


def _slices(weight: Tensor, dtype: torch.dtype) -> Any:
    """Slices of the vocabulary, with their rows of ``weight`` in ``dtype``."""
    step = _slice_rows(weight.shape[1], dtype, weight.device)
    for span in spans(weight.shape[0], step):
        yield span, weight[span].to(dtype)


def _slice_rows(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of that width of which two slices (an operand and a product) fill a quarter of the budget."""
    return max(1, budget_bytes(device) // (8 * width * dtype.itemsize))
