"""An estimate as an aligned table, or as JSON with numbers in bytes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from .estimate import Estimate, estimate

if TYPE_CHECKING:
    from .config import EstimateConfig

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def print_estimate(config: EstimateConfig) -> None:
    """Estimate and print; errors are those of :func:`estimate`."""
    result = estimate(config)
    if config.json:
        print(json.dumps({**asdict(result), "fits": result.fits}, indent=1))
    else:
        print(table(config, result))


def table(config: EstimateConfig, result: Estimate) -> str:
    """What :func:`print_estimate` prints without ``json``."""
    autocast = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    devices = f"{config.devices} device" + "s" * (config.devices > 1)
    size = config.sequence_parallel_size
    readers = "device" if size == 1 else f"{size} devices"
    lines = [
        f"{result.model}: {result.parameters:,} parameters in {result.dtype}, {result.trained:,} trained; "
        f"{autocast} autocast",
        f"{result.sequences} sequences of {result.sequence_tokens} tokens per {readers} at once"
        f"{_rows(result)}; {devices}, sharding {config.sharding}",
        "",
        f"{'memory per device':<20}{'at most':>12}{'at the peak':>14}",
    ]
    for name, most in result.most.items():
        lines.append(f"  {name:<18}{_size(most):>12}{_size(result.at_peak[name]):>14}")
    lines.append(f"  {'total':<18}{'':>12}{_size(result.total):>14}")
    if result.device_memory is not None:
        rest = result.device_memory - result.total
        verdict = (
            f"fits, {_size(rest)} left" if result.fits else f"does not fit, {_size(-rest)} short"
        )
        lines.append(f"  {'device':<18}{'':>12}{_size(result.device_memory):>14}  {verdict}")
    if result.host_memory:
        lines.append(f"  {'on the host':<18}{_size(result.host_memory):>12}")
    lines += ["", *result.notes] if result.notes else []
    return "\n".join(lines)


def _rows(result: Estimate) -> str:
    if (result.rows, result.row_tokens) == (result.sequences, result.sequence_tokens):
        return ""
    rows = f"{result.rows} rows" if result.rows > 1 else "one row"
    return f", in {rows} of {result.row_tokens}"


def _size(count: int) -> str:
    unit, size = next(((u, s) for u, s in _UNITS if count >= s), ("B", 1))
    return f"{count / size:.2f} {unit}" if size > 1 else f"{count} B"
