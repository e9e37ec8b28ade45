"""``EstimateConfig``: the settings of a training run, and of the devices it is to run on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastpo.trainer import PreferenceConfig

SHARDINGS = ("none", "fsdp", "zero2", "zero3")


@dataclass
class EstimateConfig(PreferenceConfig):
    """Settings of ``fastpo estimate``: those of the training run, and what it is to run on.

    The run is taken to be on CUDA devices unless ``use_cpu`` is set; ``bf16`` unset is then bf16, as such a
    device has it. ``fsdp`` and ``deepspeed`` of the run have no effect here: ``sharding`` says it.

    Raises:
        ValueError: ``devices`` < 1, an unknown ``sharding``, a ``device_memory`` that is not positive, or a
            ``prompt_length`` that leaves no room for an answer.
    """

    devices: int = field(default=1, metadata={"help": "how many devices share the run"})
    sharding: str = field(
        default="none",
        metadata={
            "help": "over the devices: none (each holds all), fsdp, zero2 or zero3 (DeepSpeed's stages)"
        },
    )
    prompt_length: int = field(
        default=1,
        metadata={
            "help": "tokens of each pair's prompt: not scored, and with prefix_sharing there once; 1 needs most"
        },
    )
    device_memory: float | None = field(
        default=None, metadata={"help": "of a device, in GiB; unset: the GPU here, if there is one"}
    )
    json: bool = field(default=False, metadata={"help": "print JSON, numbers in bytes"})

    def __post_init__(self) -> None:
        # The device that the run is for need not be here, and TrainingArguments would look for it.
        bf16 = not self.fp16 and not self.use_cpu if self.bf16 is None else self.bf16
        self.bf16 = False
        self.without_effect = [name for name in ("fsdp", "deepspeed") if getattr(self, name)]
        self.tf32 = self.fsdp = self.fsdp_config = self.deepspeed = None
        super().__post_init__()
        self.bf16 = bf16

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """What mixed precision computes in; None without it."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    @property
    def is_sharded(self) -> bool:
        """Whether devices hold parts of the weights' state."""
        return self.devices > 1 and self.sharding != "none"

    @property
    def packs_rows(self) -> bool:
        """Whether sequences share rows."""
        return self.padding_free or self.prefix_sharing

    @property
    def shards_reference(self) -> bool:
        """Whether a live reference is sharded as the policy's weights are."""
        return self.is_sharded and self.sharding != "zero2"

    def _check(self) -> None:
        super()._check()
        if not (isinstance(self.devices, int) and self.devices >= 1):
            raise ValueError(f"devices: got {self.devices!r}, expected an integer ≥ 1")
        if self.devices % self.sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size: got {self.sequence_parallel_size} with devices {self.devices}, "
                "expected a divisor of them (--devices says how many share the run)"
            )
        if self.sharding not in SHARDINGS:
            raise ValueError(
                f"sharding: got {self.sharding!r}, expected one of {', '.join(SHARDINGS)}"
            )
        if not (isinstance(self.prompt_length, int) and self.prompt_length >= 1):
            raise ValueError(f"prompt_length: got {self.prompt_length!r}, expected an integer ≥ 1")
        if self.max_length and self.prompt_length >= self.max_length:
            raise ValueError(
                f"prompt_length: got {self.prompt_length}, expected less than max_length ({self.max_length})"
            )
        if self.device_memory is not None and not self.device_memory > 0:
            raise ValueError(
                f"device_memory: got {self.device_memory}, expected a number of GiB > 0"
            )
