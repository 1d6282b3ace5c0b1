"""Putting a model and the random numbers back as they were, after a forward that is not one of training."""

from __future__ import annotations

import copy
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["RandomStates", "attributes_kept", "random_states_kept", "state_kept"]


@contextmanager
def attributes_kept(modules: Iterable[nn.Module], *names: str) -> Iterator[None]:
    """Put back the attributes ``names`` of each module that has them."""
    before = [(module, name, vars(module)[name]) for module in modules for name in names if name in vars(module)]
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def state_kept(
    model: nn.Module, attributes: Sequence[str] = ("last_groups",), *, spare: Collection[nn.Module] = ()
) -> Iterator[None]:
    """Put back all buffers (the objects and their values), extra state, and ``attributes`` where a module has them.

    Args:
        spare: modules that keep the buffers the forward left them, unless it raised.
    """
    modules = list(model.modules())
    extra = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in modules
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    spared: Collection[nn.Module] = ()
    try:
        with attributes_kept(modules, *attributes):
            yield
        spared = spare
    finally:
        for module, state in extra:
            module.set_extra_state(state)
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if module not in spared:
                    module._buffers[name] = buffer
                    buffer.copy_(value)


@dataclass(frozen=True)
class RandomStates:
    """The random states of Python, numpy, torch on all devices, and of a loader's own generators."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: list[Tensor]
    generators: list[tuple[torch.Generator, Tensor]]  # of loaders

    @staticmethod
    def take(loader: object = None) -> RandomStates:
        holders = [loader, getattr(loader, "sampler", None)]
        generators = {id(found): found for item in holders if (found := getattr(item, "generator", None)) is not None}
        return RandomStates(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            [(item, item.get_state()) for item in generators.values() if isinstance(item, torch.Generator)],
        )

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        for generator, state in self.generators:
            generator.set_state(state)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the random states back."""
    states = RandomStates.take()
    try:
        yield
    finally:
        states.put_back()
