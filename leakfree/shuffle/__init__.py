"""Shuffling: random groups over all ranks, the differentiable exchange, and the wrapper module."""

from leakfree.shuffle.exchange import Ticket, batch_shuffle, batch_unshuffle
from leakfree.shuffle.plan import GroupDraw, permute, unpermute
from leakfree.shuffle.shuffled import Shuffled

__all__ = ["GroupDraw", "Shuffled", "Ticket", "batch_shuffle", "batch_unshuffle", "permute", "unpermute"]
