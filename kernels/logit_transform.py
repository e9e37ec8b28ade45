"""From raw products to logits: z = softcap·tanh(scale·(W h + b)/softcap)/temperature, and its derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LogitTransform(NamedTuple):
    """Element-wise map from the raw product u = W h + b to the logit z.

    Without a softcap it is z = u·logit_scale/temperature.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def linear_factor(self) -> float:
        """dz/du where no softcap bends it."""
        return self.logit_scale / self.temperature

    def apply_(self, raw: torch.Tensor) -> torch.Tensor:
        """Overwrite ``raw`` with z and return it."""
        if self.softcap is None:
            return raw if self.linear_factor == 1.0 else raw.mul_(self.linear_factor)
        return (
            raw.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        )

    def derivative(self, logits: torch.Tensor) -> torch.Tensor | float:
        """dz/du, given z: ``linear_factor``·(1 − tanh²), with tanh read back from z."""
        if self.softcap is None:
            return self.linear_factor
        tanh = logits * (self.temperature / self.softcap)
        return tanh.square_().neg_().add_(1.0).mul_(self.linear_factor)


IDENTITY = LogitTransform()
