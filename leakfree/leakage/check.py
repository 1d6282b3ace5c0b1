"""Does this config leak? Method x norm x number of ranks, answered before a run, with the reason.

A check reads who would share statistics with whom, and no data: it says what can leak, the measures say how much does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from leakfree.config.schema import (
    BoxHeadConfig,
    ClassificationRunConfig,
    ContrastiveRunConfig,
    DetectionRunConfig,
    MaskHeadConfig,
    RunConfig,
)

__all__ = ["Finding", "check_config"]

Verdict = Literal["leak", "no effect", "safe"]


@dataclass(frozen=True)
class Finding:
    """What a combination of settings does to the flow between samples.

    Attributes:
        keys: of the config, those concerned.
        verdict: "leak": a training can profit from who meets whom; "no effect": a remedy that changes nothing here;
            "safe": what shares statistics tells nothing of the answer.
        reason: one sentence.
        remedy: what to set instead; "" for what is safe.
        source: paper, thread or page.
    """

    keys: tuple[str, ...]
    verdict: Verdict
    reason: str
    remedy: str
    source: str

    def __str__(self) -> str:
        remedy = f"; remedy: {self.remedy}" if self.remedy else ""
        return f"{self.verdict}: {', '.join(self.keys)}: {self.reason}{remedy} ({self.source})"


def check_config(config: RunConfig, world_size: int | None = None) -> list[Finding]:
    """Judge every part of the model of ``config`` whose norms may share statistics.

    A norm that also remembers earlier batches (CBN, MBN, BatchRenorm) is judged as if it did not. Norms that were
    registered elsewhere are not judged. Nor is a network looked at: a backbone without batch norms, or a frozen one,
    shares nothing whatever a word says (a training warns of the first).

    Args:
        world_size: number of ranks; by default those that ``config.trainer`` asks for.

    Returns:
        At least one finding for each encoder pair, RoI head or classifier whose norm is known; leaks first.
    """
    ranks = world_size or config.trainer.num_ranks
    found: list[Finding] = []
    if isinstance(config, ContrastiveRunConfig):
        found = list(_contrastive(config, ranks))
    elif isinstance(config, DetectionRunConfig):
        found = list(_detection(config, ranks))
    elif isinstance(config, ClassificationRunConfig):
        found = list(_classification(config, ranks))
    order = ["leak", "no effect", "safe"]
    return sorted(found, key=lambda finding: order.index(finding.verdict))


# --------------------------------------------------------------------------- who shares with whom

_SHARING = {
    # words of contrastive encoders
    "bn": "rank",
    "sync_bn": "everyone",
    "ghost_bn": "chunks",
    "shuffle_bn": "random",
    "shuffle_images": "random",
    "loader_shuffle": "random",
    "gn": "nobody",
    "frozen_bn": "nobody",
    "eman": "nobody",
    # names of norms
    "BN": "rank",
    "BatchStatBN": "rank",
    "BatchRenorm": "rank",
    "CBN": "rank",
    "MBN": "rank",
    "BGN": "rank",
    "IEBN": "rank",
    "DomainBN": "rank",
    "SyncBN": "everyone",
    "GhostBN": "chunks",
    "ShuffleBN": "random",
    "none": "nobody",
    "FrozenBN": "nobody",
    "GN": "nobody",
    "LN": "nobody",
    "IN": "nobody",
    "PN": "nobody",
    "ProxyNorm": "nobody",
}

_Kind = Literal["alone", "part", "whole", "random"]


class _Groups(NamedTuple):
    """How the samples of a step are dealt into groups that share statistics.

    ``kind``: each sample "alone"; groups of consecutive ones, which are "part" of the batch or the "whole" of it;
    "random" groups over the batch. ``images``: whose samples a group holds. ``number``: of groups over all ranks.
    """

    kind: _Kind
    images: int
    number: int


def _groups(
    sharing: str, total: int, ranks: int, *, images_per_group: int = 0, chunks: int = 1, count: int = 0
) -> _Groups:
    """``total``: images of a step over all ranks; ``chunks``: of a rank, for ghost norms; ``count``: of random groups,
    where it is given."""
    if sharing == "nobody":
        return _Groups("alone", 1, total)
    images = total if sharing == "everyone" else images_per_group or total // ranks
    if sharing == "chunks":
        images = -(-(total // ranks) // max(1, chunks))
    images = max(1, min(images, total))
    if sharing == "random":
        count = count or -(-total // images)
        return _Groups("random", max(1, total // count), count)
    return _Groups("whole" if images == total else "part", images, -(-total // images))


def _shuffle_of_one_group(keys: tuple[str, ...], what: str, total: int) -> Finding:
    return Finding(
        keys,
        "no effect",
        f"{what} deals all {total} images into one group, and a batch norm does not notice their order",
        "model.images_per_group for virtual groups, or more ranks",
        "He et al. 2020, section 3.3; facebookresearch/moco issue 133",
    )


# ----------------------------------------------------------------------------------- contrastive


class _Row(NamedTuple):
    """The verdict for kinds of groups of queries and of keys."""

    queries: tuple[_Kind, ...]
    keys: tuple[_Kind, ...]
    verdict: Verdict
    reason: str
    remedy: str = ""
    source: str = "He et al. 2020, section 3.3"


_ANY: tuple[_Kind, ...] = ("alone", "part", "whole", "random")
_SAME_GROUPS = "a query and its key are normalized among the same images, and no other key is: their statistics match"
_ALONE = "a key is normalized without its batch-mates, so it carries no sign of the batch it was encoded in"
_APART = "who is normalized with a key is drawn apart from who is normalized with its query: they match by chance only"

# The first row that fits. The negatives of MoCo are keys of earlier steps, those of SimCLR are of this one.
_VERDICTS: dict[str, tuple[_Row, ...]] = {
    "moco": (
        _Row(_ANY, ("alone",), "safe", _ALONE, source="Cai et al. 2021, section 3"),
        _Row(
            _ANY,
            ("whole",),
            "leak",
            "all keys of a step share statistics that no key in the queue has: a small sign of the batch that the "
            "positive is in",
            "model.key=shuffle_bn with model.images_per_group, or eman",
            "facebookresearch/moco issue 46",
        ),
        _Row(
            ("whole",),
            ("part", "random"),
            "leak",
            "the statistics of a query hold its whole batch, so also the mates of its key, and those of no key in the "
            "queue: a small sign of the batch that the positive is in",
            "model.query=bn with model.images_per_group, and a shuffle or eman for keys",
            "facebookresearch/moco issue 46",
        ),
        _Row(("part",), ("part",), "leak", _SAME_GROUPS, "model.key=shuffle_bn, or eman"),
        _Row(_ANY, _ANY, "safe", _APART),
    ),
    "simclr": (
        _Row(("alone",), _ANY, "safe", "no image is normalized with another", source="Wu & He 2018"),
        _Row(
            ("whole",),
            _ANY,
            "safe",
            "the first views share one statistic, so all keys, positive or negative, meet it alike",
            source="Chen et al. 2020, section 2.2",
        ),
        _Row(
            _ANY,
            ("whole",),
            "safe",
            "the second views share one statistic, so a positive carries no sign that a negative has not",
            source="Chen et al. 2020, section 2.2",
        ),
        _Row(
            ("part",),
            ("part",),
            "leak",
            _SAME_GROUPS,
            "model.query=sync_bn, or model.key=shuffle_bn",
            "Chen et al. 2020, section 2.2; google-research/simclr issue 114",
        ),
        _Row(_ANY, _ANY, "safe", _APART),
    ),
}


def _contrastive(config: ContrastiveRunConfig, ranks: int) -> Iterator[Finding]:
    model, total = config.model, config.trainer.total_batch_size
    words = {"model.query": model.query}
    if model.key != "same":
        words["model.key"] = model.key
    chunk, held = int(model.norm_options.get("group_size", 0)), total // ranks
    chunks = max(1, held // chunk) if chunk else 1
    dealt: list[_Groups] = []
    for key, word in words.items():
        groups = _groups(_SHARING[word], total, ranks, images_per_group=model.images_per_group, chunks=chunks)
        if groups.kind == "random" and groups.number == 1:
            yield _shuffle_of_one_group((key,), word, total)
        if word == "ghost_bn" and groups.images == held:
            yield Finding(
                (key, "model.norm_options.group_size"),
                "no effect",
                f"a rank holds {held} images, and chunks of {chunk} make one of them: this is bn",
                "a smaller group_size",
                "Hoffer et al. 2017",
            )
        dealt.append(_settled(groups))
    queries, keys = dealt[0], dealt[-1]
    names = tuple(words)
    if {queries.kind, keys.kind} == {"whole", "random"}:
        shuffled, other = (names[0], names[-1]) if queries.kind == "random" else (names[-1], names[0])
        yield Finding(
            (shuffled, other),
            "no effect",
            f"a shuffle chooses which images meet, and {words[other]} lets all {total} meet whoever they are",
            f"{other}=bn with model.images_per_group, or no shuffle",
            "facebookresearch/moco issue 46",
        )
    row = next(row for row in _VERDICTS[model.method] if queries.kind in row.queries and keys.kind in row.keys)
    yield Finding(names, row.verdict, f"{row.reason} ({_sizes(queries, keys, total)})", row.remedy, row.source)


def _settled(groups: _Groups) -> _Groups:
    """What it comes to: random groups that are one are the whole batch, an image by itself is alone."""
    if groups.kind == "random" and groups.number == 1:
        return groups._replace(kind="whole")
    return groups._replace(kind="alone") if groups.images == 1 else groups


def _sizes(queries: _Groups, keys: _Groups, total: int) -> str:
    def told(groups: _Groups) -> str:
        if groups.kind == "alone":
            return "alone"
        return f"{groups.images} of {total} images" + (" at random" if groups.kind == "random" else "")

    return f"normalized together: query {told(queries)}, key {told(keys)}"


# ------------------------------------------------------------------------------------- detection

# Random groups and SyncBN over 8 images of one class each were clean where groups of one image leaked (the digits of
# configs/detection, docs/measures.md); Wu & Johnson 2021, section 6, repaired their head with 16.
_ENOUGH_IMAGES = 8


def _detection(config: DetectionRunConfig, ranks: int) -> Iterator[Finding]:
    total, images = config.trainer.total_batch_size, config.model.images_per_group
    heads: dict[str, BoxHeadConfig | MaskHeadConfig] = {"model.box_head": config.model.box_head}
    if config.model.mask_head.enabled:
        heads["model.mask_head"] = config.model.mask_head
    for key, head in heads.items():
        sharing = _SHARING.get(head.norm)
        if sharing is None:
            continue
        if head.roi_shuffle == "features" and sharing in ("nobody", "everyone"):
            reason = "no RoI sees another in this head" if sharing == "nobody" else "all RoIs share statistics anyway"
            yield Finding(
                (f"{key}.roi_shuffle", f"{key}.norm"),
                "no effect",
                f"norm {head.norm}: {reason}, so it does not matter which RoIs meet",
                f"{key}.roi_shuffle=none",
                "Wu & Johnson 2021, section 6",
            )
        elif head.roi_shuffle != "none":
            sharing = "random"
        count = _random_groups(head.norm, head.norm_options, total, ranks, images) if sharing == "random" else 0
        groups = _groups(sharing, total, ranks, images_per_group=images, chunks=total, count=count)
        if groups.kind == "random" and groups.number == 1:
            yield _shuffle_of_one_group((f"{key}.norm_options.num_groups",), "the shuffle", total)
        yield _of_head(key, head.norm, groups, total)


def _of_head(key: str, norm: str, groups: _Groups, total: int) -> Finding:
    source = "Wu & Johnson 2021, section 6"
    if groups.kind == "alone":
        return Finding((f"{key}.norm",), "safe", f"norm {norm}: each RoI is normalized alone", "", "docs/norms.md")
    spread = total if groups.kind in ("whole", "random") else groups.images
    images = f"{spread} image{'s' if spread > 1 else ''}"
    if spread >= _ENOUGH_IMAGES:
        return Finding((f"{key}.norm",), "safe", f"norm {norm}: RoIs of {images} share statistics", "", source)
    cures = f"{key}.norm=GN"
    if total >= _ENOUGH_IMAGES:
        cures = f"{key}.roi_shuffle=statistics (norm BN), {key}.norm=SyncBN, or GN"
    return Finding(
        (f"{key}.norm", f"{key}.roi_shuffle"),
        "leak",
        f"norm {norm}: RoIs of {images} share statistics, and what they have in common gives their classes away",
        cures,
        source,
    )


def _random_groups(norm: str, options: dict[str, object], total: int, ranks: int, images_per_group: int) -> int:
    """How many groups a ShuffleBN or a Shuffled head deals."""
    given = options.get("num_groups") if norm == "ShuffleBN" else None
    if isinstance(given, int) and given:
        return given
    return -(-total // images_per_group) if images_per_group else max(2, ranks)


# -------------------------------------------------------------------------------- classification


def _classification(config: ClassificationRunConfig, ranks: int) -> Iterator[Finding]:
    model, total = config.model, config.trainer.total_batch_size
    norms = {"model.norm": (model.norm, model.norm_options)}
    if model.block_norm != "none":
        norms["model.block_norm"] = (model.block_norm, model.block_norm_options)
    for key, (norm, options) in norms.items():
        sharing = _SHARING.get(norm)
        if sharing is None:
            continue
        images = model.images_per_group
        count = _random_groups(norm, options, total, ranks, images) if sharing == "random" else 0
        chunks = total // ranks // int(options.get("group_size") or total)
        groups = _groups(sharing, total, ranks, images_per_group=images, chunks=chunks, count=count)
        if groups.kind == "random" and groups.number == 1:
            yield _shuffle_of_one_group((key,), norm, total)
        yield _of_classifier(config, key, norm, _settled(groups))


def _of_classifier(config: ClassificationRunConfig, key: str, norm: str, groups: _Groups) -> Finding:
    data, total = config.data, config.trainer.total_batch_size
    keys, source = (key, "data.composition"), "Wu & Johnson 2021, section 6"
    if groups.kind == "alone":
        return Finding(keys, "safe", f"norm {norm}: each image is normalized alone", "", "docs/norms.md")
    if data.composition == "random":
        return Finding(keys, "safe", f"norm {norm}: images share statistics, but are drawn at random", "", source)
    one_class = total <= data.group_size
    if groups.kind == "part" or one_class:
        return Finding(
            keys,
            "leak",
            f"norm {norm}: {groups.images} images share statistics, and composition same_class puts {data.group_size} "
            "of one class in a row: they give the class away",
            f"{key}=GN" if one_class else f"{key}=ShuffleBN, SyncBN or GN, or data.composition=random",
            source,
        )
    how = f"random {groups.images}" if groups.kind == "random" else "all"
    return Finding(
        keys, "safe", f"norm {norm}: {how} of {total} images of balanced classes share statistics", "", source
    )
