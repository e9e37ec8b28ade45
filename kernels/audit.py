"""Ahead-of-time audit of the Triton kernels: what a GPU would be given, compiled and inspected without one.

The modules of ``MODULES`` list cases in ``audit_cases()``: each calls a real launcher with small CPU tensors.
While ``record`` runs them, Triton's own launch path decides argument types and specialisation for the chip in
question and a hook takes the decision down in place of compiling. ``inspect`` then compiles it for the chip and
reads registers, stack, shared memory and instructions off the binary with the ``cuobjdump`` that Triton ships.

    python -m fastpo.kernels.audit [--out FILE.md] [--chip sm_90] [--match TEXT] [--gate] [--jobs N]

Exit status 1 if any kernel spills, does not fit, lacks tensor-core instructions, rounds float32 to tf32, or
multiplies matrices without the copy engine (TMA) where a case demands it.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from .tile_configs import CHIPS, INTERPRETED, pretend

# Each has ``audit_cases() -> Iterator[AuditCase]``.
MODULES = (
    "linear_logprobs_audit",
    "certified_forward_audit",
    "certified_backward_audit",
    "certified_noisy_audit",
    "noisy_linear_logprobs_audit",
    "preference_epilogue_audit",
)
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of Triton's, those that launchers set
# Dynamic shared memory that one block may have, bytes. sm_80's tiles also serve sm_86, sm_89 and sm_120, which
# have the least.
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns, sm_100
# What a matrix product must be made of, as SASS instructions.
TENSOR_CORE = {"sm_80": r"\bHMMA", "sm_90": r"\bHGMMA", "sm_100": r"\bUTC\w*MMA"}
BULK_COPY = r"\bUTMALDG"  # TMA: a bulk tensor copy into shared memory
BULK_COPY_CHIPS = ("sm_90", "sm_100")


class AuditCase(NamedTuple):
    """One way to call a launcher."""

    name: str
    gate: bool  # part of every test run, not only of the full audit
    launch: Callable[[], object]  # with CPU tensors; no kernel runs
    bulk: bool = False  # its products must fetch their operands by bulk copies, where there are any


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would specialise and compile it for one chip."""

    chip: str
    kernel: str
    function: Any = field(compare=False, repr=False)  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: str  # JSON, as a dict cannot be hashed
    options: tuple[tuple[str, int], ...]
    bulk: bool  # bulk copies are demanded

    @property
    def description(self) -> str:
        """Pointer types, constants and options in one line."""
        names = [name for name, _ in self.signature]
        types = dict.fromkeys(
            kind for _, kind in self.signature if kind.startswith(("*", "tensordesc"))
        )
        constants = [
            f"{names[path[0]]}={int(value) if isinstance(value, bool) else value}"
            for path, value in self.constants
            if value is not None and names[path[0]].isupper()
        ]
        aligned = sum(bool(kinds) for _, kinds in json.loads(self.attributes))
        options = [f"{k}={v}" for k, v in self.options]
        return " ".join([*types, *constants, *options, f"{aligned} args divisible by 16"])


@dataclass(frozen=True)
class Report:
    """What the compiled kernel needs."""

    launch: Launch
    cases: tuple[str, ...]
    registers: int
    stack_bytes: int
    local_instructions: int  # loads and stores of local memory: spills
    shared_bytes: int
    tensor_memory_columns: int
    dots: int  # matrix products in the source
    tensor_core_instructions: int
    bulk_copies: int  # instructions
    tf32_dots: int  # float32 products that would be rounded to tf32

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty if it may."""
        chip, found = self.launch.chip, []
        if self.stack_bytes or self.local_instructions:
            found.append(
                f"spills: {self.stack_bytes} bytes of stack, {self.local_instructions} local loads and stores"
            )
        if self.shared_bytes > SHARED_LIMIT[chip]:
            found.append(f"{self.shared_bytes} bytes of shared memory, limit {SHARED_LIMIT[chip]}")
        if self.tensor_memory_columns > TENSOR_MEMORY_LIMIT:
            found.append(f"{self.tensor_memory_columns} columns of tensor memory")
        if self.dots and not self.tensor_core_instructions:
            found.append(f"no instruction matches {TENSOR_CORE[chip]}")
        if self.dots and self.launch.bulk and not self.bulk_copies:
            found.append(f"no instruction matches {BULK_COPY}")
        if self.tf32_dots:
            found.append(f"{self.tf32_dots} float32 products in plain tf32")
        return found


def modules() -> list[ModuleType]:
    """The kernel modules under audit."""
    return [importlib.import_module(f".{name}", __package__) for name in MODULES]


def record(
    chip: str, cases: Iterable[AuditCase], known: dict[Launch, list[str]] | None = None
) -> dict[Launch, list[str]]:
    """Every kernel that ``cases`` would launch on ``chip``, and the names of the cases that do."""
    launches = {} if known is None else known
    for case in cases:
        with pretend(chip), _recording(chip, case, launches):
            case.launch()
    return launches


@contextmanager
def _recording(chip: str, case: AuditCase, launches: dict[Launch, list[str]]) -> Iterator[None]:
    if INTERPRETED:
        raise RuntimeError("the audit compiles kernels: start it without TRITON_INTERPRET=1")

    def take_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        launch = Launch(
            chip=chip,
            kernel=fn.name,
            function=fn.jit_function,
            signature=tuple(compile["signature"].items()),
            constants=tuple(compile["constants"].items()),
            attributes=json.dumps([[list(k), v] for k, v in compile["configs"][0].items()]),
            options=tuple((key, options[key]) for key in OPTIONS if options[key] is not None),
            bulk=case.bulk and chip in BULK_COPY_CHIPS,
        )
        names = launches.setdefault(launch, [])
        if case.name not in names:
            names.append(case.name)
        return True  # do not compile, do not launch

    runtime, hook = triton.knobs.runtime, triton.knobs.runtime.jit_cache_hook
    config = triton.runtime.driver
    active = config._active
    try:
        config.set_active(_Driver(_target(chip)))
        runtime.jit_cache_hook = take_down
        yield
    finally:
        runtime.jit_cache_hook = hook
        config._active = active


@dataclass(frozen=True)
class _Driver:
    """As much of a Triton driver as deciding on a specialisation takes."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"audit {self.target.arch}"  # a key of Triton's per-device caches that no device has

    def get_current_stream(self, device: object) -> int:
        return 0


def _target(chip: str) -> GPUTarget:
    return GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)


def build(launch: Launch) -> Any:
    """The compiled kernel, as Triton has it; its cache is used."""
    attributes = {tuple(path): value for path, value in json.loads(launch.attributes)}
    source = triton.compiler.ASTSource(
        launch.function, dict(launch.signature), dict(launch.constants), attributes
    )
    return triton.compile(source, target=_target(launch.chip), options=dict(launch.options))


def inspect(launch: Launch, cases: Iterable[str] = ()) -> Report:
    """Compile and read the binary."""
    kernel = build(launch)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", binary)
        code = _cuobjdump("-sass", binary)
    products = re.findall(r"= tt\.dot .*", kernel.asm["ttir"])
    return Report(
        launch=launch,
        cases=tuple(cases),
        registers=_usage(usage, "REG"),
        stack_bytes=_usage(usage, "STACK") + _usage(usage, "LOCAL"),
        local_instructions=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=getattr(kernel.metadata, "tmem_size", 0) or 0,
        dots=len(products),
        tensor_core_instructions=len(re.findall(TENSOR_CORE[launch.chip], code)),
        bulk_copies=len(re.findall(BULK_COPY, code)),
        tf32_dots=sum(_rounds_to_tf32(product) for product in products),
    )


def _rounds_to_tf32(product: str) -> bool:
    """Whether a ``tt.dot`` line multiplies float32 other than as tf32x3 or ieee; the IR prints no default."""
    precision = re.search(r"inputPrecision = (\w+)", product)
    exact = precision is not None and precision[1] in ("tf32x3", "ieee")
    return not exact and re.search(r"tensor<\d+x\d+xf32[^>]*> \*", product) is not None


def _cuobjdump(flag: str, binary: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run(
        [tool, flag, str(binary)], check=True, capture_output=True, text=True
    ).stdout


def _usage(text: str, key: str) -> int:
    return int(re.search(rf"\b{key}:(\d+)", text)[1])  # type: ignore[index]


def audit(
    chips: Iterable[str], match: str = "", gate_only: bool = False, jobs: int = 1
) -> list[Report]:
    """Reports on every kernel that the cases whose name holds ``match`` launch on ``chips``."""
    cases = [
        case
        for module in modules()
        for case in module.audit_cases()
        if match in case.name and (case.gate or not gate_only)
    ]
    launches: dict[Launch, list[str]] = {}
    for chip in chips:
        record(chip, cases, launches)
    with ThreadPoolExecutor(jobs) as pool:  # Triton and ptxas release the interpreter lock
        return list(pool.map(inspect, launches.keys(), launches.values()))


def table(reports: Iterable[Report]) -> str:
    """The reports as a Markdown table, worst register use first within kernel and chip."""
    lines = [
        "| kernel | chip | registers | stack | local ld/st | shared bytes | tensor memory | tensor-core instr. "
        "| bulk copies | configuration | problems |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(reports, key=lambda r: (r.launch.kernel, r.launch.chip, -r.registers)):
        cells = (
            r.launch.kernel.rpartition(".")[2], r.launch.chip, r.registers, r.stack_bytes, r.local_instructions,
            r.shared_bytes, r.tensor_memory_columns, r.tensor_core_instructions if r.dots else "–",
            r.bulk_copies if r.dots else "–", r.launch.description, "; ".join(r.problems()) or "none",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def flag_combinations(*names: str) -> Iterator[tuple[bool, dict[str, bool]]]:
    """(whether for the gate, flags): every combination of boolean flags; all off and all on are the gate's."""
    for values in itertools.product((False, True), repeat=len(names)):
        yield all(values) or not any(values), dict(zip(names, values, strict=True))


def main() -> int:
    """Command line; see the top of this file."""
    parser = argparse.ArgumentParser(description="compile and inspect every Triton kernel")
    parser.add_argument("--out", type=Path, help="write the table here instead of printing it")
    parser.add_argument("--chip", choices=CHIPS, action="append")
    parser.add_argument("--match", default="", help="only cases whose name holds this text")
    parser.add_argument("--gate", action="store_true", help="only the cases of the test gate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    reports = audit(options.chip or CHIPS, options.match, options.gate, options.jobs)
    text = table(reports)
    if options.out is None:
        print(text, end="")
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    bad = [report for report in reports if report.problems()]
    print(f"{len(reports)} kernels compiled, {len(bad)} with problems", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
