"""The pretext swap finds a planted leak and clears what has none; evaluations change nothing and agree over ranks."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leakfree.config import ContrastiveRunConfig, load_config
from leakfree.contrastive import (
    ContrastiveMethod,
    PretextSwap,
    build_contrastive,
    estimate_statistics,
    evaluate_contrastive,
    measure,
    pretext_swap,
    validate,
)
from leakfree.contrastive.measure import _dealt, _few_label_knn
from leakfree.data import build_images
from leakfree.errors import DataError
from leakfree.evaluation import Features
from leakfree.partition import current_scope
from tests.contrastive.conftest import MakeConfig
from tests.ranks import run_ranks


class Signature(nn.Module):
    """An encoder that tells the group from the group's mean, and little of the image."""

    def __init__(self, own: float = 0.05) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 12 * 12, 16, generator=torch.Generator().manual_seed(0)))
        self.own = own

    def forward(self, images: Tensor) -> Tensor:
        z = images.flatten(1) @ self.weight.to(images.dtype)
        scope = current_scope()
        groups = None if scope is None or scope.base is None else scope.base.groups
        groups = torch.zeros(len(z), dtype=torch.int64) if groups is None else groups
        means = torch.stack([z[groups == group].mean(0) for group in range(int(groups.max()) + 1)])[groups]
        return F.normalize(means + self.own * z - z.mean(0), dim=1)


def planted(config: ContrastiveRunConfig) -> ContrastiveMethod:
    model = build_contrastive(config)
    model.query, model.key = Signature(), Signature()  # type: ignore[assignment]
    return model.eval()


# --------------------------------------------------------------------------------------- pretext swap


def test_a_planted_leak_is_found_and_a_shuffle_removes_it(make_config: MakeConfig) -> None:
    found = {}
    for key in ("bn", "shuffle_bn"):
        config = make_config("run", f"model.key={key}", "leakage.max_images=480")
        found[key] = pretext_swap(planted(config), config, build_images(config.data, "val"))
    leaky, clean = found["bn"], found["shuffle_bn"]
    assert leaky.gap == leaky.same - leaky.other > 0.3
    assert leaky.moved > 0.5
    assert leaky.loss < clean.loss
    assert abs(clean.gap) < 0.1
    assert leaky.query_probe is not None
    assert leaky.query_probe > 0.9
    assert leaky.key_probe is not None
    assert leaky.key_probe > 0.9


GN = ["model.query=gn", "model.norm_options.num_groups=8"]


@pytest.mark.parametrize("words", [GN, [*GN, "model.method=simclr"], ["model.key=eman"]], ids=str)
def test_where_nothing_is_shared_the_gap_is_exactly_zero(make_config: MakeConfig, words: list[str]) -> None:
    config = make_config("run", *words)
    model = build_contrastive(config)
    found = pretext_swap(model, config, build_images(config.data, "val"))
    assert found.gap == 0.0
    assert found.moved < 1e-6
    assert found.key_probe is None
    assert (found.query_probe is None) == (words[: len(GN)] == GN)
    assert 0 < found.same <= 1


@given(st.integers(2, 12), st.integers(2, 40), st.integers(0, 99))
def test_rows_are_dealt_each_once_and_one_of_m_mates_stays(count: int, total: int, seed: int) -> None:
    dealt = _dealt(count, total, np.random.default_rng(seed))
    assert dealt.shape == (count, total)
    assert sorted(dealt.ravel().tolist()) == list(range(count * total))
    for rows in dealt:
        from_batch = np.bincount(rows // total, minlength=count)
        assert from_batch.max() <= math.ceil(total / count)
        assert from_batch.min() >= total // count


def swapped(rank: int, world_size: int, config_file: Path, overrides: list[str]) -> PretextSwap:
    config = load_config(config_file, overrides)
    assert isinstance(config, ContrastiveRunConfig)
    torch.manual_seed(0)
    model = build_contrastive(config).double()
    return pretext_swap(model, config, build_images(config.data, "val"))


@pytest.mark.parametrize("key", ["bn", "sync_bn", "shuffle_bn", "loader_shuffle", "eman"])
def test_ranks_find_what_one_process_finds(config_file: Path, key: str) -> None:
    words = [f"model.key={key}", "model.images_per_group=6", "leakage.max_images=192"]
    expected = swapped(0, 1, config_file, words)
    assert expected.query_probe is not None
    for world_size in (2, 3) if key == "loader_shuffle" else (2,):
        for found in run_ranks(swapped, world_size, config_file, words):
            assert (found.key_probe is None) == (key == "eman")
            assert numbers(found) == pytest.approx(numbers(expected), rel=1e-6, abs=1e-9)


def numbers(found: PretextSwap) -> dict[str, float]:
    return {name: value for name, value in asdict(found).items() if value is not None}


def test_the_shuffles_are_one_measure(config_file: Path) -> None:
    one, two, three = (
        asdict(swapped(0, 1, config_file, [f"model.key={key}"]))
        for key in ("shuffle_bn", "shuffle_images", "loader_shuffle")
    )
    assert one == pytest.approx(two, rel=1e-9)
    assert one == pytest.approx(three, rel=1e-9)
    assert asdict(swapped(0, 1, config_file, ["model.key=bn"]))["moved"] != pytest.approx(one["moved"])


@pytest.mark.parametrize("method", ["moco", "simclr"])
def test_measuring_changes_nothing(make_config: MakeConfig, method: str) -> None:
    config = make_config("run", f"model.method={method}", "model.key=shuffle_bn")
    images = {part: build_images(config.data, part) for part in ("train", "val")}  # type: ignore[arg-type]
    model = build_contrastive(config)
    model.query.backbone.eval()  # a mode of its own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    one, two = (evaluate_contrastive(model, config, images) for _ in range(2))
    assert one == two
    validate(model, config, images)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(item.grad is None for item in model.parameters())


def test_too_few_images_for_a_swap(make_config: MakeConfig) -> None:
    config = make_config("run", "leakage.max_images=47")
    images = {part: build_images(config.data, part) for part in ("train", "val")}  # type: ignore[arg-type]
    model = build_contrastive(config)
    with pytest.raises(DataError, match=r"needs two batches of 24 images .*leakage\.max_images=47"):
        pretext_swap(model, config, images["val"])
    found = evaluate_contrastive(model, config, images)
    assert set(found.leakage) == {"influence"}
    assert any(note.startswith("pretext: n.a., the swap") for note in found.notes)


# ---------------------------------------------------------------------------------------- evaluation


def test_influence_is_zero_where_nothing_is_shared_and_stays_in_groups(make_config: MakeConfig) -> None:
    for words, within in ((GN, False), ([], True)):
        config = make_config("run", *words)
        images = {part: build_images(config.data, part) for part in ("train", "val")}  # type: ignore[arg-type]
        influence = evaluate_contrastive(build_contrastive(config), config, images).leakage["influence"]
        assert influence["between_groups"] == 0.0
        assert (influence["within_group"] > 0.05) is within  # type: ignore[operator]
        assert influence["total"] == influence["within_group"]


def test_precise_without_statistics_is_population_and_says_so(make_config: MakeConfig) -> None:
    config = make_config("run", *GN, "evaluation.statistics=[precise]")
    images = {part: build_images(config.data, part) for part in ("train", "val")}  # type: ignore[arg-type]
    found = evaluate_contrastive(build_contrastive(config), config, images)
    assert list(found.results) == ["precise"]
    assert found.notes == ["precise: no statistics to re-estimate (none, or frozen), so it is population"]


def statistics(rank: int, world_size: int, config_file: Path, key: str, layers: str) -> dict[str, Tensor]:
    config = load_config(config_file, [f"model.key={key}", "evaluation.precise_images=100"])
    assert isinstance(config, ContrastiveRunConfig)
    torch.manual_seed(0)
    model = build_contrastive(config).double()
    estimate_statistics(model, config, build_images(config.data, "train"), layers=layers)
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("key", ["bn", "loader_shuffle"])
def test_precise_statistics_are_the_same_on_any_ranks(config_file: Path, key: str) -> None:
    expected = statistics(0, 1, config_file, key, "all")
    for found in run_ranks(statistics, 2, config_file, key, "all"):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


def test_precise_statistics_of_the_queries_leave_the_keys_alone(config_file: Path) -> None:
    everything, mine = (statistics(0, 1, config_file, "bn", layers) for layers in ("all", "query"))
    for name, value in mine.items():
        if name.startswith("query."):
            torch.testing.assert_close(value, everything[name])
        else:
            assert value.unique().tolist() == [float(name.endswith("var"))]  # as built
            assert not torch.equal(value, everything[name])


def test_a_teacher_that_follows_its_student_is_not_estimated(config_file: Path) -> None:
    """Its statistics are the student's by the next steps, whatever its own batches have."""
    found, own = (statistics(0, 1, config_file, key, "all") for key in ("eman", "bn"))
    for name, value in found.items():
        if name.startswith("key."):
            assert value.unique().tolist() == [float(name.endswith("var"))]  # as built
        else:
            torch.testing.assert_close(value, own[name])


def test_validate_is_a_point_of_the_curves(make_config: MakeConfig) -> None:
    config = make_config("run")
    images = {part: build_images(config.data, part) for part in ("train", "val")}  # type: ignore[arg-type]
    row = validate(build_contrastive(config), config, images)
    assert set(row) == {"knn", "linear", "pretext/same", "pretext/other"}
    off = make_config("run", "leakage.enabled=false")
    assert set(validate(build_contrastive(off), off, images)) == {"knn", "linear"}


def test_large_features_lie_in_a_file_while_they_are_judged(make_config: MakeConfig, monkeypatch: Any) -> None:
    config = make_config("run")
    model = build_contrastive(config)
    images = {split: build_images(config.data, split) for split in ("train", "val")}
    plain = evaluate_contrastive(model, config, images)
    seen = []
    real = measure.extract_features

    def watching(*args: Any, **options: Any) -> Any:
        seen.append(options["folder"])
        return real(*args, **options)

    monkeypatch.setattr(measure, "extract_features", watching)
    monkeypatch.setattr(measure, "_IN_MEMORY", 1000)
    mapped = evaluate_contrastive(model, config, images)
    assert mapped.results == plain.results
    folder = Path(config.output_dir) / "features"
    assert set(seen) == {folder}
    assert not folder.exists()


def test_few_labels_of_few_classes_and_without_faiss(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("run", "evaluation.few_labels=2", "evaluation.backend=torch")
    monkeypatch.setitem(sys.modules, "faiss", None)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    bank = Features(x.repeat(3, 1), torch.tensor([0, 1]).repeat(3))
    assert _few_label_knn(config, bank, Features(x, torch.tensor([0, 1]))) == 1  # 4 labels, 5 neighbours asked
    assert _few_label_knn(config, Features(bank.x[:3], bank.y[:3]), bank) is None


def test_features_that_are_zero_are_told_and_end_nothing(make_config: MakeConfig, caplog: Any) -> None:
    config = make_config("run")
    model = build_contrastive(config)
    images = {split: build_images(config.data, split) for split in ("train", "val")}
    with torch.no_grad():
        for parameter in model.query.backbone.parameters():
            parameter.zero_()  # every ReLU is dead
    row = validate(model, config, images)
    assert row["knn"] is None
    assert row["linear"] is None
    assert "zero" in caplog.text
    found = evaluate_contrastive(model, config, images)
    assert all(numbers == {} for numbers in found.results.values())
    assert any("n.a." in note and "zero" in note for note in found.notes)
