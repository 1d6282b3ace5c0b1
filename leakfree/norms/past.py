"""What forwards took from a layer's past (moving averages, a memory), for those that run a second time.

To the gradient these numbers are constants. When activation checkpointing recomputes a forward, the layer has
moved on, so they are kept, and found again by the input.
"""

from __future__ import annotations

from torch import Tensor

from leakfree.recomputation import Replay

__all__ = ["Past"]


class Past:
    """The constants of the last forwards of a layer.

    Args:
        owner: name of the layer in error messages.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._constants: Replay[tuple[Tensor, ...]] = Replay(owner, _same)

    def keep(self, x: Tensor, constants: tuple[Tensor, ...], graph: object) -> None:
        """Note what the forward on ``x`` took; ``graph`` is an object that lives as long as its graph."""
        self._constants.remember(x, constants, graph)

    def again(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the forward on ``x`` took that is now recomputed.

        Raises:
            RuntimeError: it is not among the last forwards, or several of them had this input.
        """
        constants = self._constants.recall(x)
        if constants is None:
            raise RuntimeError(
                f"{self._owner}: this forward runs inside a backward, but its input is that of no recent forward, so "
                "the statistics which that used cannot be found again; keep the layer out of the checkpointed part"
            )
        return constants


def _same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(one.equal(other) for one, other in zip(some, others, strict=True))
