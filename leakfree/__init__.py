"""leakfree: measure, remove and compare the leakage of batch statistics in PyTorch models."""

__version__ = "0.1.0"

__all__ = ["__version__"]
