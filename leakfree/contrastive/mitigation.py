"""Who shares batch statistics in one forward of an encoder: each remedy against the shortcut as one word.

All of bn, sync_bn, ghost_bn and the shuffles are one network of plain batch norms, run inside another normalization
scope: the word is a partition of the images, drawn once for a forward. So checkpoints do not depend on it.
Reference: He et al. 2020 (MoCo), section 3.3; Cai et al. 2021 (EMAN); Wu & Johnson 2021, section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from leakfree.distributed import all_gather_ints, get_rank, get_world_size
from leakfree.partition import Partition, image_partition, normalization_scope
from leakfree.shuffle.exchange import Ticket, make_ticket, shuffle_nest, unshuffle_nest
from leakfree.shuffle.plan import GroupDraw

__all__ = ["SHUFFLES", "Mitigation"]

SHUFFLES = ("shuffle_bn", "shuffle_images", "loader_shuffle")
_ALONE = ("gn", "frozen_bn", "eman")  # an image never sees another


@dataclass(frozen=True)
class Mitigation:
    """How the images of a forward are grouped.

    ================== =====================================================================================
    ``bn``             the images of a rank, or each ``images_per_group`` consecutive ones over all ranks
    ``sync_bn``        all images of all ranks
    ``ghost_bn``       about ``ghost_size`` consecutive ones of a rank, as in GhostBN
    ``shuffle_bn``     random groups over all ranks (ShuffleBN)
    ``shuffle_images`` the same, by the name of what moves (MoCo)
    ``loader_shuffle`` the same groups: images are loaded where they meet, only features go home
    ``gn, frozen_bn``  each image alone
    ``eman``           each alone: the key encoder in eval mode (EMAN)
    ================== =====================================================================================

    The shuffles of one ``seed`` and ``index`` draw the same groups, in one process and on many ranks, so they compute
    the same features. Images move, each once, and not statistics as in :class:`leakfree.norms.ShuffleBatchNorm`: an
    image is smaller than what the layers make of it, and one exchange takes less time than one in every layer. (In RoI
    heads it is the other way round.)

    Args:
        name: one of the above.
        images_per_group: for bn and the shuffles; 0 = what a rank holds.
        ghost_size: for ghost_bn.
        seed: of the shuffles, the same on every rank. Two encoders need two: with one they would be dealt into the same
            groups, as if there were no shuffle.
    """

    name: str
    images_per_group: int = 0
    ghost_size: int = 0
    seed: int = 0

    @property
    def shuffles(self) -> bool:
        return self.name in SHUFFLES

    @property
    def shares(self) -> bool:
        """Whether images share statistics at all."""
        return self.name not in _ALONE

    @property
    def norm(self) -> str:
        """The norm of :data:`leakfree.norms.NORMS` that the network has."""
        return {"gn": "GN", "frozen_bn": "FrozenBN"}.get(self.name, "BN")

    def draw(self, sizes: list[int], index: int) -> GroupDraw:
        """The random groups of a batch, of which rank r holds ``sizes[r]`` images."""
        groups = max(1, round(sum(sizes) / self.images_per_group)) if self.images_per_group else len(sizes)
        return GroupDraw(sizes, get_rank(), groups, self.seed, index)

    def encode(
        self, encoder: Callable[[Tensor], Tensor], images: Tensor, index: int, num_images: int | None = None
    ) -> Tensor:
        """Run ``encoder`` so that the images of each group, and no others, share statistics.

        Args:
            encoder: images (N, 3, H, W) -> features (N, D), with leakfree's batch norms inside.
            images: of this rank; under ``loader_shuffle`` those that meet here. All ranks call it; numbers may differ.
            index: of the draw, the same on every rank: the step.
            num_images: of this rank; by default as many as there are ``images``. Under ``loader_shuffle`` another
                number may meet here.

        Returns:
            (num_images, D), row i of image i of this rank. Differentiable.
        """
        if not self.shuffles:
            with normalization_scope(self._partition(len(images))) if self.shares else nullcontext():
                return encoder(images)
        draw = self.draw(_sizes(len(images) if num_images is None else num_images), index)
        channels_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
        ticket = make_ticket(draw, images.device, None, channels_last=channels_last, differentiable=False)
        if self.name != "loader_shuffle":
            images, ticket = shuffle_nest(images, ticket)
        with normalization_scope(_chunks(ticket)):
            return unshuffle_nest(encoder(images), ticket, gradient=torch.is_grad_enabled())

    def cells(self, num_images: int, index: int) -> Tensor:
        """int64 (N,): the group of each image of this rank, numbered over all ranks. All ranks call it."""
        sizes = _sizes(num_images)
        if self.shuffles:
            return torch.from_numpy(self.draw(sizes, index).groups)
        first = sum(sizes[: get_rank()])
        if not self.shares:
            return torch.arange(first, first + num_images)
        partition = self._partition(num_images)
        groups = torch.zeros(num_images, dtype=torch.int64)
        if partition is not None and partition.groups is not None:
            groups = partition.groups
        if partition is None or not partition.across_ranks:
            counts = [count for (count,) in all_gather_ints([1 if partition is None else partition.num_groups])]
            groups = groups + sum(counts[: get_rank()])
        return groups

    def _partition(self, num_images: int) -> Partition | None:
        if self.name == "sync_bn":
            return Partition(across_ranks=True)
        if self.name == "ghost_bn":
            return Partition.chunks_of(self.ghost_size, num_images)
        return image_partition([1] * num_images, self.images_per_group) if self.images_per_group else None

    def describe(self, total: int, per_rank: int) -> str:
        """What is normalized together, for people."""
        if not self.shares:
            return "each image alone"
        if self.name == "sync_bn":
            return f"{total} images"
        if self.name == "ghost_bn":
            return f"{self.ghost_size} images"
        images = self.images_per_group or per_rank
        return f"{images} images, drawn at random from {total}" if self.shuffles else f"{images} images"


def _sizes(num_images: int) -> list[int]:
    if get_world_size() == 1:
        return [num_images]
    return [size for (size,) in all_gather_ints([num_images])]


def _chunks(ticket: Ticket) -> Partition:
    """The groups that meet on this rank: their rows have arrived in order."""
    counts = torch.bincount(ticket.groups, minlength=max(ticket.num_groups, 1))
    return Partition.consecutive(counts.tolist())
