"""The report of a loop, from its files alone: what filters left, scores, win rates, prompts, lengths, pairs.

``report.json`` holds the numbers, ``report.md`` their tables and some pairs to read, ``scores.png`` and
``data.png`` the curves. The pages can be made again at any time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpo.atomic_write import write_atomically

from .conversation import prompt_text, read_prompt
from .manifest import load_manifest
from .rows import draw_rows, read_rows
from .text_measures import length_stats, prompt_diversity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS_SHOWN = 3
SHOWN_CHARACTERS = 400  # of each text of a pair
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BLUE, _ORANGE, _GREY = "#2a6fbb", "#d9772b", "#6b7280"


def report_loop(root: Path) -> Path:
    """Write the report of the loop in ``root``; returns the Markdown page.

    Raises:
        ValueError: ``root`` is no loop's directory.
    """
    if not (root / "loop.json").is_file():
        raise ValueError(f"{root}: no loop.json, expected the output_dir of fastpo iterate")
    settings = json.loads((root / "loop.json").read_text(encoding="utf-8"))
    document = {
        "method": settings["method"],
        "start": settings["model_name_or_path"],
        "evaluation": list(_evaluation(root)),
        "iterations": list(_iterations(root)),
    }
    document["best_iteration"] = _best(document["evaluation"])
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write_atomically(root / "report.json", text.encode())
    plots = [
        name
        for name, draw in (("scores.png", _plot_scores), ("data.png", _plot_data))
        if draw(document, root / name)
    ]
    write_atomically(root / "report.md", _page(document, plots, root).encode())
    return root / "report.md"


# ---- Numbers ----


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    found = [(int(p.name.removeprefix("iteration-")), p) for p in folder.glob("iteration-*")]
    yield from sorted(found)


def _evaluation(root: Path) -> Iterator[dict[str, Any]]:
    """Of every model, the start included: lengths, scores, wins against earlier models."""
    for k, folder in _numbered(root / "evaluation"):
        responses = folder / "responses.jsonl"
        if load_manifest(responses) is None:
            continue
        entry: dict[str, Any] = {"iteration": k, "length": _lengths(responses)}
        if load_manifest(folder / "scored.jsonl") is not None:
            scores = [row["scores"][0] for _, row in read_rows(folder / "scored.jsonl")]
            entry["score"] = _distribution(scores)
        for name in ("previous", "first"):
            scored = folder / f"versus-{name}-scored.jsonl"
            if load_manifest(scored) is not None:
                entry[f"win_rate_{name}"] = _win_rate(scored)
        if k == 1 and "win_rate_previous" in entry:
            entry["win_rate_first"] = entry["win_rate_previous"]
        yield entry


def _iterations(root: Path) -> Iterator[dict[str, Any]]:
    """Of every iteration: counts through the filters, scores of the pairs, prompts, seconds."""
    for k, folder in _numbered(root):
        if load_manifest(folder / "pairs.jsonl") is None:
            continue
        entry: dict[str, Any] = {"iteration": k, "counts": {}, "seconds": {}}
        for manifest_file in sorted(folder.glob("*.manifest.json")):
            name = manifest_file.name.removesuffix(".manifest.json")
            manifest = load_manifest(folder / name)
            assert manifest is not None
            stage = name.removesuffix(".jsonl")
            if manifest.counts:
                entry["counts"][stage] = manifest.counts
            entry["seconds"][stage] = manifest.seconds
        counts = entry["counts"]["pairs"]
        if counts["out"] and "response_chosen" in counts:
            entry["generated_winners"] = counts["response_chosen"] / counts["out"]
        pairs = folder / "pairs.jsonl"
        gaps = [
            row["chosen_score"] - row["rejected_score"]
            for _, row in read_rows(pairs)
            if row["chosen_score"] is not None
        ]
        if gaps:
            entry["gap"] = _distribution(gaps)
        prompts = folder / "prompts.jsonl"
        source = prompts if prompts.is_file() else root / "seeds/train.jsonl"
        texts = (prompt_text(read_prompt(row, where)) for where, row in read_rows(source))
        entry["prompt_similarity"] = prompt_diversity(texts)
        entry["chosen_length"] = length_stats(_answers(pairs, "chosen"))
        entry["rejected_length"] = length_stats(_answers(pairs, "rejected"))
        yield entry


def _answers(pairs: Path, name: str) -> Iterator[str]:
    for _, row in read_rows(pairs):
        value = row[name]
        yield value if isinstance(value, str) else value[-1]["content"]


def _lengths(responses: Path) -> dict[str, Any]:
    return length_stats(row["responses"][0] for _, row in read_rows(responses))


def _distribution(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    quantiles = {f"{q:g}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}
    return {"count": len(values), "mean": statistics.fmean(values), "quantiles": quantiles}


def _win_rate(scored: Path) -> dict[str, Any]:
    """Of the first responses against the second ones; a tie is half a win. And their mean lead in the score."""
    wins = ties = count = 0
    gap = 0.0
    for _, row in read_rows(scored):
        ours, theirs = row["scores"]
        wins += ours > theirs
        ties += ours == theirs
        gap += ours - theirs
        count += 1
    return {
        "prompts": count,
        "wins": wins,
        "ties": ties,
        "rate": (wins + ties / 2) / max(count, 1),
        "mean_gap": gap / max(count, 1),
    }


def _values(evaluation: list[dict[str, Any]]) -> dict[int, float]:
    """By iteration the mean score, or of a scorer that only compares, the mean lead over the start."""
    scores = {e["iteration"]: e["score"]["mean"] for e in evaluation if "score" in e}
    leads = {
        e["iteration"]: e["win_rate_first"]["mean_gap"] for e in evaluation if "win_rate_first" in e
    }
    return scores or (leads and {0: 0.0, **leads})


def _best(evaluation: list[dict[str, Any]]) -> int | None:
    """The iteration with the best value on the held-out prompts, the earlier of equal ones."""
    values = _values(evaluation)
    return max(values, key=lambda k: (values[k], -k)) if values else None


# ---- Page ----


def _page(document: dict[str, Any], plots: list[str], root: Path) -> str:
    parts = [f"# {document['method']} from {document['start']}"]
    if document["best_iteration"] is not None:
        parts.append(
            f"Best {_value_name(document['evaluation'])} on the held-out prompts: iteration "
            f"{document['best_iteration']}."
        )
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    if document["evaluation"]:
        parts += ["## Held-out prompts", _evaluation_table(document["evaluation"])]
    if document["iterations"]:
        parts += ["## What was made", _counts_table(document["iterations"])]
        parts += ["## Pairs", _pairs_table(document["iterations"])]
    for entry in document["iterations"]:
        k = entry["iteration"]
        parts += [f"## Pairs of iteration {k}, drawn at random", _examples(root, k)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _value_name(evaluation: list[dict[str, Any]]) -> str:
    return "mean score" if any("score" in e for e in evaluation) else "mean lead over the start"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _evaluation_table(evaluation: list[dict[str, Any]]) -> str:
    rows = []
    for entry in evaluation:
        score, first = entry.get("score"), entry.get("win_rate_first")
        rows.append(
            [
                str(entry["iteration"]),
                "" if score is None else f"{score['mean']:.4g}",
                ""
                if score is None
                else f"{score['quantiles']['0.05']:.3g} … {score['quantiles']['0.95']:.3g}",
                _rate(entry.get("win_rate_previous")),
                _rate(first),
                "" if first is None else f"{first['mean_gap']:+.3g}",
                f"{entry['length']['words']['mean']:.1f}",
            ]
        )
    head = [
        "iteration",
        "mean score",
        "5 … 95 %",
        "wins over the previous",
        "over the start",
        "lead over the start",
        "words",
    ]
    return _table(head, rows)


def _rate(win_rate: dict[str, Any] | None) -> str:
    return "" if win_rate is None else f"{win_rate['rate']:.1%} of {win_rate['prompts']}"


def _counts_table(iterations: list[dict[str, Any]]) -> str:
    rows = []
    for entry in iterations:
        for stage, counts in entry["counts"].items():
            others = [
                f"{name} {n}" for name, n in counts.items() if name not in ("in", "out") and n
            ]
            rows.append(
                [
                    str(entry["iteration"]), stage, str(counts.get("in", "")), str(counts.get("out", "")),
                    ", ".join(others), f"{entry['seconds'][stage]:.1f}",
                ]
            )  # fmt: skip
    return _table(["iteration", "stage", "rows in", "rows out", "others", "seconds"], rows)


def _pairs_table(iterations: list[dict[str, Any]]) -> str:
    rows = []
    for entry in iterations:
        winners, gap = entry.get("generated_winners"), entry.get("gap")
        similarity = entry["prompt_similarity"]
        rows.append(
            [
                str(entry["iteration"]),
                str(entry["counts"]["pairs"]["out"]),
                "" if winners is None else f"{winners:.1%}",
                "" if gap is None else f"{gap['mean']:.3g}",
                f"{entry['chosen_length']['words']['mean']:.1f}",
                f"{entry['rejected_length']['words']['mean']:.1f}",
                f"{similarity['mean']:.3f}",
            ]
        )
    head = [
        "iteration", "pairs", "chosen answers that a model made", "mean gap of scores", "words chosen",
        "words rejected", "similarity of prompts",
    ]  # fmt: skip
    return _table(head, rows)


def _examples(root: Path, k: int) -> str:
    pairs = root / f"iteration-{k}/pairs.jsonl"
    drawn, _ = draw_rows(lambda: (row for _, row in read_rows(pairs)), PAIRS_SHOWN, k)
    blocks = []
    for row in drawn:
        prompt = prompt_text(read_prompt(row, str(pairs)))
        lines = [f"**prompt** {_quoted(prompt)}"]
        for name in ("chosen", "rejected"):
            value = row[name]
            text = value if isinstance(value, str) else value[-1]["content"]
            number = row[f"{name}_score"]
            label = name if number is None else f"{name} ({number:.3g})"
            lines.append(f"**{label}** {_quoted(text)}")
        blocks.append("\n\n".join(lines))
    return "\n\n---\n\n".join(blocks)


def _quoted(text: str) -> str:
    """A text within a code fence that it cannot end."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    ticks = "`" * 3
    while ticks in shown:
        ticks += "`"
    return f"\n{ticks}text\n{shown}\n{ticks}"


# ---- Plots ----


def _plot_scores(document: dict[str, Any], path: Path) -> bool:
    """Scores with their middle half and 90 % or leads, and win rates, by iteration; False without them."""
    evaluation = document["evaluation"]
    values = _values(evaluation)
    if len(values) < 2:
        return False
    figure, (left, right) = _figure(2)
    steps = list(values)
    left.plot(steps, list(values.values()), "o-", color=_BLUE, markersize=4)
    scored = [entry["score"]["quantiles"] for entry in evaluation if "score" in entry]
    for low, high, alpha in (("0.05", "0.95", 0.12), ("0.25", "0.75", 0.2)):
        if scored:
            bounds = [q[low] for q in scored], [q[high] for q in scored]
            left.fill_between(steps, *bounds, color=_BLUE, alpha=alpha, lw=0)
    shown = "Score, held out: mean, middle 50 and 90 %"
    left.set_title(
        shown if scored else "Lead over the start, held out: mean", loc="left", fontsize=9
    )
    for name, color, label in (
        ("previous", _BLUE, "the previous"),
        ("first", _ORANGE, "the start"),
    ):
        found = [e for e in evaluation if f"win_rate_{name}" in e]
        rates = [100 * e[f"win_rate_{name}"]["rate"] for e in found]
        right.plot(
            [e["iteration"] for e in found], rates, "o-", color=color, markersize=4, label=label
        )
    right.axhline(50, color=_GREY, linewidth=0.8, linestyle=":")
    right.set_ylim(0, 100)
    right.set_title("Win rate against, %", loc="left", fontsize=9)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.set_xticks(steps)
    figure.savefig(path, dpi=130)
    return True


def _plot_data(document: dict[str, Any], path: Path) -> bool:
    """Pairs, lengths and prompt similarity by iteration; False where there is nothing."""
    iterations = document["iterations"]
    if not iterations:
        return False
    figure, (pairs, lengths, similarity) = _figure(3)
    steps = [entry["iteration"] for entry in iterations]
    pairs.bar(steps, [entry["counts"]["pairs"]["out"] for entry in iterations], 0.6, color=_BLUE)
    pairs.set_title("Pairs kept", loc="left", fontsize=9)
    for name, color in (("chosen", _BLUE), ("rejected", _ORANGE)):
        words = [entry[f"{name}_length"]["words"]["mean"] for entry in iterations]
        lengths.plot(steps, words, "o-", color=color, markersize=4, label=name)
    lengths.set_ylim(bottom=0)
    lengths.set_title("Words of an answer, mean", loc="left", fontsize=9)
    lengths.legend(fontsize=8, frameon=False)
    similar = [entry["prompt_similarity"]["mean"] for entry in iterations]
    similarity.plot(steps, similar, "o-", color=_BLUE, markersize=4)
    similarity.set_ylim(0, 1)
    similarity.set_title("Similarity of prompts", loc="left", fontsize=9)
    for axes in (pairs, lengths, similarity):
        axes.set_xticks(steps)
    figure.savefig(path, dpi=130)
    return True


def _figure(panels: int) -> tuple[Any, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * panels, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(1, panels))
    for axes in all_axes:
        axes.set_xlabel("iteration", fontsize=9)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes
