"""``philox_normal``: the noise of DNPO as a pure function of seed, token and vocabulary entry."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.kernels import philox_torch

SEEDS = 2**64
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def philox_normal(seed: int, token_index: Tensor, vocab_index: Tensor) -> Tensor:
    """Standard normals ε(seed, token index, vocabulary index), the same on every device.

    Args:
        seed: in [0, 2⁶⁴).
        token_index: integers of any shape, taken modulo 2⁶⁴.
        vocab_index: integers ≥ 0, of a shape that broadcasts against ``token_index``.

    Returns:
        float32 of the broadcast shape, |ε| ≤ 6.77. Philox 4×32-10 (Salmon et al., SC 2011) and the transform of
        Box and Muller, see ``fastpo.kernels.philox_torch``.

    Raises:
        TypeError: an index that is no integer tensor, a seed that is no integer.
        ValueError: a seed out of range, a negative ``vocab_index``, or indices on different devices or of
            shapes that do not broadcast.
    """
    check_seed(seed)
    for name, index in (("token_index", token_index), ("vocab_index", vocab_index)):
        if not isinstance(index, Tensor):
            raise TypeError(f"{name}: got {type(index).__name__}, expected a tensor")
        if index.dtype not in INTEGERS:
            raise TypeError(f"{name}: got dtype {index.dtype}, expected an integer one")
    if token_index.device != vocab_index.device:
        raise ValueError(
            f"vocab_index: got device {vocab_index.device}, expected that of token_index, "
            f"{token_index.device}"
        )
    try:
        torch.broadcast_shapes(token_index.shape, vocab_index.shape)
    except RuntimeError:
        raise ValueError(
            f"vocab_index: got shape {tuple(vocab_index.shape)}, which does not broadcast against "
            f"token_index {tuple(token_index.shape)}"
        ) from None
    if vocab_index.numel() and int(vocab_index.min()) < 0:
        raise ValueError(f"vocab_index: got {int(vocab_index.min())}, expected integers ≥ 0")
    return philox_torch.normals(seed, token_index.long(), vocab_index.long())


def check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, expected an integer")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed: got {seed}, expected an integer in [0, 2**64)")
