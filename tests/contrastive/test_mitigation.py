"""Who shares statistics under each word: features are those of each group encoded by itself, on any ranks."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leakfree.contrastive import Encoder, Mitigation, MoCo, SimCLR, build_contrastive, describe_batch
from leakfree.contrastive.mitigation import SHUFFLES
from leakfree.errors import ConfigError
from leakfree.norms import convert_norms
from tests.contrastive.conftest import MakeConfig
from tests.ranks import run_ranks

WORDS = {
    "bn": Mitigation("bn"),
    "bn by 3": Mitigation("bn", images_per_group=3),
    "sync_bn": Mitigation("sync_bn"),
    "ghost_bn": Mitigation("ghost_bn", ghost_size=3),
    "shuffle_bn": Mitigation("shuffle_bn", seed=5),
    "shuffle_bn by 3": Mitigation("shuffle_bn", images_per_group=3, seed=5),
    "shuffle_images by 3": Mitigation("shuffle_images", images_per_group=3, seed=5),
    "loader_shuffle by 3": Mitigation("loader_shuffle", images_per_group=3, seed=5),
}


def encoder() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)
    ).double()
    with torch.no_grad():
        for item in net.parameters():
            item.copy_(torch.randn(item.shape, generator=generator, dtype=torch.float64))
    return convert_norms(net, "BN")


def encoded(
    rank: int, world_size: int, mitigation: Mitigation, sizes: list[int], layout: torch.memory_format
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(features, cells) of a rank's images, and the gradients of all ranks' weights."""
    images = torch.randn(sum(sizes), 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first = sum(sizes[:rank])
    rows = torch.arange(first, first + sizes[rank])
    if mitigation.name == "loader_shuffle":
        mine = images[torch.from_numpy(mitigation.draw(sizes, 7).sources)]
    else:
        mine = images[rows]
    net = encoder()
    features = mitigation.encode(net, mine.contiguous(memory_format=layout), 7, len(rows))
    (features.square() * (1 + rows[:, None])).sum().backward()
    gradients = [item.grad.clone() for item in net.parameters() if item.grad is not None]
    for item in gradients if dist.is_initialized() else ():
        dist.all_reduce(item)
    return features.detach(), mitigation.cells(len(rows), 7), gradients


def by_cell(cells: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What each group gives when it is encoded by itself."""
    images = torch.randn(len(cells), 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net, features = encoder(), torch.empty(len(cells), 5, dtype=torch.float64)
    for cell in cells.unique():
        features[cells == cell] = net(images[cells == cell])
    (features.square() * (1 + torch.arange(len(cells))[:, None])).sum().backward()
    return features.detach(), [item.grad for item in net.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("sizes", [[12], [7, 5], [0, 12], [3, 4, 5]], ids=str)
def test_features_are_those_of_each_group_by_itself(word: str, sizes: list[int]) -> None:
    layout = torch.channels_last if sizes[0] == 7 else torch.contiguous_format
    if len(sizes) == 1:
        ranks = [encoded(0, 1, WORDS[word], sizes, layout)]
    else:
        ranks = run_ranks(encoded, len(sizes), WORDS[word], sizes, layout)
    cells = torch.cat([part for _, part, _ in ranks])
    expected, gradients = by_cell(cells)
    torch.testing.assert_close(torch.cat([part for part, _, _ in ranks]), expected, rtol=1e-9, atol=1e-9)
    for _, _, found in ranks:
        for mine, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    groups = [size for size in torch.bincount(cells).tolist() if size]
    if word == "bn":
        assert groups == [size for size in sizes if size]
    elif word == "shuffle_bn":
        assert groups == [12 // len(sizes)] * len(sizes)
    elif word == "sync_bn":
        assert groups == [12]
    elif word != "ghost_bn":
        assert groups == [3, 3, 3, 3]
    if word.startswith(SHUFFLES) and len(groups) > 1:
        assert cells.tolist() != sorted(cells.tolist())
    elif "by" not in word:
        assert cells.tolist() == sorted(cells.tolist())


def test_ghost_groups_are_those_of_ghost_bn() -> None:
    cells = Mitigation("ghost_bn", ghost_size=4).cells(7, 0)
    assert cells.tolist() == [0] * 7  # no smaller than asked for
    assert Mitigation("ghost_bn", ghost_size=3).cells(8, 0).tolist() == [0] * 4 + [1] * 4


def test_each_step_draws_anew_and_each_seed_differs() -> None:
    mitigation = Mitigation("shuffle_bn", images_per_group=3, seed=5)
    draws = [mitigation.cells(12, 0), mitigation.cells(12, 1), Mitigation("shuffle_bn", 3, seed=6).cells(12, 0)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 3
    assert torch.equal(draws[0], mitigation.cells(12, 0))


def test_the_three_shuffles_draw_the_same_groups() -> None:
    one, two, three = (Mitigation(name, 3, seed=5).cells(12, 4) for name in SHUFFLES)
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("word", ["gn", "frozen_bn", "eman"])
def test_images_alone_are_in_cells_of_their_own(word: str) -> None:
    mitigation = Mitigation(word)
    assert not mitigation.shares
    assert mitigation.cells(4, 0).tolist() == [0, 1, 2, 3]
    net = encoder().eval()
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(mitigation.encode(net, images, 0), net(images))


# -------------------------------------------------------------------------------------- words of configs


@pytest.mark.parametrize(
    ("overrides", "query", "key"),
    [
        (["model.key=same"], "4 images", "4 images"),
        (["model.images_per_group=0"], "12 images", "12 images"),
        (["model.key=sync_bn"], "4 images", "24 images"),
        (["model.key=ghost_bn", "model.norm_options.group_size=6"], "4 images", "6 images"),
        (["model.key=loader_shuffle"], "4 images", "4 images, drawn at random from 24"),
        (["model.key=shuffle_bn", "model.images_per_group=0"], "12 images", "12 images, drawn at random from 24"),
        (["model.key=eman"], "4 images", "each image alone"),
        (["model.query=gn", "model.norm_options.num_groups=8"], "each image alone", "each image alone"),
        (["model.query=frozen_bn", "model.weights=other.pt"], "each image alone", "each image alone"),
    ],
)
def test_words_of_a_config_say_what_is_normalized_together(
    make_config: MakeConfig, overrides: list[str], query: str, key: str
) -> None:
    found = describe_batch(make_config("run", *overrides), 2)
    assert found == {"total": 24, "per_rank": 12, "normalization": {"query": query, "key": key}}


MLP = ["model.method=simclr", "model.head=mlp"]  # the only batch norms that a ViT has are the head's


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.norm_options.momentun=1"], r"model\.norm_options: .*no option 'momentun'"),
        (
            ["model.backbone=vit_b_16", *MLP, "model.norm_options.x=1"],
            r"model\.norm_options: .*norm BN has no option 'x'",
        ),
        (["model.key=eman", "model.norm_options={momentum: null}"], r"model\.norm_options\.momentum: null"),
        (["model.freeze=[query.backbone]"], r"model\.freeze: freezing random weights"),
    ],
)
def test_what_the_network_cannot_have_is_told(make_config: MakeConfig, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_contrastive(make_config("run", *overrides))


@pytest.mark.parametrize(
    ("query", "key", "make", "words"),
    [
        ("bn", "gn", SimCLR, "bn and gn are different networks"),
        ("frozen_bn", "shuffle_bn", SimCLR, "frozen_bn and shuffle_bn are different networks"),
        ("bn", "eman", SimCLR, "eman is of the momentum encoder"),
        ("eman", "bn", SimCLR, "eman is of the momentum encoder"),
        ("bn", "eman", partial(MoCo, feature_dim=4, queue_size=8), "eman never sees a batch"),
    ],
)
def test_methods_refuse_words_that_do_not_go_together(query: str, key: str, make: Any, words: str) -> None:
    encoder = Encoder(nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match=words):
        make(encoder, Mitigation(query), Mitigation(key), 0.1)
