"""Shuffling: random groups over all ranks, the exchange of rows, the wrapper module, the shuffle in the loader."""

from leakfree.shuffle.exchange import Ticket, batch_shuffle, batch_unshuffle
from leakfree.shuffle.loader import KeyShuffleBatchSampler, PairedIndex, PairedViews
from leakfree.shuffle.plan import GroupDraw, permute, unpermute
from leakfree.shuffle.shuffled import Shuffled

__all__ = [
    "GroupDraw",
    "KeyShuffleBatchSampler",
    "PairedIndex",
    "PairedViews",
    "Shuffled",
    "Ticket",
    "batch_shuffle",
    "batch_unshuffle",
    "permute",
    "unpermute",
]
