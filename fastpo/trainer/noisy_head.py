"""The reference's forward with DNPO's noise in the logits of the rejected answers; its logits never exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpo.head import FusedHead
from fastpo.losses.noisy_reference import NoisyReference, score_with_noise
from fastpo.noise import NoiseGenerator
from fastpo.ops.linear_logprobs import linear_logprobs
from fastpo.ops.sequence_logprobs import sequence_sums

from .sharded import free_gathered, is_fsdp


class NoisyHead:
    """A reference's forward that ends in log-probs under noise, for the rejected answers, instead of logits.

    The noise is added inside the head's own forward, to tiles of logits: that is where the head's weight is
    whole, and neither logits nor hidden states of the batch leave the model but those of the scored tokens.

    Args:
        model: the reference, or the PEFT model whose base it is.
        generator: the noise.
        op_kwargs: as for :class:`fastpo.fused_head`.

    Raises:
        ValueError: the model's head is no plain linear layer, or its logits are changed in another way than by
            a factor and a tanh cap.
    """

    def __init__(self, model: nn.Module, generator: NoiseGenerator, **op_kwargs: Any) -> None:
        self.generator = generator
        self._head = FusedHead(model, operation=self._score, **op_kwargs)

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        known: Tensor | None,  # (2B,)
        seed: int,
        token_index: Tensor,  # (B, T)
        mean_tokens: Tensor,
        differentiable: bool,
    ) -> tuple[Tensor, NoisyReference]:
        """Log-prob sums (2B,) float64 without noise, and the B rejected answers under noise.

        Args:
            model: what to call, in evaluation mode.
            inputs: keywords of its forward with the labels of B pairs, (2B, T), or where ``known`` is given
                of the rejected answers alone, (B, T).
            known: log-prob sums without noise, of which those of the chosen answers are taken.
            seed: of the noise.
            token_index: which token each position of the rejected answers is.
            mean_tokens: see :func:`fastpo.losses.noisy_reference.score_with_noise`.
            differentiable: whether a gradient to the generator is wanted.
        """
        self._chosen = len(inputs["labels"]) - len(token_index)
        self._options: dict[str, Any] = {
            "seed": seed,
            "token_index": token_index,
            "mean_tokens": mean_tokens,
        }
        self._differentiable = differentiable and torch.is_grad_enabled()
        self._head_is_freed = is_fsdp(model)
        with torch.no_grad(), self._head:
            model(**inputs)
        free_gathered(self.generator)
        chosen, noisy = self._result
        del self._result, self._options
        if known is not None:
            chosen = known.chunk(2)[0].double()
        return torch.cat([chosen, noisy.clean_logps]), noisy

    def _score(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **options: Any
    ) -> Tensor:
        """In the place of :func:`fastpo.linear_logprobs` in the head's forward."""
        parts = (slice(0, self._chosen), slice(self._chosen, None))  # chosen answers, rejected ones
        tokens = linear_logprobs(hidden[parts[0]], weight, labels[parts[0]], bias, **options)
        if self._differentiable and self._head_is_freed:
            # The noise's backward reads the head, which FSDP2 frees behind this forward or, of a policy that is
            # its own reference, in the policy's backward; only a gradient of the head would bring it back.
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        with torch.set_grad_enabled(self._differentiable):
            noisy = score_with_noise(
                self.generator,
                hidden[parts[1]],
                weight,
                labels[parts[1]],
                bias,
                **self._options,
                **options,
            )
        self._result = sequence_sums(tokens, labels[parts[0]])[0], noisy
        return torch.zeros_like(labels, dtype=torch.float32)
