"""The fields of ``PreferenceConfig`` that belong to ``method: dnpo``, checked."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from fastpo.losses import find_loss

if TYPE_CHECKING:
    from .config import PreferenceConfig

METHODS = ("preference", "dnpo")
SCHEDULES = ("joint", "alternating")
NOISE_FIELDS = (
    "noise_schedule",
    "noise_alpha",
    "noise_rank",
    "noise_steps",
    "noise_learning_rate",
    "noise_sigma_limit",
)


def check_noise_settings(config: PreferenceConfig) -> None:
    """Raise ValueError for a field out of range; warn of those that have no effect.

    Raises:
        ValueError: the message names the field.
    """
    for name, choices in (("method", METHODS), ("noise_schedule", SCHEDULES)):
        if getattr(config, name) not in choices:
            raise ValueError(
                f"{name}: got {getattr(config, name)!r}, expected one of {', '.join(choices)}"
            )
    given = [
        n
        for n in NOISE_FIELDS
        if getattr(config, n) != type(config).__dataclass_fields__[n].default
    ]
    if config.method != "dnpo":
        if given:
            _warn(
                f"{', '.join(given)}: no effect with method {config.method!r}, expected method 'dnpo'"
            )
        return
    if not (_is_number(config.noise_alpha) and 0 <= config.noise_alpha < math.inf):
        raise ValueError(f"noise_alpha: got {config.noise_alpha!r}, expected a finite number ≥ 0")
    rate, limit = config.noise_learning_rate, config.noise_sigma_limit
    if not (_is_number(rate) and 0 < rate < math.inf):
        raise ValueError(f"noise_learning_rate: got {rate!r}, expected a finite number > 0")
    if not (_is_number(limit) and limit > 0):
        raise ValueError(f"noise_sigma_limit: got {limit!r}, expected a number > 0")
    for name in ("noise_rank", "noise_steps"):
        value = getattr(config, name)
        if name == "noise_rank" and value is None:
            continue
        if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            raise ValueError(f"{name}: got {value!r}, expected an integer ≥ 1")
    try:
        find_loss(config.loss_type).check_noise()
    except ValueError as error:
        raise ValueError(f"loss_type, method: {error}") from error
    if config.fp16:
        raise ValueError(
            "fp16: got True, expected False with method 'dnpo': the noise generator's gradient is not scaled; "
            "use bf16"
        )
    if config.noise_schedule == "joint" and "noise_steps" in given:
        _warn("noise_steps: no effect with noise_schedule 'joint', expected 'alternating'")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=6)
