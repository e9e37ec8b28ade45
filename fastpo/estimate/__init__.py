"""How much memory a training run needs per device, from its settings and a ``config.json`` alone.

A step of the run is made with tensors that have shapes and no numbers (PyTorch's fake tensors), and every
allocation is written into a ledger: what holds for one architecture holds for all of them.
"""

from .config import SHARDINGS, EstimateConfig
from .estimate import Estimate, estimate
from .report import print_estimate

__all__ = ["SHARDINGS", "Estimate", "EstimateConfig", "estimate", "print_estimate"]
