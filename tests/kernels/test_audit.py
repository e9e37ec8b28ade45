"""The compile audit: what it finds on kernels with known faults, and that the shipped kernels have none.

The tables go to artefacts/kernel_audit/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpo.kernels import (
    audit,
    certified_backward_audit,
    certified_forward_audit,
    certified_noisy_audit,
    linear_logprobs_audit,
    linear_logprobs_backward_triton,
    linear_logprobs_forward_triton,
    noisy_linear_logprobs_audit,
    tile_configs,
)
from fastpo.kernels.audit import CHIPS, AuditCase, Report

ARTEFACTS = Path(__file__).parents[2] / "artefacts" / "kernel_audit"
PARTS = (
    "torch.float32",
    "torch.bfloat16",
    "torch.float16",
    "solve_margins",
    "epilogue",
    "philox",
)  # of the full audit
pytestmark = pytest.mark.skipif(tile_configs.INTERPRETED, reason="compiles kernels")


@triton.jit
def _product_kernel(
    a, b, c, K, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    rows, cols, depth = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, DEPTH):
        a_tile = tl.load(a + rows[:, None] * K + start + depth[None, :])
        b_tile = tl.load(b + cols[None, :] * K + start + depth[:, None])
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    tl.store(c + rows[:, None] * COLS + cols[None, :], acc)


@triton.jit
def _bulk_product_kernel(
    a, b, c, K, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, K, DEPTH):
        acc = tl.dot(a.load([0, start]), b.load([0, start]).T, acc, input_precision=PRECISION)
    tl.store(c + rows[:, None] * COLS + cols[None, :], acc)


@triton.jit
def _copy_kernel(a, c, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(c + i, tl.load(a + i, mask=i < n), mask=i < n)


def product_report(
    chip: str,
    dtype: torch.dtype,
    tile: tuple[int, int, int],
    warps: int = 4,
    stages: int = 2,
    precision: str = "tf32x3",
    bulk: bool
    | None = None,  # how operands are loaded; None: through pointers, and nothing else is demanded
) -> Report:
    operand, out = torch.zeros(256, 256, dtype=dtype), torch.zeros(256, 256)
    operands = [operand, operand]
    if bulk:
        operands = [TensorDescriptor.from_tensor(operand, [side, tile[2]]) for side in tile[:2]]

    def launch() -> None:
        (_bulk_product_kernel if bulk else _product_kernel)[(1,)](
            *operands,
            out,
            256,
            *tile,
            PRECISION=precision,
            num_warps=warps,
            num_stages=stages,
        )

    (found,) = audit.record(chip, [AuditCase("product", True, launch, bulk is not None)])
    return audit.inspect(found)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_good_product_passes(chip: str, dtype: torch.dtype) -> None:
    report = product_report(chip, dtype, (64, 64, 32))
    assert report.problems() == []
    assert report.dots == 1
    assert report.registers > 32
    assert report.shared_bytes >= (64 + 64) * 32 * dtype.itemsize


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"tile": (64, 128, 32), "precision": "tf32"}, "1 float32 products in plain tf32"),
        ({"tile": (32, 32, 32), "precision": "ieee"}, "no instruction matches"),
        ({"tile": (128, 64, 32)}, "spills"),
        ({"tile": (128, 128, 64), "stages": 4}, "bytes of shared memory, limit 101376"),
    ],
    ids=["tf32", "no tensor cores", "spill", "shared memory"],
)
def test_fault_is_found(arguments: dict, problem: str) -> None:
    report = product_report("sm_80", torch.float32, **arguments)
    assert any(problem in found for found in report.problems()), report


@pytest.mark.parametrize("chip", CHIPS)
def test_products_without_bulk_copies_are_found_where_these_are_demanded(chip: str) -> None:
    bulk = product_report(chip, torch.bfloat16, (64, 64, 32), bulk=True)
    pointers = product_report(chip, torch.bfloat16, (64, 64, 32), bulk=False)
    assert bulk.problems() == []
    if chip == "sm_80":  # which has none: Triton loads through pointers there
        assert bulk.bulk_copies == 0
        assert pointers.problems() == []
    else:
        assert bulk.bulk_copies >= 2
        (problem,) = pointers.problems()
        assert "UTMALDG" in problem


def test_dense_kernels_that_give_up_bulk_copies_are_found(monkeypatch) -> None:
    modules = (linear_logprobs_forward_triton, linear_logprobs_backward_triton)
    cases = [
        case
        for case in linear_logprobs_audit.audit_cases()
        if case.name.startswith("linear_logprobs torch.bfloat16 aligned n ≤ V")
        and "+" not in case.name
    ]
    assert len(cases) == 1
    for module in modules:
        monkeypatch.setattr(module, "bulk_copies", lambda *_: False)
    launches = [launch for launch in audit.record("sm_90", cases) if "merge" not in launch.kernel]
    assert len({launch.kernel for launch in launches}) == 3
    for launch in launches:
        assert any("UTMALDG" in problem for problem in audit.inspect(launch).problems())


def test_specialisation_is_what_triton_would_choose() -> None:
    """Aligned pointers, multiples of 16 and the integer 1 make kernels of their own, other integers do not."""

    def copy(offset: int, n: int) -> Callable[[], object]:
        x, y = torch.zeros(40)[offset:], torch.zeros(40)
        return lambda: _copy_kernel[(1,)](x, y, n, SIZE=32)

    def count(*calls: tuple[int, int]) -> int:
        return len(audit.record("sm_90", [AuditCase("copy", True, copy(*call)) for call in calls]))

    assert count((0, 32), (0, 16)) == 1
    assert count((0, 17), (0, 19)) == 1
    assert count((0, 32), (1, 32), (0, 17), (0, 1)) == 4
    (launch,) = audit.record("sm_90", [AuditCase("copy", True, copy(0, 17))])
    assert dict(launch.signature) == {"a": "*fp32", "c": "*fp32", "n": "i32", "SIZE": "constexpr"}


def test_recording_launches_nothing_and_leaves_triton_as_it_was() -> None:
    driver = triton.runtime.driver._active
    calls, cpu = [], torch.device("cpu")
    audit.record("sm_90", [AuditCase("none", True, lambda: calls.append(tile_configs.target(cpu)))])
    assert calls == [tile_configs.Target("sm_90", 132)]
    assert triton.runtime.driver._active is driver
    assert triton.knobs.runtime.jit_cache_hook is None
    assert tile_configs.unsupported(cpu) is not None


def test_every_row_of_the_tile_table_is_audited() -> None:
    flags_of = {
        linear_logprobs_audit: 5,
        certified_forward_audit: 5,
        certified_backward_audit: 4,
        noisy_linear_logprobs_audit: 2,
        certified_noisy_audit: 2,
    }
    cases = [
        case
        for module, flags in flags_of.items()
        for case in module.audit_cases()
        if case.name.count("+") in (0, flags) and "n > V" not in case.name
    ]
    assert len(cases) == 3 * 3 * 3 * 2 + 3 * 8 * 2 + 1 + 3 * 8 * 2 * 2
    kind_of = {
        "_matmul_kernel": "matmul",
        "_codes_kernel": "certified",
        "_dz_pieces_kernel": "pieces",
        "_products_kernel": "products",
        "_noisy_partials_kernel": "noisy",
        "_noisy_gradients_kernel": "noisy",
        "_noisy_codes_kernel": "noisy codes",
        "_noisy_pieces_kernel": "noisy pieces",
    }
    for chip in CHIPS:
        audited = set()
        for launch in audit.record(chip, cases):
            names = [name for name, _ in launch.signature]
            constants = {names[path[0]]: value for path, value in launch.constants}
            if "DEPTH" in constants:
                kind = kind_of.get(launch.kernel.rpartition(".")[2], "logits")
                half = "fp32" not in dict(launch.signature)["b" if kind == "matmul" else "hidden"]
                options = dict(launch.options)
                tile = tile_configs.TileConfig(
                    *(constants[name] for name in ("ROWS", "COLS", "DEPTH")),
                    options["num_warps"],
                    options["num_stages"],
                )
                audited.add((kind, half, tile))
        for (use, table_chip, family), tile in tile_configs._TABLE.items():
            if table_chip == chip:
                for kind in kinds_of(use, chip, family):
                    assert (kind, family == "half", tile) in audited, (use, chip, family)


def kinds_of(use: str, chip: str, family: str) -> list[str]:
    """The kinds of kernels that get an entry of the tile table."""
    kinds = {
        "logits": ["logits"],
        "logits softcap": ["logits"],
        "matmul": ["matmul", "products"],
        "certified": ["certified"],
        "pieces": ["pieces"],
        "pieces softcap": ["pieces"],
        "noisy": ["noisy"],
        "noisy certified": ["noisy codes"],
        "noisy pieces": ["noisy pieces"],
    }
    if use not in ("unaligned", "noisy unaligned"):
        return kinds[use.removesuffix(" unaligned")]
    return [
        kind
        for name, several in kinds.items()
        if name.startswith("noisy") == use.startswith("noisy")
        and (f"{name} unaligned", chip, family) not in tile_configs._TABLE
        for kind in several
    ]


def check(name: str, reports: list[Report]) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / f"{name}.md").write_text(audit.table(reports), encoding="utf-8")
    assert reports
    bad = [report for report in reports if report.problems()]
    assert not bad, "\n" + audit.table(bad)


@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_with_all_flags_on_and_off(chip: str) -> None:
    reports = audit.audit([chip], gate_only=True)
    check(f"gate_{chip}", reports)
    kernels = {report.launch.kernel.rpartition(".")[2] for report in reports}
    assert {"_partials_kernel", "_merge_kernel", "_dlogits_kernel", "_matmul_kernel"} <= kernels
    assert {"_codes_kernel", "_rows_kernel", "_nuclei_kernel"} <= kernels
    assert {"_dz_pieces_kernel", "_products_kernel"} <= kernels
    assert {"_noisy_partials_kernel", "_noisy_gradients_kernel", "_parts_kernel"} <= kernels
    assert {"_noisy_codes_kernel", "_clean_kernel", "_noisy_pieces_kernel"} <= kernels


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("match", PARTS)
def test_every_configuration(chip: str, match: str) -> None:
    check(f"full_{chip}_{match}", audit.audit([chip], match))


@pytest.mark.slow
def test_full_audit_leaves_no_case_out() -> None:
    for module in audit.modules():
        for case in module.audit_cases():
            assert sum(match in case.name for match in PARTS) == 1, case.name
