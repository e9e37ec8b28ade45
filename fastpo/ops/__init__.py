"""The differentiable operations: everything above this package is ordinary PyTorch on their results."""
