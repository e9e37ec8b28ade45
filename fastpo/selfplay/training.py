"""Training as a stage of a loop: a checkpoint directory with a manifest, continued after a kill.

Training runs in ``model.partial/``, from the newest complete checkpoint there if there is one, and the
directory becomes ``model/`` when it is done, without its checkpoints; an adapter is merged into its base first.
While anything trains there ``model.lock`` is held, also by a launched command that outlived the process that
started it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import yaml

from fastpo.atomic_write import remove_leftovers, write_atomically
from fastpo.plain_values import is_credential, plain
from fastpo.trainer import PreferenceConfig, SFTConfig, fine_tune, train
from fastpo.trainer.checkpoint import checkpoints, incompleteness, model_files

from .journal import lock, partial_of, refuse_other
from .manifest import Identity, Manifest, load_manifest, manifest_path, model_revision, sha256
from .settings import unknown_field

IDENTITY_FILE = "stage_identity.json"
# What the stage itself says.
TAKEN = ("model_name_or_path", "dataset", "output_dir", "resume_from_checkpoint", "seed")

_JOBS: dict[str, tuple[type[Any], Any, str]] = {
    "train": (PreferenceConfig, train, "train"),
    "sft": (SFTConfig, fine_tune, "sft"),
}


def typed_settings(kind: str, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """``settings`` with numbers where a field holds one: YAML reads 1e-6 as text.

    Raises:
        TypeError: text that is no number.
    """
    hints = typing.get_type_hints(_JOBS[kind][0])
    made = dict(settings or {})
    for name, value in made.items():
        choices = typing.get_args(hints.get(name)) or (hints.get(name),)
        if isinstance(value, str) and float in choices and str not in choices:
            try:
                made[name] = float(value)
            except ValueError as error:
                raise TypeError(f"{name}: got {value!r}, expected a number") from error
    return made


def check_training_settings(kind: str, settings: Mapping[str, Any] | None, name: str) -> None:
    """Raise ValueError or TypeError where ``settings`` cannot be those of a training stage of that kind."""
    taken = sorted(set(settings or ()) & set(TAKEN))
    if taken:
        raise ValueError(f"{name}.{taken[0]}: the loop sets it; expected other fields")
    config_class, _, command = _JOBS[kind]
    fields = [f.name for f in dataclasses.fields(config_class) if f.init]
    for field in settings or ():
        if field not in fields:
            raise ValueError(f"{name}: {unknown_field(field, fields, f'fastpo {command} --help')}")
        if is_credential(field):
            raise ValueError(
                f"{name}.{field}: a credential, which would not reach a launched command: settings go there "
                "through a file; expected it in the environment variable HF_TOKEN"
            )
    try:
        config_class(
            **typed_settings(kind, settings),
            model_name_or_path="model",
            dataset="rows",
            output_dir="out",
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def train_stage(
    kind: str,
    settings: Mapping[str, Any],
    *,
    start: str,
    dataset: Path,
    output: Path,
    seed: int,
    launcher: str | None = None,
) -> Manifest:
    """Train from ``start`` on ``dataset`` into the directory ``output``, or find it done.

    Args:
        kind: ``train`` (preference pairs) or ``sft`` (examples).
        settings: fields of ``PreferenceConfig`` or ``SFTConfig``.
        start: checkpoint directory or Hub name.
        dataset: pairs or examples.
        output: the checkpoint directory to be made.
        seed: of the run.
        launcher: a command that starts Python on several devices, e.g. ``accelerate launch --num_processes 8``;
            None: in this process.

    Raises:
        ChildProcessError: the launched command failed; its last words are above.
        FloatingPointError: training stopped at a loss that is not finite.
        ValueError: another directory is in the way; a process, or a command that one launched, is still at work
            on it; or what the trainers raise.
    """
    settings = typed_settings(kind, settings)
    identity = Identity(
        kind,
        {"dataset": sha256(dataset)},
        {**plain(settings), "start": model_revision(start), "seed": seed},
    ).to_dict()
    inputs = {"dataset": dataset}
    found = _finished(output, identity, inputs)
    if found is not None:
        print(f"{output}: up to date", flush=True)
        return found
    began = time.monotonic()
    partial = partial_of(output)
    held = lock(output.with_name(output.name + ".lock"), output)
    try:
        remove_leftovers(manifest_path(output))
        partial.mkdir(exist_ok=True)
        _claim(partial, identity, inputs)
        job = {
            **settings,
            "model_name_or_path": start,
            "dataset": str(dataset),
            "output_dir": str(partial),
            "resume_from_checkpoint": "auto",
            "seed": seed,
        }
        print(f"{output}: training from {start}", flush=True)
        if launcher is None:
            _run_here(kind, job)
        else:
            _launch(launcher, kind, job, partial, held)
        if settings.get("peft") is not None:
            _merge_adapter(partial, start, settings)
        for checkpoint in checkpoints(partial):
            shutil.rmtree(checkpoint)
        os.replace(partial, output)
        return _save_manifest(output, identity, dataset, time.monotonic() - began)
    finally:
        Path(held.name).unlink(missing_ok=True)
        held.close()


def _finished(
    output: Path, identity: dict[str, Any], inputs: Mapping[str, Path]
) -> Manifest | None:
    remedy = f"another directory (or delete it and {manifest_path(output).name} to train it again)"
    manifest = load_manifest(output)
    if manifest is not None:
        refuse_other(output, manifest.identity, identity, inputs, remedy)
        if not output.is_dir() or model_revision(str(output))["sha256"] != manifest.output_sha256:
            raise ValueError(
                f"output: {output} was changed since it was trained; delete it and {manifest_path(output)} to "
                "train it again"
            )
        return manifest
    if output.exists():  # killed between the last two steps, or somebody else's
        file = output / IDENTITY_FILE
        if not file.is_file():
            raise ValueError(
                f"output: {output} exists, and no loop made it; expected a new directory"
            )
        before = json.loads(file.read_text(encoding="utf-8"))
        refuse_other(output, before, identity, inputs, remedy)
        return _save_manifest(output, identity, None, 0.0)
    return None


def _save_manifest(
    output: Path, identity: dict[str, Any], dataset: Path | None, seconds: float
) -> Manifest:
    paths = {} if dataset is None else {"dataset": str(dataset)}
    revision = model_revision(str(output))["sha256"]
    manifest = Manifest(identity, {}, revision, round(seconds, 3), paths)
    manifest.save(output)
    return manifest


def _claim(partial: Path, identity: dict[str, Any], inputs: Mapping[str, Path]) -> None:
    """Make ``partial`` ready: refuse another run's that has trained, drop a final save that was cut short."""
    file = partial / IDENTITY_FILE
    remove_leftovers(file)
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else identity
    if checkpoints(partial) or model_files(partial):
        remedy = f"another directory (or delete the directory {partial} to begin anew)"
        refuse_other(partial, before, identity, inputs, remedy)
    if before != identity or not file.is_file():
        write_atomically(file, json.dumps(identity).encode())
    if model_files(partial) and all(incompleteness(c) for c in checkpoints(partial)):
        for path in partial.iterdir():
            if path.name != IDENTITY_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run_here(kind: str, job: dict[str, Any]) -> None:
    config_class, function, _ = _JOBS[kind]
    trainer = function(config_class(**job))
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _launch(launcher: str, kind: str, job: dict[str, Any], partial: Path, held: IO[str]) -> None:
    """Train by a command that starts Python on several devices.

    The lock goes to it as its standard input, the one file that launchers hand on to what they start: should
    this process be killed, the output stays locked until the last of them has ended. Read, it is empty.
    """
    file = partial / "job.yaml"
    file.write_text(
        yaml.safe_dump(plain(job), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    words = [sys.executable if word == "python" else word for word in shlex.split(launcher)]
    command = [*words, "-m", "fastpo.cli", _JOBS[kind][2], "--config", str(file)]
    status = subprocess.run(command, check=False, stdin=held).returncode
    if status:
        raise ChildProcessError(f"launcher: {shlex.join(command)} ended with status {status}")


def _merge_adapter(partial: Path, start: str, settings: Mapping[str, Any]) -> None:
    """Replace the adapter that was trained by the whole model, which the next stage can load anywhere."""
    from peft import PeftModel

    from fastpo.trainer.model import load_causal_lm

    arguments = {
        "dtype": settings.get("dtype", "float32"),
        "trust_remote_code": settings.get("trust_remote_code", False),
    }
    base = load_causal_lm(start, "model_name_or_path", arguments)
    merged = PeftModel.from_pretrained(base, str(partial)).merge_and_unload()
    for file in partial.glob("adapter_*"):
        file.unlink()
    merged.save_pretrained(partial)
