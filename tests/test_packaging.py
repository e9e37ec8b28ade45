"""The package as users get it: bare checkout, editable, installed, wheel; lazy imports; one version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastpo

ROOT = Path(__file__).resolve().parents[1]
PROBE = (
    "import fastpo, fastpo.kernels.chunking as c, torch; "
    "y = fastpo.linear_logprobs(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, -100])); "
    "assert abs(float(y[0]) + 1.3862944) < 1e-6, y; import fastpo.benchmarks.memory; print(c.__file__)"
)


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Output of ``code`` in a fresh interpreter that finds fastpo at ``path`` alone, if given."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def checkout(target: Path) -> Path:
    """The files that git tracks (or would track), links kept as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def pip_install(target: Path, *what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--target", str(target), *what],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_bare_checkout_from_its_root_and_from_elsewhere(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree")
    assert (tree / "fastpo/kernels").is_symlink()
    assert not (tree / "kernels/__init__.py").exists()
    for cwd in (tree, tmp_path):
        assert Path(python(PROBE, cwd=cwd, path=tree)).resolve() == tree / "kernels/chunking.py"


def test_wheel_holds_one_copy_of_kernels_and_benchmarks_and_works(tmp_path: Path) -> None:
    tree = checkout(tmp_path / "tree")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(tree)],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("fastpo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("kernels", "benchmarks"):
        held = {n for n in names if folder in n}
        assert held == {f"fastpo/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
    assert "fastpo/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "kernels/", "recipes/"))]
    site = tmp_path / "site"
    pip_install(site, str(wheel))
    for cwd in (
        tree,
        tmp_path,
    ):  # from the root, the checkout must not shadow or break the installed one
        where = python(
            PROBE if cwd == tmp_path else f"import sys; sys.path.remove(''); {PROBE}",
            cwd=cwd,
            path=site,
        )
        assert Path(where).is_relative_to(site)


def test_non_editable_install(tmp_path: Path) -> None:
    tree, site = checkout(tmp_path / "tree"), tmp_path / "site"
    pip_install(site, str(tree))
    assert Path(python(PROBE, cwd=tmp_path, path=site)).is_relative_to(site)


def test_editable_install(tmp_path: Path) -> None:
    """In a virtual environment of its own that sees this one's packages, as ``pip install -e .`` leaves it."""
    tree, venv = checkout(tmp_path / "tree"), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    ours = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    # Plain path entries: .pth files of the outer environment, such as its own editable fastpo, do not run.
    (site / "outer.pth").write_text(f"{ours}\n")
    done = subprocess.run(
        [str(venv / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "-e", str(tree)],
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for cwd in (tree, tmp_path):
        shown = subprocess.run(
            [str(venv / "bin/python"), "-c", PROBE], cwd=cwd, text=True, capture_output=True
        )
        assert shown.returncode == 0, shown.stderr
        assert Path(shown.stdout.strip()).resolve() == tree / "kernels/chunking.py"


def test_transformers_imports_from_the_repository_root(tmp_path: Path) -> None:
    """``kernels/`` is no package of its own: transformers, which looks for one of that name, is not misled."""
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM; "
        "from transformers.utils import is_kernels_available; "
        "import importlib.util; real = importlib.util.find_spec('kernels'); "
        "print(is_kernels_available(), real is None or real.origin)"
    )
    assert python(code, cwd=ROOT).split()[0] == "False"


def test_import_is_light(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import fastpo; fastpo.linear_logprobs; fastpo.__version__; "
        "bad = {'datasets', 'matplotlib', 'transformers', 'accelerate'} & set(sys.modules); "
        "assert not bad, bad; print('light')"
    )
    assert python(code, cwd=tmp_path, path=ROOT) == "light"


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in fastpo.__all__:
        assert getattr(fastpo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastpo.nothing  # noqa: B018


def test_one_version() -> None:
    version = fastpo.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == version
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_kernels_import_nothing_from_fastpo() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) fastpo", source, re.M), path.name
