"""What ``fastpo bench`` measures: sets of cases, the most important first.

Shapes on CUDA are those of Llama 3 (H 4096, V 128256), Qwen3 (4096 or 1024, 151936), Gemma 2 (2304, 256000) and
Mistral (4096, 32000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

SPARSE_PAIR = ("fastpo-certified", "fastpo-exact", "eager")


@dataclass(frozen=True)
class Case:
    """One workload, on which all rivals that can run are compared in time, memory and accuracy."""

    group: str  # what it is for, a heading of the report
    n: int  # tokens
    width: int  # H
    vocab: int  # V
    entropy: float | None  # mean, of the lm workload, nats; None: flat
    dtype: str = "float32"
    ignored: float = 0.0  # share of tokens without a label
    head_noise: float = 1.0  # of the lm workload's additional columns, σ
    length: int = 512  # tokens of an answer
    loss: str | None = None  # a whole preference loss instead of token log-probs
    frozen_head: bool = False
    accuracy: bool = True  # compare with float64
    rounds: int = 5  # of timing
    share: float = 1.0  # of the whole run's time that it may take
    rivals: tuple[str, ...] = ()  # only these; empty: all

    @property
    def workload(self) -> str:
        """Name of the workload."""
        return "flat" if self.entropy is None else f"lm-{self.entropy:g}"

    @property
    def name(self) -> str:
        """Unique within a set."""
        parts = [
            *dict.fromkeys([self.group, self.workload, self.dtype]),
            f"N{self.n}",
            f"H{self.width}",
            f"V{self.vocab}",
        ]
        if self.ignored:
            parts.append(f"{self.ignored:.0%} ignored")
        if self.head_noise != 1:
            parts.append(f"head noise {self.head_noise:g}")
        if self.loss:
            parts.append(self.loss)
        if self.frozen_head:
            parts.append("frozen head")
        return " ".join(parts)


def case_set(name: str, device: str) -> Sequence[Case]:
    """The cases of a set, the most important first.

    Raises:
        ValueError: an unknown set, or the set "gpu" on a CPU.
    """
    if name == "gpu" and device != "cuda":
        raise ValueError(f"--set: got 'gpu' on a device of type {device!r}, expected a CUDA device")
    if name not in SETS:
        raise ValueError(f"--set: got {name!r}, expected one of {', '.join(SETS)}")
    return SETS[name]


_CPU_MAIN = Case("main", 2048, 1024, 32_000, 1.6, rounds=7, share=0.75)
_CPU_SMALL = Case("accuracy", 256, 512, 32_000, 1.6, length=128, share=0.2)
# PyTorch's own bfloat16 products are 50 times slower than float32 on processors without such instructions.
_CPU_BFLOAT16 = replace(
    _CPU_SMALL, n=128, length=64, dtype="bfloat16",
    rivals=("fastpo-certified", "fastpo-exact", "eager", "trl"),
)  # fmt: skip
_CPU_SIZE = Case("size", 512, 320, 16_000, 1.6, length=256, accuracy=False, share=0.2)

CPU: tuple[Case, ...] = (
    _CPU_MAIN,
    Case("flat", 1024, 1024, 32_000, None, share=0.2, rivals=SPARSE_PAIR),
    Case("epilogue", 2048, 512, 32_000, 1.6, length=4, loss="simpo", share=0.2),
    *(
        replace(case, entropy=entropy)
        for case in (_CPU_SMALL, _CPU_BFLOAT16)
        for entropy in (1.6, 0.9, 2.5)
    ),
    *(replace(_CPU_SIZE, n=n) for n in (512, 1024, 2048, 4096)),
    Case("loss", 1024, 512, 32_000, 1.6, length=256, loss="simpo", share=0.2),
    *(
        Case("ignored", 1024, 320, 32_000, 1.6, ignored=ignored, accuracy=False, share=0.2)
        for ignored in (0.7, 0.5)
    ),
)

_GPU_MAIN = Case("main", 16_384, 4096, 128_256, 1.6, "bfloat16", length=4096, share=0.3)
_GPU_SIZE = replace(_GPU_MAIN, group="size", accuracy=False, share=0.15)
_LONG = ("fastpo-certified", "fastpo-low-memory", "fastpo-exact", "trl", "liger-ce-sm90")

GPU: tuple[Case, ...] = (
    _GPU_MAIN,
    replace(_GPU_MAIN, vocab=151_936),
    replace(_GPU_MAIN, group="flat", entropy=None, rivals=SPARSE_PAIR),
    replace(_GPU_SIZE, n=32_768),
    replace(_GPU_SIZE, n=262_144, rivals=_LONG),
    replace(_GPU_SIZE, n=262_144, rivals=_LONG[:3], frozen_head=True),
    replace(_GPU_MAIN, group="loss", loss="dpo"),
    replace(_GPU_MAIN, group="loss", loss="simpo", n=8192),
    Case("epilogue", 32_768, 4096, 128_256, 1.6, "bfloat16", length=64, loss="simpo", rounds=9),
    *(replace(_GPU_MAIN, group="accuracy", entropy=entropy) for entropy in (0.9, 2.5)),
    *(replace(_GPU_MAIN, group="ignored", ignored=ignored) for ignored in (0.7, 0.5)),
    *(replace(_GPU_SIZE, n=n, length=2048) for n in (4096, 65_536)),
    replace(_GPU_SIZE, n=131_072, rivals=_LONG),
    *(
        replace(_GPU_MAIN, group="models", width=width, vocab=vocab)
        for width, vocab in ((1024, 151_936), (2304, 256_000), (4096, 32_000))
    ),
    replace(_GPU_MAIN, group="head noise", head_noise=0.3),
    replace(_GPU_MAIN, group="float32", dtype="float32", n=8192),
)

QUICK: tuple[Case, ...] = (
    Case("main", 512, 512, 8000, 1.6, length=64),
    Case("flat", 512, 512, 8000, None, length=64, rivals=SPARSE_PAIR),
    Case("epilogue", 512, 512, 8000, 1.6, length=1, loss="simpo"),
)

SETS: dict[str, tuple[Case, ...]] = {"cpu": CPU, "gpu": GPU, "quick": QUICK}
