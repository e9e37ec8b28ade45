"""Operations whose gradient is a kernel of its own: one derivative exists, a second is refused by name."""

from __future__ import annotations

from typing import Any

from torch._library.custom_ops import CustomOpDef


def refuse_double_backward(backward_operation: CustomOpDef, name: str) -> None:
    """Make differentiating the gradient of the public operation ``name`` a clear error."""

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            f"{name} can be differentiated once: its gradient has no gradient of its own "
            "(create_graph=True was given, or a gradient penalty is in use)"
        )

    backward_operation.register_autograd(refuse)
