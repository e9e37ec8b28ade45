"""What fastpo adds to a checkpoint directory, and which directories may be resumed from.

``fastpo_state.safetensors`` holds the state of the loss (γ-queue, β-DPO's averages, their random generators),
``fastpo_state.json`` everything else and the first file's hash. Both are written under a temporary name and
then renamed. The JSON file comes last, after the model, the optimiser and the random states: a checkpoint that
lacks it was not finished. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from transformers.utils import logging

from fastpo.atomic_write import write_atomically as write_atomically

STATE_FILE = "fastpo_state.json"
TENSOR_FILE = "fastpo_state.safetensors"
TRAINER_STATE_FILE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")

logger = logging.get_logger(__name__)


@dataclass
class RunState:
    """State of a run beside transformers' own.

    Attributes:
        settings: the loss's settings, which a resumed run must share.
        num_tokens: input tokens trained on so far, over all ranks.
        window: sums of the metrics since the last log line.
        tensors: the loss module's ``state_dict``.
        devices: fields of :class:`fastpo.trainer.devices.Devices`; empty in checkpoints of older versions.
    """

    settings: dict[str, Any]
    num_tokens: int = 0
    window: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)


def save_run_state(directory: Path, state: RunState) -> None:
    """Write ``state`` into a checkpoint directory."""
    data = save({name: tensor.contiguous() for name, tensor in state.tensors.items()})
    write_atomically(directory / TENSOR_FILE, data)
    values = {k: v for k, v in asdict(state).items() if k != "tensors"}
    values["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    write_atomically(directory / STATE_FILE, json.dumps(values, indent=1).encode())


def load_run_state(directory: Path) -> RunState:
    """Read what :func:`save_run_state` wrote.

    Raises:
        ValueError: the directory is no checkpoint, or not a complete one.
    """
    problem = incompleteness(directory)
    if problem:
        raise ValueError(f"resume_from_checkpoint: cannot resume from {directory}: {problem}")
    values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    data = (directory / TENSOR_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != values.pop("tensors_sha256"):
        raise ValueError(
            f"resume_from_checkpoint: {directory / TENSOR_FILE} is damaged: its content is not what was saved"
        )
    return RunState(**values, tensors=load(data))


def incompleteness(directory: Path) -> str | None:
    """Why training cannot resume from ``directory``; None if it can."""
    if not directory.is_dir():
        return "it is not a directory"
    if not (directory / TRAINER_STATE_FILE).is_file():
        return f"it holds no {TRAINER_STATE_FILE}, so it is not a checkpoint of a training run"
    for name in (STATE_FILE, TENSOR_FILE):
        if not (directory / name).is_file():
            return (
                f"it holds no {name}: it was saved with save_only_model, by another trainer, "
                "or the process died while saving it"
            )
    for name in (TRAINER_STATE_FILE, STATE_FILE):
        try:
            json.loads((directory / name).read_text(encoding="utf-8"))
        except ValueError:
            return f"its {name} is damaged"
    return None


def died_while_saving(directory: Path) -> bool:
    """Whether an incomplete checkpoint is a save cut short, rather than one without fastpo's state."""
    try:
        json.loads((directory / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # transformers writes this file last
    return False


def find_resume_point(output_dir: Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to resume from, None for a fresh start in ``output_dir``.

    Args:
        output_dir: where the run writes.
        resume: a checkpoint directory; True: the newest one in ``output_dir``; ``"auto"``: the newest complete
            one, a fresh start if there is none; None or False: a fresh start.

    Raises:
        ValueError: ``output_dir`` holds a run that would be mixed with this one, or there is nothing to resume.
    """
    resume = {"true": True, "false": False}.get(str(resume).lower(), resume)
    present = checkpoints(output_dir)
    if not resume:
        held = [p.name for p in present] or model_files(output_dir)
        if held:
            raise ValueError(
                f"output_dir: {output_dir} already holds a run ({held[-1]}). Resume it with "
                "resume_from_checkpoint=auto, or choose another output_dir"
            )
        return None
    if resume not in (True, "auto"):
        chosen = Path(str(resume))
        problem = incompleteness(chosen)
        if problem:
            raise ValueError(f"resume_from_checkpoint: cannot resume from {chosen}: {problem}")
        if chosen.resolve().parent == output_dir.resolve():
            later = [p.name for p in present if step_of(p) > step_of(chosen)]
            if later:
                raise ValueError(
                    f"resume_from_checkpoint: {output_dir} holds later checkpoints than {chosen.name} "
                    f"({', '.join(later)}); delete them first, or choose another output_dir"
                )
        elif present:
            raise ValueError(
                f"output_dir: {output_dir} already holds another run ({present[-1].name}); to resume from "
                f"{chosen} choose another output_dir"
            )
        return chosen
    for checkpoint in reversed(present):
        problem = incompleteness(checkpoint)
        if problem is None:
            return checkpoint
        if resume is True or not died_while_saving(checkpoint):
            raise ValueError(f"resume_from_checkpoint: cannot resume from {checkpoint}: {problem}")
        logger.warning(f"{checkpoint} is passed over: {problem}")
    if resume == "auto" and not model_files(output_dir):
        return None
    raise ValueError(f"resume_from_checkpoint: {output_dir} holds no checkpoint to resume from")


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint directories, oldest step first."""
    found = output_dir.glob("checkpoint-*") if output_dir.is_dir() else ()
    return sorted((p for p in found if p.is_dir() and _CHECKPOINT.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimiser steps done at a checkpoint, −1 for a directory with another name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def model_files(directory: Path) -> list[str]:
    """Names of the weight files that ``from_pretrained`` would read."""
    return sorted(p.name for pattern in _WEIGHTS for p in directory.glob(pattern))
