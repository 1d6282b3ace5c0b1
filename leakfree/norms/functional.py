"""Norms inside of torch.func's transforms (vmap, grad, jvp and what is built of them)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from leakfree.errors import LeakfreeError

__all__ = ["batch_statistics_transformed", "is_transformed"]


def is_transformed() -> bool:
    """Whether a forward runs now inside of a transform of torch.func, eagerly."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@contextmanager
def batch_statistics_transformed(norm: nn.Module) -> Iterator[None]:
    """Turn what a transform says of buffers and kernels in the forward of ``norm`` into one error that names the norm.

    What works passes: a norm in eval mode, and a plain batch norm that keeps no running statistics.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LeakfreeError(
            f"{type(norm).__name__}: torch.func (vmap, grad, jvp) does not go through its batch statistics "
            f"({reason[:200]}); call eval() so that it uses the running ones, take FrozenBN, GN or LN, or use "
            "torch.autograd"
        ) from error
