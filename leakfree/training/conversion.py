"""A run that goes on with another number of ranks: what its config must say so that the same images are normalized
together as before. Torch-free; what becomes of each rank's own statistics is in ``buffers``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from leakfree.config.rules.every_task import ALONE
from leakfree.config.schema import (
    BoxHeadConfig,
    ClassificationRunConfig,
    ContrastiveRunConfig,
    DetectionRunConfig,
    MaskHeadConfig,
    RunConfig,
)
from leakfree.errors import RunError

__all__ = ["Change", "Conversion", "amended", "convert"]

Change = tuple[str, Any, Any]  # dotted key, value before, value now


@dataclass(frozen=True)
class Conversion:
    """A change of the number of ranks in the middle of a run.

    Attributes:
        step: completed steps at that point.
        before, now: ranks.
        changes: of the config; by them the run's own config is known again when the same command is given later.
    """

    step: int
    before: int
    now: int
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        kept = ", ".join(f"{key}={value}" for key, _, value in self.changes)
        return (
            f"converted at step {self.step} from {self.before} to {self.now} ranks: "
            + (f"{kept} keeps what is normalized together" if kept else "what is normalized together stays as it was")
            + "; running averages are now those of a rank's whole batch, and what ranks draw or average by themselves "
            "(dropout, sampled RoIs and their losses) differs from a run without the change"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run's record."""
        changes = [list(change) for change in self.changes]
        return {"step": self.step, "before": self.before, "now": self.now, "changes": changes}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Conversion:
        """From a record.

        Raises:
            RunError: its changes are not keys with two values.
        """
        changes = raw["changes"]
        if not all(isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) for item in changes):
            raise RunError("record.json: conversions: expected changes as [key, value before, value now]")
        return Conversion(raw["step"], raw["before"], raw["now"], tuple((*change,) for change in changes))


def amended(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """A copy of ``config`` with those of the ``changes`` whose value before is the config's."""
    config = copy.deepcopy(config)
    for key, before, now in changes:
        *path, name = key.split(".")
        section: Any = config
        for part in path:
            section = getattr(section, part, None)
        if isinstance(section, dict):  # options of a norm
            if section.get(name) == before:
                section[name] = now
        elif getattr(section, name, None) == before:
            setattr(section, name, now)
    return config


def convert(config: RunConfig, before: int, now: int) -> tuple[Change, ...]:
    """The changes of ``config`` by which ``now`` ranks normalize together what ``before`` ranks did.

    Local batch norms go on in ghost groups (``model.images_per_group``), which may span ranks; random groups stay as
    many; synchronized norms stay so.

    Raises:
        RunError: a norm whose statistics cannot be kept, and why.
    """
    total = config.trainer.total_batch_size
    ranks = _Ranks(before, now, total // before, total // now)
    parts = list(_parts(config, ranks))
    model: Any = config.model  # type: ignore[attr-defined]  # each task has its own
    images: int = model.images_per_group
    draws = [part for part in parts if part.sharing == "draw"]

    def num_groups(part: _Part, images: int, world_size: int) -> int:
        return -(-total // images) if images and part.in_scope else max(2, world_size)

    def differs(part: _Part, images_now: int) -> bool:
        return num_groups(part, images, before) != num_groups(part, images_now, now)

    by_groups = any(part.sharing == "groups" for part in parts) or (
        before > 1 and any(part.in_scope and not part.options and differs(part, images) for part in draws)
    )
    wanted = images or (ranks.images_before if by_groups else 0)
    changes: list[Change] = [("model.images_per_group", images, wanted)] if wanted != images else []
    for part in parts:
        if part.counts_forwards and wanted != images:
            raise RunError(
                f"{part.key}: ShuffleBN with draw=layer draws otherwise inside groups of images, which other norms of "
                "the model need"
            )
    for part in draws:
        if differs(part, wanted):
            count = num_groups(part, images, before)
            if not part.options:
                raise RunError(f"{part.key}: {count} random groups over {before} ranks cannot be kept on {now}")
            changes.append((f"{part.options}.num_groups", None, count))
    return tuple(changes)


# ------------------------------------------------------------------------------ who shares statistics


@dataclass(frozen=True)
class _Ranks:
    before: int
    now: int
    images_before: int  # of a rank
    images_now: int


@dataclass(frozen=True)
class _Part:
    """A part of the model. ``sharing``: "kept" whatever the ranks, "groups" of a rank's images, "draw": random groups,
    as many as there are ranks.

    ``in_scope``: ``model.images_per_group`` reaches it. ``options``: the section that takes num_groups; "" for none.
    ``counts_forwards``: its draws depend on whether there is a scope.
    """

    key: str
    sharing: Literal["kept", "groups", "draw"]
    in_scope: bool = True
    options: str = ""
    counts_forwards: bool = False


def _parts(config: RunConfig, ranks: _Ranks) -> Iterator[_Part]:
    if isinstance(config, ClassificationRunConfig):
        model = config.model
        yield _of_norm("model.norm", model.norm, model.norm_options, ranks)
        yield _of_norm("model.block_norm", model.block_norm, model.block_norm_options, ranks)
    elif isinstance(config, ContrastiveRunConfig):
        yield from _of_words(config, ranks)
    elif isinstance(config, DetectionRunConfig):
        yield from _of_detector(config, ranks)


def _of_norm(key: str, norm: str, options: dict[str, Any], ranks: _Ranks) -> _Part:
    """A part whose rows are images; ``key``: of its norm."""
    if norm in ALONE:
        return _Part(key, "kept")
    if options.get("process_group") is not None:
        raise RunError(f"{key}: {norm} shares statistics inside process groups, and these change with the ranks")
    if norm == "SyncBN" or (norm == "DomainBN" and options.get("across_ranks")):
        return _Part(key, "kept")
    if norm in ("BN", "BatchStatBN", "BGN", "IEBN"):
        return _Part(key, "groups")
    if norm == "GhostBN":
        _whole_chunks(key, options.get("group_size"), ranks)
        return _Part(key, "kept")
    if norm == "ShuffleBN":
        given = options.get("num_groups") is not None
        layers = options.get("draw") == "layer"
        return _Part(key, "kept" if given else "draw", options=f"{key}_options", counts_forwards=layers)
    reason = {
        "BatchRenorm": "corrects each rank's batch by that rank's own running averages",
        "CBN": "keeps each rank's own window of past batches",
        "MBN": "keeps each rank's own memory of past batches",
        "DomainBN": "normalizes each rank's images of a domain apart; with norm_options.across_ranks=true it could",
    }.get(norm, "was registered elsewhere, and what it normalizes together is not known")
    raise RunError(f"{key}: {norm} {reason}")


def _whole_chunks(key: str, size: Any, ranks: _Ranks) -> None:
    if not isinstance(size, int) or ranks.images_before % size or ranks.images_now % size:
        raise RunError(
            f"{key}: chunks of {size} images (group_size) do not fill both a rank's {ranks.images_before} images of "
            f"before and {ranks.images_now} of now"
        )


def _of_words(config: ContrastiveRunConfig, ranks: _Ranks) -> Iterator[_Part]:
    model = config.model
    for key, word in (("model.query", model.query), ("model.key", model.query if model.key == "same" else model.key)):
        if word == "ghost_bn":
            _whole_chunks(key, model.norm_options.get("group_size"), ranks)
        grouped = word in ("bn", "shuffle_bn", "shuffle_images", "loader_shuffle")
        yield _Part(key, "groups" if grouped else "kept")


def _of_detector(config: DetectionRunConfig, ranks: _Ranks) -> Iterator[_Part]:
    model = config.model
    backbone = model.backbone
    frozen = backbone.freeze_at == 5 or {"backbone", "backbone.body"} & set(model.freeze)
    if not frozen:
        part = _of_norm("model.backbone.norm", backbone.norm, backbone.norm_options, ranks)
        if part.sharing == "groups":
            raise RunError(
                f"{part.key}: {backbone.norm} normalizes a rank's images together, and model.images_per_group is for "
                "the RoI heads only; a backbone with FrozenBN, GN or SyncBN can go on"
            )
        yield _Part(part.key, part.sharing, in_scope=False, options=part.options)
    heads: list[tuple[str, BoxHeadConfig | MaskHeadConfig]] = []
    if model.box_head.name != "2fc":
        heads.append(("model.box_head.norm", model.box_head))
    if model.mask_head.enabled:
        heads.append(("model.mask_head.norm", model.mask_head))
    for key, head in heads:
        if head.norm == "GhostBN":
            raise RunError(
                f"{key}: GhostBN cuts the RoIs of a rank into chunks, and their number differs from step to step"
            )
        part = _of_norm(key, "ShuffleBN" if head.roi_shuffle == "statistics" else head.norm, head.norm_options, ranks)
        draws = part.sharing == "draw" or (part.sharing == "groups" and head.roi_shuffle == "features")
        # A head always has a scope; and only under its own name do checks of a config know ShuffleBN's option.
        yield _Part(key, "draw" if draws else part.sharing, options=part.options if head.norm == "ShuffleBN" else "")
