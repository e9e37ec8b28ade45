"""A run within its budget, the JSON it leaves, and the report that is made from that alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpo.benchmarks import bench, gpu_pass
from fastpo.benchmarks.cases import GPU, Case
from fastpo.benchmarks.report import read, report

CPU_DEVICE = torch.device("cpu")
TINY = Case("main", 64, 16, 97, None, length=8, rounds=1, rivals=("eager", "trl", "quack"))


class Clock:
    """A hundred seconds pass with every case that is measured."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        real = bench.measure

        def measure(*args, **kwargs):
            self.now += 100
            return real(*args, **kwargs, **{"expired": lambda: False})

        monkeypatch.setattr(
            bench, "measure", lambda *args, expired, **kwargs: measure(*args, **kwargs)
        )

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """A tiny language model's states and head, for the lm workload."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "states.safetensors"
    save_file(
        {
            "hidden": torch.randn(100, 16, generator=generator),
            "weight": torch.randn(100, 16, generator=generator),
        },
        path,
    )
    return path


def run_tiny(cases, out: Path, budget: bench.Budget) -> dict:
    document = bench.new_document("quick", CPU_DEVICE, minutes=1)
    bench.run_cases(cases, document, out, budget, device=CPU_DEVICE)
    return document


def test_the_budget_is_kept_and_the_rest_is_named(tmp_path, monkeypatch, capsys) -> None:
    cases = [replace(TINY, group=group) for group in ("main", "flat", "size", "loss")]
    budget = bench.Budget(150 / 60, Clock(monkeypatch))
    document = run_tiny(cases, tmp_path / "a.json", budget)
    assert [record["name"] for record in document["cases"]] == [case.name for case in cases[:2]]
    assert [record["seconds"] for record in document["cases"]] == [100, 100]
    assert document["left_out"] == [case.name for case in cases[2:]]
    bench.print_remainder(document)
    told = capsys.readouterr().out
    assert f"left out, as the time was up: {cases[2].name}; {cases[3].name}" in told
    assert "without quack: needs a CUDA device\n" in told
    assert "without GPU figures" in told


def test_the_file_is_whole_after_every_case(tmp_path, monkeypatch) -> None:
    out = tmp_path / "new/a.json"
    seen = []
    real = bench.measure

    def measure(case, *args, **kwargs):
        seen.append(len(read(out)["cases"]) if out.exists() else 0)
        if case.group == "flat":
            raise RuntimeError("the case is broken")
        return real(case, *args, **kwargs)

    monkeypatch.setattr(bench, "measure", measure)
    cases = [replace(TINY, group=group) for group in ("main", "flat", "size")]
    document = run_tiny(cases, out, bench.Budget(1))
    assert seen == [0, 1, 2]
    assert document["cases"][1]["error"] == "RuntimeError: the case is broken"
    assert read(out) == json.loads(json.dumps(document))
    assert list(out.parent.iterdir()) == [out]


def test_the_report_is_made_from_the_file_alone(tmp_path) -> None:
    cases = [TINY, *(replace(TINY, group="size", n=n) for n in (32, 128))]
    cases.append(replace(TINY, group="epilogue", loss="simpo", length=4))
    out = tmp_path / "cpu.json"
    document = run_tiny(cases, out, bench.Budget(5))
    document["left_out"].append("loss of another day")
    document["checks"] = [{"name": "one", "ok": True}, {"name": "two", "ok": False}]
    bench.write(document, out)
    page = report([out])
    assert page == tmp_path / "cpu/report.md"
    text = page.read_text(encoding="utf-8")
    for heading in ("### Main", "### Size", "### Epilogue", "### Settings", "### Missing"):
        assert heading in text
    assert "| eager | " in text
    eager = document["cases"][0]["results"][0]
    assert eager["rival"] == "eager"
    assert f"| {eager['errors']['hidden_grad']:.1e} |" in text
    assert "- `quack`: needs a CUDA device\n" in text
    assert "- loss of another day: left out" in text
    assert "1 of 2 checks passed; failed: two." in text
    for name in ("cpu-size.png", "cpu-accuracy.png"):
        assert f"({name})" in text
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    # Once more from the same file, elsewhere: the same page.
    again = report([out], tmp_path / "elsewhere")
    assert again.read_text(encoding="utf-8") == text


def test_files_that_are_no_results(tmp_path) -> None:
    for content, told in (
        ("{", "is not JSON"),
        ("[]", "no result"),
        ('{"cases": []}', "no result"),
    ):
        file = tmp_path / "x.json"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=told):
            report([file])
    with pytest.raises(FileNotFoundError, match="--report: no file"):
        report([tmp_path / "none.json"])
    with pytest.raises(ValueError, match="expected different names"):
        report([tmp_path / "a/x.json", tmp_path / "b/x.json"])


def test_dry_run_of_the_gpu_pass(tmp_path, states, capsys) -> None:
    """Every check and case of the GPU pass, on tiny shapes, and the report of it."""
    argv = ["--device", "cpu", "--states", str(states), "--out", str(tmp_path)]
    assert gpu_pass.main([*argv, "--skip", "cce-compiled", "liger-loss-compiled"]) == 0
    (file,) = tmp_path.glob("gpu-pass-*.json")
    document = read(file)
    assert len(document["checks"]) >= 10
    assert all(check["ok"] for check in document["checks"])
    assert (
        sum(check["name"].startswith("noisy_linear_logprobs") for check in document["checks"]) == 8
    )
    timed = document["noise_cost"]["seconds"]
    assert {"noisy forward", "noisy exact", "noisy certified", "draw"} < set(timed)
    assert all(len(seconds) == 5 for seconds in timed.values())
    assert len(document["cases"]) == len(GPU)
    assert document["left_out"] == []
    for record in document["cases"]:
        assert "error" not in record
        status = {r["rival"]: r["status"] for r in record.get("results", [])}
        assert "failed" not in status.values(), status
        if record["case"]["group"] == "epilogue":
            assert len(record["step_seconds"]) == 1
        else:
            assert status["fastpo-certified"] == status["fastpo-exact"] == "measured"
            assert len(record["results"][0]["step_seconds"]) == 1
    assert report([file]).is_file()
    assert "failed:" not in capsys.readouterr().out


def test_a_failed_check_fails_the_gpu_pass(tmp_path, states, monkeypatch, capsys) -> None:
    def crash() -> dict:
        raise RuntimeError("illegal memory access")

    broken = [("good", lambda: {"ok": True}), ("bad", lambda: {"ok": False}), ("crash", crash)]
    monkeypatch.setattr(gpu_pass, "checks", lambda device: iter(broken))
    monkeypatch.setattr(gpu_pass, "GPU", ())
    argv = ["--device", "cpu", "--states", str(states), "--out", str(tmp_path)]
    assert gpu_pass.main(argv) == 1
    told = capsys.readouterr().out
    assert "failed: bad" in told
    assert "failed: crash" in told
    assert "failed: good" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_gpu_pass_says_so(capsys) -> None:
    assert gpu_pass.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
