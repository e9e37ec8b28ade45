"""The cases of test_preference_epilogue.py under TRITON_INTERPRET=1, set before Triton is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fastpo.kernels import margins_triton, preference_epilogue_triton
from fastpo.kernels.preference_epilogue_torch import pair_loss


def main(folder: Path) -> None:
    job = torch.load(folder / "job.pt")
    results = {
        "epilogues": [
            tuple(
                preference_epilogue_triton.preference_epilogue(
                    tokens, labels, pair_loss(name, **options), **arguments
                )
            )
            for tokens, labels, name, options, arguments in job["epilogues"]
        ],
        "margins": [margins_triton.exact_margins(*case) for case in job["margins"]],
        "tickets": [int(ticket) for ticket in preference_epilogue_triton._tickets.values()],
    }
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
