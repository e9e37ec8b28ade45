"""The README is true: its snippets run, its table lists every loss, its recipe and commands work as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastpo.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_snippets_run(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[index], f"README python {index}", "exec"), {})


def test_commands_run_in_order_on_the_yaml_as_written(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    name = re.match(r"# (\S+\.yaml)\n", recipe)[1]
    (tmp_path / name).write_text(recipe, encoding="utf-8")
    run_lines(blocks("bash")[0], tmp_path)
    assert list((tmp_path / "runs/gamma-simpo").glob("*.png"))
    assert (tmp_path / "runs/gamma-simpo/model.safetensors").is_file()


@pytest.mark.slow
def test_the_loop_runs_as_written(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (_, commands) = blocks("bash")
    run_lines(commands, tmp_path)
    root = tmp_path / "runs/loops/cpu-dnpo"
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    before, after = (entry["score"]["mean"] for entry in report["evaluation"])
    assert after > before
    assert (root / "report.md").is_file()


def run_lines(commands: str, folder: Path) -> None:
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "fastpo"
        done = subprocess.run(
            [sys.executable, "-m", "fastpo.cli", *arguments],
            cwd=folder,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
def test_make_demo(tmp_path: Path) -> None:
    """As a newcomer types it, in a copy of the makefile's directory, with this environment as its ``.venv``."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (Path(sys.prefix) / ".installed").touch()  # nothing to install
    done = subprocess.run(["make", "demo"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "accuracy.png").is_file()
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert [r["seed"] for r in results] == [0, 1]
    for result in results:
        assert set(result["after"]) == {"DPO", "γ-DPO", "SimPO", "γ-SimPO"}
        shown = [f"{100 * share:.1f}" for share in (result["before"], *result["after"].values())]
        (line,) = re.findall(rf"^seed {result['seed']} .*$", done.stdout, re.M)
        assert line.split()[2:] == shown


def test_make_lines_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = blocks("")[0].split("\n")
    assert lines[:2] == ["make demo", "make test"]
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_loss_table_lists_every_loss_and_says_the_truth() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert [name for name, *_ in rows[1:]] == [n for n in LOSSES if n != "sigmoid"]
    for name, _, reference, margin in rows[1:]:
        loss = LOSSES[name]
        assert (reference == "yes") == loss.needs_reference, name
        assert margin == {"target": "target", "deviation": "γᵢ − γ₀", None: ""}[loss.margin], name


def test_linked_pages_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).is_file(), link
