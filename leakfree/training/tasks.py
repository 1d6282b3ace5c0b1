"""What a kind of run brings to training; everything else is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from leakfree.config.schema import RunConfig
from leakfree.records import Evaluation

__all__ = ["Task", "Track", "in_precision"]

Track = Callable[[Iterable[Any], str], Iterable[Any]]  # (batches, what they are for) -> batches, with progress shown


class Task(Protocol):
    """One kind of run on this rank: its model, data, loss and evaluation. All ranks call all methods alike.

    Attributes:
        model: what is trained and saved.
    """

    model: nn.Module

    def num_train_images(self) -> int:
        """Images of an epoch."""

    def faults(self) -> list[str]:
        """One line for each data set that had to leave something out, as far as this rank has seen."""

    def describe_batch(self, world_size: int) -> dict[str, Any]:
        """The three batch sizes: total, per rank, normalization."""

    def train_batches(self, start_step: int) -> Iterable[Any]:
        """This rank's training batches from ``start_step`` on, a function of seed and step alone."""

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Forward in training mode; the losses are summed. The graph must reach every trainable parameter,
        also for a batch with nothing in it, or other ranks wait for its gradients for ever."""

    def monitors(self) -> dict[str, Tensor]:
        """Numbers of the last training forward to log beside the losses; the same names on every rank and step."""

    def after_step(self) -> None:
        """What is due when the optimizer has stepped."""

    def estimate_statistics(self) -> None:
        """Fill the batch norms' running statistics with precise population statistics of training data."""

    def validate(self, track: Track) -> dict[str, float | None]:
        """Metrics under the stored statistics, for curves during training."""

    def evaluate(self, track: Track) -> Evaluation:
        """Everything that the config asks for, of the model as it is."""


def in_precision(model: nn.Module, config: RunConfig) -> nn.Module:
    """``model`` with weights as long as ``trainer.precision`` keeps them.

    Lightning would do it, but only after it has loaded the checkpoint to resume from, whose 64 bits were then cut.
    """
    return model.double() if config.trainer.precision == "64-true" else model
