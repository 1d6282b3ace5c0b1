"""The state of a model: weights taken from a checkpoint, parts frozen, modes and buffers put back as they were.

What every task does to its model, whatever the model is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leakfree.errors import CheckpointError, ConfigError, choices, one_line
from leakfree.keeping import attributes_kept
from leakfree.norms import PartitionedBatchNorm
from leakfree.sealed import read_torch_file

__all__ = [
    "as_in_training",
    "buffers_kept",
    "evaluating",
    "freeze_parts",
    "has_running_statistics",
    "load_buffers",
    "load_weights",
    "modes_kept",
    "random_numbers_kept",
]

_BatchNorm = nn.modules.batchnorm._BatchNorm


# --------------------------------------------------------------------------- modes, buffers, random numbers


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put each module's own train or eval mode back."""
    with attributes_kept(model.modules(), "training"):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Training mode for all but batch norms, which stay in the mode that ``precise_bn`` chose for them."""
    with modes_kept(model):
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                module.training = True
        yield


@torch.no_grad()
def load_buffers(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy ``values`` into the buffers of these names, in place."""
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffers[name].copy_(value)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the values of all buffers (running statistics, counters) back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        load_buffers(model, before)


@contextmanager
def random_numbers_kept(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed torch inside, on the model's device too, and put its random state back."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def has_running_statistics(model: nn.Module) -> bool:
    """Whether the model has statistics that ``precise_bn`` estimates."""
    return any(
        isinstance(module, _BatchNorm) and module.running_mean is not None and not getattr(module, "frozen", False)
        for module in model.modules()
    )


# ------------------------------------------------------------------------------------- weights and parts


def freeze_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Take the submodules ``parts`` out of training: their weights, and the statistics of their batch norms.

    Raises:
        ConfigError: the model has no such part; names ``model.freeze``.
    """
    for path in parts:
        part = _submodule(model, path, "model.freeze")
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        for module in part.modules():
            if isinstance(module, PartitionedBatchNorm):
                module.frozen = True


def _submodule(model: nn.Module, path: str, key: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        valid = [name for name, _ in model.named_modules() if name and name.count(".") < 2]
        raise ConfigError(f"{key}: the model has no part {path!r}; choose from {choices(path, valid)}") from None


def _is_book(name: str) -> bool:
    """Whether a tensor is what some norm keeps for its training only: a counter, MBN's memory, CBN's window."""
    return name.rpartition(".")[2].startswith(("num_batches_tracked", "memory_", "window_"))


def load_weights(model: nn.Module, path: str, parts: Iterable[str] = ()) -> None:
    """Load a checkpoint's weights into ``model``: all of them, or only the submodules ``parts``.

    Takes a state dict, or a training checkpoint that holds one under "state_dict" or "model".
    Nothing in the file can run: see :func:`leakfree.sealed.read_torch_file`.

    Raises:
        CheckpointError: no such file, a damaged file, or weights of another model: the first names that
            are missing, left over, or of another shape are listed, and nothing is loaded.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"model.weights: no file {path}")
    try:
        state = read_torch_file(path)
    except CheckpointError as error:
        raise CheckpointError(f"model.weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"model.weights: {path} holds no state dict of tensors")
    state = {name.removeprefix("model."): value for name, value in state.items()}
    own = model.state_dict()
    parts = list(parts)
    for part in parts:
        _submodule(model, part, "model.weights_parts")

    def wanted(name: str) -> bool:
        return not parts or any(name == part or name.startswith(part + ".") for part in parts)

    state = {name: value for name, value in state.items() if wanted(name)}
    expected = {name: value for name, value in own.items() if wanted(name)}
    # What a norm keeps beside its statistics (counters, a memory) is not in the checkpoints of other norms.
    own_books = {name for name, _ in model.named_buffers() if not name.endswith((".running_mean", ".running_var"))}
    missing = [name for name in expected if name not in state and name not in own_books]
    state = {name: value for name, value in state.items() if name in expected or not _is_book(name)}
    extra = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
        for what, names in (("lacks", missing), ("has left over", extra), ("differs in shape:", shapes))
        if names
    ]
    if faults:
        raise CheckpointError(f"model.weights: {path} is a checkpoint of another model: it {'; it '.join(faults)}")
    try:
        model.load_state_dict({**own, **state})
    except RuntimeError as error:  # tensors of a kind that cannot be copied: sparse, quantized, without values
        raise CheckpointError(f"model.weights: {path}: {one_line(error)}") from error
