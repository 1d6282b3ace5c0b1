"""The check of a config before it runs: against what really meets, and word for word where it warns."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.config import load_config
from leakfree.config.schema import ClassificationRunConfig, ContrastiveRunConfig, DetectionRunConfig, RunConfig
from leakfree.contrastive import mitigations
from leakfree.leakage import Finding, check_config
from leakfree.norms import NORMS
from tests.ranks import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
DOCUMENT = Path(__file__).parents[2] / "docs" / "contrastive.md"


def verdicts(config, world_size=None):
    return [finding.verdict for finding in check_config(config, world_size)]


def contrastive(query, key="same", *, method="moco", total=32, images=0, chunk=8):
    config = ContrastiveRunConfig()
    config.model.method, config.model.query, config.model.key = method, query, key
    config.model.images_per_group, config.trainer.total_batch_size = images, total
    if "ghost_bn" in (query, key):
        config.model.norm_options = {"group_size": chunk}
    return config


# ------------------------------------------------------------------------------------ contrastive

QUERIES = ["bn", "sync_bn", "ghost_bn", "shuffle_bn", "shuffle_images"]
KEYS = [*QUERIES, "loader_shuffle", "eman"]


def _leaks(query_cells, key_cells, method):
    """What the verdict is about, from the groups of many steps: do a query and its key meet the same images?

    ``*_cells``: int64 (steps, N). MoCo leaks too where one side is normalized with its whole batch.
    """
    if (key_cells == torch.arange(key_cells.shape[1])).all():
        return False  # alone
    whole = [(cells == cells[:, :1]).all() for cells in (query_cells, key_cells)]
    if any(whole):
        return method == "moco"
    mates = [cells[:, :, None] == cells[:, None] for cells in (query_cells, key_cells)]
    others = ~torch.eye(key_cells.shape[1], dtype=torch.bool)
    share = [(mate & others).double().mean() for mate in mates]
    both = (mates[0] & mates[1] & others).double().mean()
    assert abs(both / (share[0] * share[1]) - 1) < 0.2 or both > 0.9 * min(share), "by chance, or the smaller group"
    return bool(both > 0.9 * min(share))


def _cells(rank, world_size, config):
    torch.set_num_threads(1)
    return [
        torch.stack([item.cells(config.trainer.total_batch_size // world_size, step) for step in range(40)])
        for item in mitigations(config)
    ]


def _met(config, world_size):
    if world_size == 1:
        return _cells(0, 1, config)
    ranks = run_ranks(_cells, world_size, config)
    return [torch.cat(parts, 1) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("images", [0, 8, 32])
@pytest.mark.parametrize("method", ["moco", "simclr"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("query", QUERIES)
def test_a_verdict_is_what_the_groups_of_a_run_say(query, key, method, images):
    config = contrastive(query, key, method=method, images=images)
    assert ("leak" in verdicts(config, 1)) == _leaks(*_met(config, 1), method)


@pytest.mark.parametrize(("query", "key"), [("bn", "bn"), ("bn", "shuffle_bn"), ("ghost_bn", "bn"), ("bn", "sync_bn")])
def test_so_do_they_on_several_ranks(query, key):
    for method in ("moco", "simclr"):
        config = contrastive(query, key, method=method, chunk=4)
        expected = _leaks(*_met(config, 2), method)
        assert ("leak" in verdicts(config, 2)) == expected
        config.trainer.num_processes = 2
        assert ("leak" in verdicts(config)) == expected


@pytest.mark.parametrize(
    ("query", "key", "method", "ranks", "images", "expected"),
    [
        # MoCo, SyncBN and a queue (moco issue 46); one group in one process comes to the same
        ("sync_bn", "same", "moco", 8, 0, [("leak", "no key in the queue has")]),
        ("bn", "same", "moco", 1, 0, [("leak", "no key in the queue has")]),
        ("bn", "sync_bn", "moco", 8, 0, [("leak", "no key in the queue has")]),
        ("sync_bn", "bn", "moco", 8, 0, [("leak", "hold its whole batch")]),
        # local batch norm
        ("bn", "same", "moco", 8, 0, [("leak", "normalized among the same images")]),
        ("bn", "same", "simclr", 8, 0, [("leak", "normalized among the same images")]),
        ("bn", "same", "simclr", 1, 0, [("safe", "all keys, positive or negative")]),
        ("bn", "same", "simclr", 1, 8, [("leak", "normalized among the same images")]),
        ("sync_bn", "same", "simclr", 8, 0, [("safe", "all keys, positive or negative")]),
        ("bn", "sync_bn", "simclr", 8, 0, [("safe", "no sign that a negative has not")]),
        # shuffles
        ("bn", "shuffle_bn", "moco", 8, 0, [("safe", "by chance only")]),
        ("bn", "shuffle_bn", "moco", 1, 8, [("safe", "by chance only")]),
        ("bn", "loader_shuffle", "simclr", 1, 8, [("safe", "by chance only")]),
        (
            "bn",
            "shuffle_bn",
            "moco",
            1,
            0,
            [("leak", "no key in the queue has"), ("no effect", "shuffle_bn deals all 32 images into one group")],
        ),
        (
            "sync_bn",
            "shuffle_bn",
            "moco",
            8,
            0,
            [("leak", "hold its whole batch"), ("no effect", "sync_bn lets all 32 meet")],
        ),
        (
            "shuffle_images",
            "sync_bn",
            "simclr",
            8,
            0,
            [("no effect", "sync_bn lets all 32 meet"), ("safe", "no sign that a negative has not")],
        ),
        ("shuffle_bn", "same", "moco", 8, 0, [("safe", "by chance only")]),
        ("shuffle_bn", "loader_shuffle", "simclr", 1, 8, [("safe", "by chance only")]),
        # nobody
        ("bn", "eman", "moco", 8, 0, [("safe", "without its batch-mates")]),
        ("gn", "same", "moco", 8, 0, [("safe", "without its batch-mates")]),
        ("frozen_bn", "same", "simclr", 8, 0, [("safe", "no image is normalized with another")]),
        ("bn", "same", "moco", 1, 1, [("safe", "without its batch-mates")]),
        # chunks as large as what a rank holds
        ("ghost_bn", "same", "moco", 4, 0, [("leak", "same images"), ("no effect", "this is bn")]),
        ("ghost_bn", "same", "moco", 2, 0, [("leak", "same images")]),
    ],
)
def test_methods_times_words_times_ranks(query, key, method, ranks, images, expected):
    found = check_config(contrastive(query, key, method=method, images=images), ranks)
    assert [item.verdict for item in found] == [verdict for verdict, _ in expected]
    for item, (_, words) in zip(found, expected, strict=True):
        assert words in item.reason
        assert item.source
        assert bool(item.remedy) == (item.verdict != "safe")


def _documented():
    table = DOCUMENT.read_text().partition("<!-- verdict-table -->")[2].partition("<!-- /verdict-table -->")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert len(rows) > 15
    return rows


@pytest.mark.parametrize(("ranks", "images"), [(8, 0), (1, 4)])
@pytest.mark.parametrize(("method", "query", "key", "verdict"), _documented())
def test_the_page_says_what_the_check_says(method, query, key, verdict, ranks, images):
    config = contrastive(query, key, method=method, images=images, chunk=2)
    assert ", ".join(verdicts(config, ranks)) == verdict


def test_a_finding_names_keys_that_were_given():
    (found,) = check_config(contrastive("sync_bn"), 8)
    assert found.keys == ("model.query",)
    assert str(found).startswith("leak: model.query: all keys of a step")
    assert str(found).endswith(
        "query 32 of 32 images, key 32 of 32 images); "
        "remedy: model.key=shuffle_bn with model.images_per_group, or eman (facebookresearch/moco issue 46)"
    )
    (found,) = check_config(contrastive("bn", "bn"), 8)
    assert found.keys == ("model.query", "model.key")


@settings(deadline=None, max_examples=60)
@given(
    query=st.sampled_from([*QUERIES, "gn"]),
    key=st.sampled_from(["same", *KEYS]),
    method=st.sampled_from(["moco", "simclr"]),
    ranks=st.integers(1, 8),
    per_rank=st.integers(1, 9),
    chunk=st.integers(2, 9),
    data=st.data(),
)
def test_every_combination_has_one_verdict(query, key, method, ranks, per_rank, chunk, data):
    total = ranks * per_rank
    images = data.draw(st.sampled_from([0, *(size for size in range(1, total + 1) if total % size == 0)]))
    found = verdicts(contrastive(query, key, method=method, total=total, images=images, chunk=chunk), ranks)
    assert len([verdict for verdict in found if verdict != "no effect"]) == 1  # there always is an answer
    assert found == sorted(found, key=["leak", "no effect", "safe"].index)


# -------------------------------------------------------------------------------------- detection


def detection(norm="BN", shuffle="none", *, total=16, images=0, **options):
    config = DetectionRunConfig()
    config.trainer.total_batch_size, config.model.images_per_group = total, images
    config.model.mask_head.enabled = False
    head = config.model.box_head
    head.name, head.norm, head.roi_shuffle, head.norm_options = "4conv1fc", norm, shuffle, options
    return config


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        (detection(), 8, [("leak", "RoIs of 2 images")]),
        (detection(), 16, [("leak", "RoIs of 1 image share")]),
        (detection(images=1), 1, [("leak", "RoIs of 1 image share")]),
        (detection(), 2, [("safe", "RoIs of 8 images")]),
        (detection("BatchStatBN"), 8, [("leak", "RoIs of 2 images")]),
        (detection("GhostBN", group_size=512), 1, [("leak", "RoIs of 1 image share")]),
        (detection("SyncBN"), 8, [("safe", "RoIs of 16 images")]),
        (detection("SyncBN", total=4), 2, [("leak", "RoIs of 4 images")]),
        (detection("BN", "statistics"), 8, [("safe", "RoIs of 16 images")]),
        (detection("BN", "features"), 1, [("safe", "RoIs of 16 images")]),
        (detection("BN", "statistics", total=2), 2, [("leak", "RoIs of 2 images")]),
        (detection("ShuffleBN", num_groups=4), 1, [("safe", "RoIs of 16 images")]),
        (detection("ShuffleBN", num_groups=1), 8, [("no effect", "one group"), ("safe", "RoIs of 16")]),
        (detection("BN", "statistics", images=16), 1, [("no effect", "one group"), ("safe", "RoIs of 16")]),
        (detection("SyncBN", "features"), 8, [("no effect", "all RoIs share"), ("safe", "RoIs of 16")]),
        (detection("none", "features"), 8, [("no effect", "no RoI sees another"), ("safe", "alone")]),
        (detection("GN", "features"), 8, [("no effect", "no RoI sees another"), ("safe", "alone")]),
        (detection("FrozenBN"), 8, [("safe", "each RoI is normalized alone")]),
        (detection("MyNorm"), 8, []),
    ],
    ids=lambda value: "-" if isinstance(value, RunConfig) else str(value)[:40],
)
def test_heads(config, ranks, expected):
    found = check_config(config, ranks)
    assert [item.verdict for item in found] == [verdict for verdict, _ in expected]
    assert all(words in item.reason for item, (_, words) in zip(found, expected, strict=True))
    assert all(key.startswith("model.box_head.") for item in found for key in item.keys)


def test_a_mask_head_is_judged_if_there_is_one():
    config = detection("GN")
    config.model.mask_head.enabled, config.model.mask_head.norm = True, "BN"
    leak, safe = check_config(config, 8)
    assert (leak.verdict, leak.keys[0], safe.keys[0]) == ("leak", "model.mask_head.norm", "model.box_head.norm")


# --------------------------------------------------------------------------------- classification


def classification(norm="BN", composition="same_class", *, images=0, row=16, **options):
    config = ClassificationRunConfig()
    config.trainer.total_batch_size, config.model.images_per_group = 64, images
    config.model.norm, config.model.norm_options = norm, options
    config.data.composition, config.data.group_size = composition, row
    return config


@pytest.mark.parametrize(
    ("config", "ranks", "expected"),
    [
        (classification(composition="random"), 4, ["safe"]),
        (classification(), 4, ["leak"]),
        (classification(), 1, ["safe"]),
        (classification(images=16), 1, ["leak"]),
        (classification(row=64), 1, ["leak"]),
        (classification("SyncBN"), 4, ["safe"]),
        (classification("SyncBN", row=64), 4, ["leak"]),
        (classification("GhostBN", group_size=16), 1, ["leak"]),
        (classification("ShuffleBN"), 4, ["safe"]),
        (classification("ShuffleBN", num_groups=1), 4, ["no effect", "safe"]),
        (classification("IEBN", images=16), 1, ["leak"]),
        (classification("GN", row=64), 1, ["safe"]),
        (classification("MyNorm"), 4, []),
    ],
    ids=lambda value: "-" if isinstance(value, RunConfig) else str(value),
)
def test_classifiers(config, ranks, expected):
    assert verdicts(config, ranks) == expected


def test_both_norms_of_an_xbn_block_are_judged():
    config = classification("GN", images=16)
    config.model.block_norm = "BN"
    leak, safe = check_config(config)
    assert (leak.verdict, leak.keys[0], safe.keys[0]) == ("leak", "model.block_norm", "model.norm")


# ------------------------------------------------------------------------------------------- all


def test_every_norm_of_the_library_and_every_word_is_judged():
    for norm, _ in NORMS:
        assert check_config(detection(norm)), norm
        assert check_config(classification(norm)), norm


def test_a_task_that_it_does_not_know_has_no_findings():
    assert check_config(RunConfig()) == []


@pytest.mark.parametrize(
    ("path", "leaks"),
    [
        ("contrastive/digits/moco_bn.yaml", 1),
        ("contrastive/digits/moco_sync_bn.yaml", 1),
        ("contrastive/digits/moco_shuffle_bn.yaml", 0),
        ("classification/digits_BN.yaml", 0),
        ("classification/digits_BN_one_class.yaml", 1),
        ("classification/digits_ShuffleBN_one_class.yaml", 0),
        ("detection/digits/mask_rcnn_small_BNhead_leaky.yaml", 2),
        ("detection/digits/mask_rcnn_small_SyncBNhead.yaml", 0),
        ("detection/digits/mask_rcnn_small_GNhead.yaml", 0),
        ("detection/digits/mask_rcnn_small_BNhead_shuffle_features.yaml", 0),
        ("detection/coco/mask_rcnn_R50_FPN_BNhead_leaky_3x.yaml", 2),
        ("detection/coco/mask_rcnn_R50_FPN_BNhead_shuffle_statistics_3x.yaml", 0),
    ],
)
def test_shipped_configs_leak_where_their_names_say_so(path, leaks):
    found = check_config(load_config(CONFIGS / path))
    assert [item.verdict for item in found].count("leak") == leaks
    assert all(isinstance(item, Finding) and item.verdict != "no effect" for item in found)
