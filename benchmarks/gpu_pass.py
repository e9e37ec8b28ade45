"""One pass over a CUDA device: every kernel checked against float64, then the set gpu of ``fastpo bench``, then
what DNPO's noise costs.

    python -m fastpo.benchmarks.gpu_pass [--out benchmarks/results] [--minutes 7]

Most important first, and the JSON is rewritten after every entry, so a run that is cut off leaves what it had;
``fastpo bench --report`` turns it into tables and plots. ``--device cpu`` is a dry run of the same code on tiny
shapes, which measures nothing of interest.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import bench, noise_cost
from .cases import GPU, Case
from .device_checks import Check, checks
from .noise_checks import noise_checks
from .timing import reason

CHECKS_SHARE = 0.35  # of the time, after which checks that are left wait for the measurements


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a check or a case failed; 2 without the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="start nothing more after this long"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--states", type=Path, metavar="FILE", help="as for fastpo bench")
    parser.add_argument("--skip", nargs="+", default=[], metavar="RIVAL")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_pass: no CUDA device", file=sys.stderr)
        return 2
    chosen = bench.choice((), args.skip)
    document = bench.new_document("gpu", device, minutes=args.minutes, skip=args.skip)
    document["checks"] = []
    where = document["environment"].get("gpu", "cpu-dry-run").lower().replace(" ", "-")
    out = args.out / f"gpu-pass-{where}.json"
    print(bench.title(document["environment"]))
    document["states"] = bench.describe_states(args.states)

    budget = bench.Budget(args.minutes)
    waiting = itertools.chain(checks(device), noise_checks(device))
    run_checks(waiting, document, out, budget.part(CHECKS_SHARE))
    bench.run_cases(
        GPU if device.type == "cuda" else [shrink(case) for case in GPU],
        document,
        out,
        budget,
        device=device,
        chosen=chosen,
        states=args.states,
    )
    if not budget.spent():
        document["noise_cost"] = measure_noise(device, args.states)
        bench.write(document, out)
    run_checks(waiting, document, out, budget.spent)
    document["left_out"] += [name for name, _ in waiting]
    bench.write(document, out)

    wrong = [entry["name"] for entry in document["checks"] if not entry["ok"]]
    wrong += [record["name"] for record in document["cases"] if "error" in record]
    wrong += ["noise_cost"] if "error" in document.get("noise_cost", {}) else []
    bench.print_remainder(document)
    print(f"{len(document['checks'])} checks, {len(document['cases'])} cases; written to {out}")
    for name in wrong:
        print(f"failed: {name}")
    return 1 if wrong else 0


def run_checks(
    waiting: Iterator[tuple[str, Check]],
    document: dict[str, Any],
    out: Path,
    expired: Callable[[], bool],
) -> None:
    """Run checks from ``waiting`` until the time is up."""
    while not expired():
        entry = next(waiting, None)
        if entry is None:
            return
        name, check = entry
        try:
            result = check()
        except Exception as error:  # a crash of one must not cost the others their run
            result = {"ok": False, "error": reason(error)}
        document["checks"].append({"name": name, **result})
        bench.write(document, out)
        print(f"{'ok' if result['ok'] else 'WRONG':<6} {name}", flush=True)
        if not result["ok"]:
            print(f"       {result}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure_noise(device: torch.device, states: Path | None) -> dict[str, Any]:
    """``noise_cost`` on a shape of a real model, printed; an error is kept as its reason."""
    shape = (8192, 32_000, 4096) if device.type == "cuda" else (64, 200, 32)
    try:
        found = noise_cost.measure(*shape, 5, device, states)
    except Exception as error:  # it must not cost the checks that are left their run
        print(f"noise_cost: {reason(error)}", flush=True)
        return {"error": reason(error)}
    print(noise_cost.text(found), flush=True)
    return found


def shrink(case: Case) -> Case:
    """The same case on a shape for a dry run."""
    return replace(case, n=64, width=32, vocab=200, length=min(case.length, 32), rounds=1)


if __name__ == "__main__":
    sys.exit(main())
