"""One measured case as a heading and a table of text cells, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import median
from .memory import MIB

NOTHING = "–"
HEADER = (
    "rival",
    "forward, ms",
    "G",
    "forward + backward, ms",
    "least",
    "rounds",
    "G",
    "speed-up over eager",
    "extra MiB",
    "log-probs",
    "dH",
    "dW",
    "margin, nats",
)
EPILOGUE_HEADER = ("part", "ms", "least", "of a step")

Table = list[Sequence[str]]  # the first row is the header


def heading(record: dict[str, Any]) -> str:
    """What was measured, on what, in one paragraph."""
    case = record["case"]
    workload, nucleus = record["workload"], record["nucleus"]
    quantiles = nucleus["quantiles"]
    pairs = case["n"] // (2 * case["length"])
    parts = [
        f"{workload['name']} (mean entropy {workload['entropy']:.2f} nats, factor {workload['factor']:.3g}, "
        f"seed {workload['seed']}), {case['dtype']}",
        f"N {case['n']} ({pairs} pairs of 2×{case['length']}), H {case['width']}, V {case['vocab']}, "
        f"{workload['ignored']:.0%} ignored",
    ]
    if case["loss"]:
        parts.append(f"a step of the loss {case['loss']}")
    if case["frozen_head"]:
        parts.append("frozen head")
    parts.append(
        f"nucleus at 2^-10: median {quantiles['0.5']:.0f}, 90 % {quantiles['0.9']:.0f}, "
        f"99 % {quantiles['0.99']:.0f} columns"
    )
    sparsity = record.get("sparsity")
    if sparsity:
        parts.append(
            f"ρ {sparsity['active_fraction']:.4f}, dropped mass ≤ {sparsity['dropped_mass_max']:.2e}, "
            f"{sparsity['dense_rows']:.0f} dense rows"
        )
    unit = median(record.get("G_seconds", []))
    if unit:
        rate = flop(record) / unit / 1e12
        parts.append(f"G {1000 * unit:.3g} ms, {rate:.3g} TFLOP/s")
        parts.append(f"{len(record['G_seconds'])} rounds")
    return "; ".join(parts)


def flop(record: dict[str, Any]) -> float:
    """Of one N×V×H product over the labelled tokens."""
    case = record["case"]
    return 2.0 * record["workload"]["labelled"] * case["vocab"] * case["width"]


def table(record: dict[str, Any]) -> Table:
    """Header and one row for every rival that was measured."""
    if record["case"]["group"] == "epilogue":
        return _epilogue_table(record)
    measured = [r for r in record["results"] if r["status"] == "measured"]
    unit = median(record["G_seconds"])
    eager = next((median(r["step_seconds"]) for r in measured if r["rival"] == "eager"), None)
    on_cuda = record["device"] == "cuda"
    rows: Table = [(*HEADER, "TFLOP/s of 4 G") if on_cuda else HEADER]
    for r in measured:
        forward, step = median(r["forward_seconds"]), median(r["step_seconds"])
        rate = f"{4 * flop(record) / step / 1e12:.0f}" if step else NOTHING
        errors = r.get("errors", {})
        rows.append(
            (
                r["rival"],
                _ms(forward),
                _times(forward, unit),
                _ms(step),
                _ms(min(r["step_seconds"], default=None)),
                str(len(r["step_seconds"])),
                _times(step, unit),
                _times(eager, step),
                f"{r['extra_bytes'] / MIB:.1f}",
                *(
                    _error(errors.get(key))
                    for key in ("logps", "hidden_grad", "weight_grad", "margin_nats")
                ),
                *([rate] if on_cuda else []),
            )
        )
    return rows


def _epilogue_table(record: dict[str, Any]) -> Table:
    step = median(record["step_seconds"])
    names = {
        "solve": f"γ of {record['pairs']} pairs",
        "epilogue": "sums, gaps, γ, losses and their gradient",
        "step": "step of the head, certified",
    }
    rows: Table = [EPILOGUE_HEADER]
    for key, name in names.items():
        seconds = record[f"{key}_seconds"]
        value = median(seconds)
        share = f"{value / step:.2%}" if value and step else NOTHING
        rows.append((name, _ms(value), _ms(min(seconds, default=None)), share))
    return rows


def missing(record: dict[str, Any]) -> dict[str, str]:
    """Rival → why it has no figures in this case."""
    return {r["rival"]: r["reason"] for r in record.get("results", []) if r["status"] != "measured"}


def text(rows: Table) -> str:
    """Aligned columns, names left and numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows: Table) -> str:
    """The same as a Markdown table."""
    header, *body = rows
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(seconds: float | None, unit: float | None) -> str:
    return f"{seconds / unit:.2f}" if seconds and unit else NOTHING


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1e}"
