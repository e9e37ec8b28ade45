"""The report of a loop, from its files alone: what filters left, scores, win rates, prompts, lengths, pairs.

``report.json`` holds the numbers, ``report.md`` their tables and some pairs to read, ``scores.png`` and
``data.png`` the curves. The pages can be made again at any time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastpo.atomic_write import write_atomically

from .conversation import prompt_text, read_prompt
from .manifest import SUFFIX, load_manifest
from .rows import draw_rows, read_rows
from .text_measures import length_stats, prompt_diversity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAIRS_SHOWN = 3
SHOWN_CHARACTERS = 400  # of each text of a pair
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEW_VALUES = (
    10  # different scores, up to which quantiles would jump and the mean's standard error is drawn
)
# Counts of what happened to rows that stay, in words; all others are reasons why rows are left out.
NOTES = {
    "response_chosen": "won by the model",
    "prompt_shortened": "prompts shortened",
    "unparsable_verdicts": "verdicts that could not be read",
    "no_verdict": "rows without a verdict",
}
RETRIED = "retried_"  # begins the names of counts of requests that were made again
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
        "searched": bool(settings.get("search")),
        "once": _stages([root / "seeds", root / "synpo"]),
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
            if scores:
                entry["score"] = _distribution(scores)
        for name in ("previous", "first"):
            scored = folder / f"versus-{name}-scored.jsonl"
            win_rate = None if load_manifest(scored) is None else _win_rate(scored)
            if win_rate is not None:
                entry[f"win_rate_{name}"] = win_rate
        if k == 1 and "win_rate_previous" in entry:
            entry["win_rate_first"] = entry["win_rate_previous"]
        yield entry


def _iterations(root: Path) -> Iterator[dict[str, Any]]:
    """Of every iteration: counts through the filters, scores of the pairs, prompts, seconds."""
    for k, folder in _numbered(root):
        if load_manifest(folder / "pairs.jsonl") is None:
            continue
        entry: dict[str, Any] = {
            "iteration": k,
            **_stages([folder, *folder.glob("search-*")], folder),
        }
        pairs = folder / "pairs.jsonl"
        winners, gaps = [], []
        for _, row in read_rows(pairs):
            winners.append(row["chosen_source"] != "completion")
            if row["chosen_score"] is not None and row["rejected_score"] is not None:
                gaps.append(row["chosen_score"] - row["rejected_score"])
        if winners:
            entry["generated_winners"] = statistics.fmean(winners)
        if gaps:
            entry["gap"] = _distribution(gaps)
        prompts = folder / "prompts.jsonl"
        source = prompts if prompts.is_file() else root / "seeds/train.jsonl"
        texts = (prompt_text(read_prompt(row, where)) for where, row in read_rows(source))
        entry["prompt_similarity"] = prompt_diversity(texts)
        entry["chosen_length"] = length_stats(_answers(pairs, "chosen"))
        entry["rejected_length"] = length_stats(_answers(pairs, "rejected"))
        yield entry


def _stages(folders: Iterable[Path], root: Path | None = None) -> dict[str, Any]:
    """Counts and seconds of all stages in some folders, by name, in the order in which they were finished.

    Trainings stand among them as ``training of DIRECTORY``. Names are relative to ``root``, else to the folder.
    """
    found = []
    for folder in folders:
        for file in folder.glob(f"*{SUFFIX}"):
            manifest = load_manifest(file.with_name(file.name.removesuffix(SUFFIX)))
            assert manifest is not None
            name = file.relative_to(root or folder.parent).as_posix().removesuffix(SUFFIX)
            training = not name.endswith(".jsonl")
            name = f"training of {name}" if training else name.removesuffix(".jsonl")
            # Stages that end in the same second are told apart by their files.
            finished = json.loads(file.read_text(encoding="utf-8")).get("finished", "")
            found.append(((finished, file.stat().st_mtime_ns, name), manifest))
    found.sort(key=lambda entry: entry[0])
    return {
        "counts": {name: manifest.counts for (*_, name), manifest in found if manifest.counts},
        "seconds": {name: manifest.seconds for (*_, name), manifest in found},
    }


def _answers(pairs: Path, name: str) -> Iterator[str]:
    for _, row in read_rows(pairs):
        value = row[name]
        yield value if isinstance(value, str) else value[-1]["content"]


def _lengths(responses: Path) -> dict[str, Any]:
    return length_stats(row["responses"][0] for _, row in read_rows(responses))


def _distribution(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    quantiles = {f"{q:g}": ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES}
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {
        "count": len(values),
        "different": len(set(values)),
        "mean": statistics.fmean(values),
        "standard_error": error,
        "quantiles": quantiles,
    }


def _win_rate(scored: Path) -> dict[str, Any] | None:
    """Of the first responses against the second ones; a tie is half a win. And their mean lead in the score.

    None where no row has scores.
    """
    wins = ties = count = 0
    gap = 0.0
    for _, row in read_rows(scored):
        ours, theirs = row["scores"]
        wins += ours > theirs
        ties += ours == theirs
        gap += ours - theirs
        count += 1
    if not count:
        return None
    return {
        "prompts": count,
        "wins": wins,
        "ties": ties,
        "losses": count - wins - ties,
        "rate": (wins + ties / 2) / count,
        "mean_gap": gap / count,
    }


def _values(evaluation: list[dict[str, Any]]) -> dict[int, float]:
    """By iteration the mean score, or of a scorer that only compares, the mean lead over the start."""
    scores = {e["iteration"]: e["score"]["mean"] for e in evaluation if "score" in e}
    leads = {
        e["iteration"]: e["win_rate_first"]["mean_gap"] for e in evaluation if "win_rate_first" in e
    }
    return scores or (leads and {0: 0.0, **leads})


def _best(evaluation: list[dict[str, Any]]) -> int | None:
    """The iteration with the best value on the held-out prompts, the earlier of equal ones; 0: no
    iteration beats the start; None: nothing to compare.
    """
    values = _values(evaluation)
    return max(values, key=lambda k: (values[k], -k)) if len(values) > 1 else None


# ---- Page ----


def _page(document: dict[str, Any], plots: list[str], root: Path) -> str:
    parts = [f"# {document['method']} from {document['start']}"]
    best = document["best_iteration"]
    if best is not None:
        name = _value_name(document["evaluation"])
        parts.append(
            f"Best {name} on the held-out prompts: iteration {best}."
            if best
            else f"By {name} on the held-out prompts no iteration beats the start."
        )
    if document["searched"]:
        parts.append(
            "Each iteration's model is the best of a search, chosen on the same held-out prompts as are shown "
            "here: its scores and win rates are biased upward. Judge it on other prompts."
        )
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    if document["evaluation"]:
        parts += ["## Held-out prompts", _evaluation_table(document["evaluation"])]
        if any("win_rate_previous" in entry for entry in document["evaluation"]):
            parts.append("A percentage counts wins, and half of the ties, among all prompts.")
    if document["iterations"]:
        parts += ["## What was made", _counts_table(document)]
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
    """``63.7 % (143 wins, 366 ties, 3 losses)``."""
    if win_rate is None:
        return ""
    counted = ", ".join(f"{win_rate[name]} {name}" for name in ("wins", "ties", "losses"))
    return f"{100 * win_rate['rate']:.1f} % ({counted})"


def _counts_table(document: dict[str, Any]) -> str:
    rows = []
    for entry in (document["once"], *document["iterations"]):
        for stage, seconds in entry["seconds"].items():
            counts = entry["counts"].get(stage, {})
            reasons = [
                f"{name} {n}"
                for name, n in counts.items()
                if n and name not in ("in", "out", *NOTES) and not name.startswith(RETRIED)
            ]
            notes = [
                f"{n} {NOTES.get(name, name)}"
                for name, n in counts.items()
                if n and (name in NOTES or name.startswith(RETRIED))
            ]
            rows.append(
                [
                    str(entry.get("iteration", "–")), stage, str(counts.get("in", "")),
                    str(counts.get("out", "")), ", ".join(reasons), ", ".join(notes), f"{seconds:.1f}",
                ]
            )  # fmt: skip
    head = ["iteration", "stage", "rows in", "rows out", "left out", "notes", "seconds"]
    return _table(head, rows)


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
    shown, bands = _bands([entry["score"] for entry in evaluation if "score" in entry])
    for low, high, alpha in bands:
        left.fill_between(steps, low, high, color=_BLUE, alpha=alpha, lw=0)
    _widen(left)
    left.set_title(shown, loc="left", fontsize=9)
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


def _bands(
    scores: list[dict[str, Any]],
) -> tuple[str, list[tuple[list[float], list[float], float]]]:
    """What the panel of scores shows, and its bands: lower and upper ends by iteration, opacity."""
    if not scores:
        return "Lead over the start, held out: mean", []
    if max(score["different"] for score in scores) <= FEW_VALUES:
        low = [score["mean"] - score["standard_error"] for score in scores]
        high = [score["mean"] + score["standard_error"] for score in scores]
        return "Score, held out: mean ± standard error", [(low, high, 0.2)]
    quantiles = [score["quantiles"] for score in scores]
    bands = [
        ([q[low] for q in quantiles], [q[high] for q in quantiles], alpha)
        for low, high, alpha in (("0.05", "0.95", 0.12), ("0.25", "0.75", 0.2))
    ]
    return "Score, held out: mean, middle 50 and 90 %", bands


def _widen(axes: Axes) -> None:
    """Give values that hardly differ an axis on which they look alike: a tenth of their size, at least 0.1."""
    low, high = axes.get_ylim()
    least = max(0.1, 0.1 * max(abs(low), abs(high)))
    if high - low < least:
        middle = (low + high) / 2
        axes.set_ylim(middle - least / 2, middle + least / 2)


def _plot_data(document: dict[str, Any], path: Path) -> bool:
    """Pairs, lengths and prompt similarity by iteration; False where there is nothing."""
    iterations = document["iterations"]
    if not iterations:
        return False
    figure, (pairs, lengths, similarity) = _figure(3)
    steps = [entry["iteration"] for entry in iterations]
    pairs.bar(steps, [entry["counts"]["pairs"]["out"] for entry in iterations], 0.6, color=_BLUE)
    pairs.set_xlim(min(steps) - 1, max(steps) + 1)  # a single bar does not fill the panel
    pairs.set_title("Pairs kept", loc="left", fontsize=9)
    longest = 0.0
    # Lengths that agree leave both to be seen: a large open square around a small dot.
    for name, color, style, size in (("rejected", _ORANGE, "s--", 7), ("chosen", _BLUE, "o-", 4)):
        words = [entry[f"{name}_length"]["words"]["mean"] for entry in iterations]
        lengths.plot(
            steps, words, style, color=color, markersize=size, fillstyle="none" if size > 4 else "full",
            label=name,
        )  # fmt: skip
        longest = max(longest, *words)
    lengths.set_ylim(0, 1.15 * longest or 1)
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
