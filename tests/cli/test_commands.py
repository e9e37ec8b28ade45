"""The command's frame, `fastpo plot`, `fastpo doctor` and `fastpo demo`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.cli import doctor, main

ROOT = Path(__file__).parents[2]


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from fastpo.cli import main\n"
        "commands = ('demo', 'doctor', 'bench', 'plot')\n"
        "for argv in (['--help'], ['--version'], *([name, '--help'] for name in commands)):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert f"fastpo {fastpo.__version__}" in lines
    for command in ("train", "demo", "plot", "bench", "doctor"):
        assert any(line.split()[:1] == [command] for line in lines)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["plot"],
        ["plot", "a", "b"],
        ["doctor", "--fast"],
        ["demo", "--out"],
        ["bench", "x"],
    ],
)
def test_a_wrong_command_exits_with_status_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "usage: fastpo" in capsys.readouterr().err


def test_plot_draws_a_run(tmp_path: Path, capsys) -> None:
    history = [
        {"step": s, "loss": 1 / s, "rewards/chosen": s, "rewards/rejected": -s} for s in (1, 2, 3)
    ]
    state = json.dumps({"log_history": history})
    (tmp_path / "trainer_state.json").write_text(state, encoding="utf-8")
    assert main(["plot", str(tmp_path)]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "training.png"
    assert written.read_bytes().startswith(b"\x89PNG")


def test_plot_of_what_is_no_run(tmp_path: Path, capsys) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        assert main(["plot", str(directory)]) == 2
        assert str(directory) in capsys.readouterr().err


def test_doctor_reports_and_checks(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"fastpo {fastpo.__version__}" in out
    assert f"  {'torch':<14} {torch.__version__}" in out.splitlines()
    for package in doctor.OPTIONAL:
        assert any(line.split()[:1] == [package] for line in out.splitlines())
    checks = [line for line in out.splitlines() if "nats, gradients" in line]
    assert len(checks) >= 2
    assert all(" ok " in line for line in checks)


@pytest.mark.parametrize("fault", ["values", "gradients", "nan", "crash"])
def test_doctor_finds_a_wrong_backend(fault: str, monkeypatch, capsys) -> None:
    right = fastpo.linear_logprobs

    def wrong(hidden, weight, labels, **options):
        if fault == "crash":
            raise RuntimeError("no kernel image")
        logps = right(hidden, weight, labels, **options)
        if fault == "values":
            return logps + 1e-3
        if fault == "nan":
            return logps * float("nan")
        return (
            logps.detach() + 1.001 * (logps - logps.detach())
            if hidden.dtype == torch.float32
            else logps
        )

    monkeypatch.setattr(fastpo, "linear_logprobs", wrong)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert ("FAILED: RuntimeError: no kernel image" if fault == "crash" else "WRONG") in out


def test_doctor_survives_a_package_that_cannot_be_imported(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"numpy": "no_such_module", "no-such-package": "x"})
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cannot be imported: ModuleNotFoundError" in out
    assert "no-such-package not installed" in " ".join(out.split())


def test_demo_prepare_feeds_train(tmp_path: Path, capsys) -> None:
    start = tmp_path / "start"
    assert main(["demo", "--prepare", str(start), "--scale", "0.01", "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    pairs = (start / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"{len(pairs)} preference pairs" in out
    argv = ["train", "--model_name_or_path", str(start / "model")]
    argv += ["--dataset", str(start / "train.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--max_length", "64", "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert (tmp_path / "run/model.safetensors").is_file()


def test_demo_refuses_what_it_cannot_do(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    for argv, message in (
        (["--output-dir", str(tmp_path)], "is not empty"),
        (["--prepare", str(tmp_path)], "is not empty"),
        (["--output-dir", str(tmp_path / "new"), "--scale", "0"], "scale: got 0"),
        (["--output-dir", str(tmp_path / "two"), "--seeds", "1", "1"], "seeds: got [1, 1]"),
        (["--prepare", str(tmp_path / "new"), "--output-dir", "x"], "--prepare"),
        (["--prepare", str(tmp_path / "new"), "--seeds", "1", "2"], "--prepare"),
    ):
        assert main(["demo", *argv]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"
