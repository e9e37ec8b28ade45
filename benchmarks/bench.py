"""``fastpo bench``: measure a set of cases within a time budget, print the tables, write the JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastpo

from . import tables
from .cases import Case, case_set
from .loss_rivals import loss_rivals
from .measure import LEFT_OUT, measure
from .rivals import token_rivals
from .timing import reason

FORMAT = "fastpo bench 1"
PACKAGES = (
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "transformers",
    "numpy",
)


class Budget:
    """Minutes that a run may take, and the parts of it."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.total = 60 * minutes
        self.end = clock() + self.total

    def spent(self) -> bool:
        """Whether the time is up."""
        return self.clock() >= self.end

    def part(self, share: float) -> Callable[[], bool]:
        """Whether ``share`` of the whole time has passed from now on, or all of it."""
        end = min(self.end, self.clock() + share * self.total)
        return lambda: self.clock() >= end


def run(
    name: str | None,
    out: Path,
    *,
    minutes: float = 10.0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    states: Path | None = None,
    rounds: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure a set, print its tables as they are done, and write ``out`` after each case.

    Args:
        name: of the set; None: ``gpu`` with a CUDA device, else ``cpu``.
        out: the JSON file.
        minutes: after which nothing more is started; what was left out is told.
        only, skip: names of rivals that alone take part, or do not.
        states: safetensors file of the lm workload; None: the project's own model, trained once and cached.
        rounds: of timing, instead of each case's own.
        clock: seconds.

    Returns:
        What was written.

    Raises:
        ValueError: an unknown set or rival, minutes or rounds out of range.
        FileNotFoundError: no such states file.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes: got {minutes}, expected a number > 0")
    if rounds is not None and rounds < 1:
        raise ValueError(f"--rounds: got {rounds}, expected an integer ≥ 1")
    if states is not None and not states.is_file():
        raise FileNotFoundError(f"--states: no file {str(states)!r}")
    chosen = choice(only, skip)
    name = name or ("gpu" if torch.cuda.is_available() else "cpu")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    cases = case_set(name, device.type)
    document = new_document(name, device, minutes=minutes, only=only, skip=skip, rounds=rounds)
    print(title(document["environment"]))
    if any(case.entropy is not None for case in cases):
        document["states"] = describe_states(states)
    budget = Budget(minutes, clock)
    run_cases(
        cases, document, out, budget, device=device, chosen=chosen, states=states, rounds=rounds
    )
    print_remainder(document)
    print(f"written to {out}")
    return document


def choice(only: Sequence[str], skip: Sequence[str]) -> Callable[[str], bool]:
    """Which rivals take part.

    Raises:
        ValueError: an unknown name.
    """
    known = list(dict.fromkeys(r.name for r in [*token_rivals(), *loss_rivals()]))
    for option, names in (("--only", only), ("--skip", skip)):
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: got {name!r}, expected some of {', '.join(known)}")
    return lambda name: name not in skip and (not only or name in only)


def describe_states(states: Path | None) -> dict[str, Any]:
    """Whose states the lm workload has; the project's own are made, if not cached, before the clock runs."""
    try:
        path = own_states() if states is None else states
    except Exception as error:  # the cases that need them tell it again; the others can be measured
        return {"own": True, "error": reason(error)}
    return {"own": states is None, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def own_states() -> Path:
    """The file of the project's own states."""
    from .lm_states import states_file

    print("states of the lm workload: cached, or trained now, once, in a few minutes", flush=True)
    return states_file(seed=0)


def new_document(name: str, device: torch.device, **arguments: object) -> dict[str, Any]:
    """The JSON of a run before its first case."""
    return {
        "format": FORMAT,
        "set": name,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": arguments,
        "environment": environment(device),
        "cases": [],
        "left_out": [],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device."""
    found: dict[str, Any] = {
        "fastpo": fastpo.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def title(environment: dict[str, Any]) -> str:
    """Device and versions in one line."""
    where = environment.get("gpu") or f"{environment['cpu']}, {environment['threads']} threads"
    packages = [f"{k} {v}" for k, v in environment["packages"].items() if v and k != "numpy"]
    return f"{where}; fastpo {environment['fastpo']}, {', '.join(packages)}"


def run_cases(
    cases: Sequence[Case],
    document: dict[str, Any],
    out: Path,
    budget: Budget,
    *,
    device: torch.device,
    chosen: Callable[[str], bool] = lambda name: True,
    states: Path | None = None,
    rounds: int | None = None,
) -> None:
    """Measure ``cases`` into ``document``, which is written and printed as it grows."""
    for case in cases:
        if budget.spent():
            document["left_out"].append(case.name)
            continue
        if rounds is not None:
            case = replace(case, rounds=rounds)
        start = budget.clock()
        try:
            record = measure(
                case,
                chosen,
                device=device,
                states=states,
                expired=budget.part(case.share),
                say=lambda line: print(line, flush=True),
            )
            print(f"\n{tables.heading(record)}\n{tables.text(tables.table(record))}\n", flush=True)
        except Exception as error:  # one case must not cost the others their run
            record = {"name": case.name, "case": asdict(case), "error": reason(error)}
            print(f"{case.name} failed: {record['error']}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record["seconds"] = budget.clock() - start
        document["cases"].append(record)
        write(document, out)
    write(document, out)


def print_remainder(document: dict[str, Any]) -> None:
    """Who is missing, and what the time was not enough for."""
    absent: dict[str, dict[str, None]] = {}
    for record in document["cases"]:
        for rival, why in tables.missing(record).items():
            where = f" ({record['name']})" if why == LEFT_OUT else ""
            absent.setdefault(why + where, {})[rival] = None
    for why, rivals in absent.items():
        print(f"without {', '.join(rivals)}: {why}")
    if document["environment"]["device"] == "cpu":
        print("without GPU figures: no CUDA device took part")
    if document["left_out"]:
        print(f"left out, as the time was up: {'; '.join(document['left_out'])}")


def write(document: dict[str, Any], out: Path) -> None:
    """Write the JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, out)
