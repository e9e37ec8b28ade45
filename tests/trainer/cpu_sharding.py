"""Lets accelerate and DeepSpeed shard over gloo processes of this machine."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy


def allow_sharding_on_cpu() -> None:
    """Of a process without a GPU accelerate believes that only DDP runs there.

    Runs with ``use_cpu`` are as ever.
    """

    def set_device(self: Any) -> None:
        if self.device is None:
            self.device = torch.device("cpu")

    def prepare_backend(self: Any, cpu: bool = False, *others: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU

    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # no memory is pinned without a GPU
    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device


def keep_deepspeed_to_gloo() -> None:
    """Without DeepSpeed's own collective operations, which only a CPU has; they are compiled when first used.

    A lock in the user's cache guards that; when the process that compiles is killed it stays, and every later
    process waits for it without end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
