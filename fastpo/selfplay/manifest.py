"""Manifests: what a stage was made of, so that it is done once, and again only where something changed.

``X.jsonl`` has ``X.jsonl.manifest.json`` beside it: the stage, SHA-256 of its inputs, all settings with the
revision of every model, counts of rows, SHA-256 of the output, versions. Two stages are the same if stage,
inputs' contents and settings are; paths and versions may differ.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastpo.atomic_write import write_atomically
from fastpo.plain_values import plain, without_logins
from fastpo.version import __version__

FORMAT = "fastpo stage 1"
SUFFIX = ".manifest.json"
PACKAGES = ("torch", "transformers", "vllm", "openai")
MODEL_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")
RUN_FILES = (
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "data_report.json",
    "fastpo_state.json",
    "training_args.bin",
)


@dataclass(frozen=True)
class Identity:
    """What decides the rows of an output."""

    stage: str
    inputs: Mapping[str, str]  # name → SHA-256 of the file
    settings: Mapping[str, Any]  # plain values

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "inputs": dict(self.inputs),
            "settings": json.loads(without_logins(json.dumps(plain(self.settings)))),
        }


@dataclass(frozen=True)
class Manifest:
    """A finished stage."""

    identity: dict[str, Any]
    counts: dict[str, int]  # rows in and out, and what became of the others; requests made again, …
    output_sha256: str
    seconds: float  # of the process that finished it
    paths: dict[str, str] = field(default_factory=dict)  # of the inputs, as they were given

    def save(self, path: Path) -> None:
        """Write beside the output ``path``."""
        document = {
            "format": FORMAT,
            **self.identity,
            "paths": self.paths,
            "counts": self.counts,
            "output_sha256": self.output_sha256,
            "seconds": self.seconds,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
        }
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        write_atomically(manifest_path(path), text.encode())


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + SUFFIX)


def load_manifest(output: Path) -> Manifest | None:
    """The manifest of an output, None if there is none.

    Raises:
        ValueError: a file of that name that is no manifest.
    """
    path = manifest_path(output)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, expected {FORMAT!r}")
        identity = {name: document[name] for name in ("stage", "inputs", "settings")}
        return Manifest(
            identity,
            document["counts"],
            document["output_sha256"],
            document["seconds"],
            document["paths"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of fastpo: {error}") from error


def differences(
    before: Any, now: Any, name: str = "", files: Mapping[str, Path] | None = None
) -> list[str]:
    """``name: before → now`` of every setting in which two plain values differ.

    Of a SHA-256 only its change is told: ``the content of NAME changed``, with the file of an input.

    Args:
        before, now: plain values.
        name: of both, in the result.
        files: the inputs' paths by name, where the values are the identities of stages.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found = []
        for key in [*before, *(k for k in now if k not in before)]:
            inner = f"{name}.{key}" if name else str(key)
            found += differences(before.get(key), now.get(key), inner, files)
        return found
    if before == now:
        return []
    if _is_hash(before) and _is_hash(now):
        of_input = name.removeprefix("inputs.")
        place = f": {files[of_input]}" if files and of_input in files else ""
        subject = of_input.removeprefix("settings.").removesuffix("sha256").rstrip("._")
        return [f"the content of {subject} changed{place}"]
    return [f"{name}: {_short(before)} → {_short(now)}"]


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


def sha256(path: Path) -> str:
    """Of a file's content."""
    status = path.stat()
    return _sha256(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(text: str | None) -> str | None:
    """Of a text, e.g. a chat template."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def model_revision(name: str) -> dict[str, str]:
    """Which model that is: SHA-256 over the files of a directory, or the commit of a Hub name.

    Raises:
        FileNotFoundError: neither a directory nor a model that the Hub, or its cache, gives.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        digest = hashlib.sha256()
        for file in _model_files(path):
            digest.update(f"{file.relative_to(path)} {sha256(file)}\n".encode())
        return {"sha256": digest.hexdigest()}
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        config = cached_file(name, "config.json")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model: {name!r} is no directory, and the Hub gave no model of that name: {error}"
        ) from error
    return {"name": name, "commit": extract_commit_hash(config, None) or "unknown"}


def _model_files(path: Path) -> list[Path]:
    """Weights, configuration and tokenizer; not what a training run writes about itself."""
    found = {file for pattern in MODEL_FILES for file in path.glob(pattern)}
    return sorted(f for f in found if f.name not in RUN_FILES and not f.name.endswith(SUFFIX))


def versions() -> dict[str, str]:
    """fastpo, Python and the packages that make or score text."""
    found = {"fastpo": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
