"""A classifier in a domain that it was not trained on: statistics of the target, and mixtures of domains."""

import copy

import numpy as np
import pytest
import torch

from leakfree.classification import build_classifier, classify, composed_batches, evaluate_classifier
from leakfree.classification import validation_accuracies as curves_of
from leakfree.classification.batches import evaluated_images
from leakfree.config import load_config
from leakfree.data import build_images
from leakfree.norms import BatchNormEmbeddings
from leakfree.population import recompute_statistics
from leakfree.records import read_metrics
from leakfree.training import train
from leakfree.training.classification import ClassificationTask
from tests.ranks import run_ranks

TARGET = ["evaluation.statistics=[population,target]", "leakage.enabled=false"]
EMBEDDINGS = [
    "model.norm=DomainBN",
    "data.train.corruptions=[none, invert]",
    "data.val.corruptions=[blur]",
    "evaluation.statistics=[embeddings]",
]


def images_of(config):
    return {split: build_images(config.data, split) for split in ("train", "val")}


def built(config, seed=0):
    """A model whose statistics are those of some training images."""
    torch.manual_seed(seed)
    model = ClassificationTask(config).model.double().eval()
    batches = composed_batches(config, images_of(config)["train"], "random", 160)
    recompute_statistics(model, batches, forward=classify, progress=False)
    return model


def accuracy(model, batches):
    right = seen = 0
    with torch.no_grad():
        for batch in batches:
            right += int((classify(model, batch).argmax(1) == batch[1]).sum())
            seen += len(batch[1])
    return right / seen


def test_target_is_what_recomputed_statistics_give_of_each_corruption_by_itself(make_config):
    config = make_config("run", *TARGET, "data.val.corruptions=[contrast, invert]", "evaluation.max_images=101")
    model, images = built(config), images_of(config)
    before, torch_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = evaluate_classifier(model, config, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    right = 0.0
    for corruption in ("contrast", "invert"):
        twin, batches = copy.deepcopy(model), composed_batches(config, images["val"], "random", 101, corruption)
        kinds = {images["val"].domains[int(index)] for batch in batches for index in batch[2]}
        assert kinds == {corruption}
        recompute_statistics(twin, batches, layerwise=True, forward=classify, progress=False)
        right += accuracy(twin, batches) * len(evaluated_images(images["val"], 101, corruption))
    assert found.results["target"]["accuracy"] == pytest.approx(right / 101)
    assert found.results["target"] != found.results["population"]
    assert found.notes == []


def test_the_images_of_a_corruption_are_a_part_of_those_that_are_evaluated(make_config):
    config = make_config("run", "data.val.corruptions=[contrast, invert, none]")
    images = images_of(config)["val"]
    parts = [evaluated_images(images, 50, name) for name in ("contrast", "invert", "none")]
    assert sorted(np.concatenate(parts)) == sorted(evaluated_images(images, 50))
    assert len(evaluated_images(images)) == len(images)


def test_the_share_of_the_source_blends_the_statistics(make_config):
    """Half: the mean of both in the first layer; almost all: what is stored."""
    settings = [*TARGET, "data.val.corruptions=[invert]"]
    results = {}
    for share in (0.0, 0.5, 0.999999):
        config = make_config("run", *settings, f"evaluation.source_share={share}")
        results[share] = evaluate_classifier(built(config), config, images_of(config)).results
    assert results[0.999999]["target"] == results[0.0]["population"]
    config = make_config("run", *settings)
    model, images = built(config), images_of(config)["val"]
    recompute_statistics(
        model,
        composed_batches(config, images, "random", 160),
        source_samples=160,
        layerwise=True,
        forward=classify,
        progress=False,
    )
    expected = accuracy(model, composed_batches(config, images, "random", 160))
    assert results[0.5]["target"]["accuracy"] == pytest.approx(expected)
    assert results[0.5] != results[0.0]


def test_fewer_images_for_the_statistics_than_for_the_accuracy(make_config):
    config = make_config("run", *TARGET, "data.val.corruptions=[invert]", "evaluation.target_images=40")
    model, images = built(config), images_of(config)
    found = evaluate_classifier(model, config, images)
    batches = composed_batches(config, images["val"], "random", 40)
    recompute_statistics(model, batches, layerwise=True, forward=classify, progress=False)
    expected = accuracy(model, composed_batches(config, images["val"], "random", 160))
    assert found.results["target"]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("norm", ["LN", "FrozenBN"])
def test_a_model_without_statistics_to_re_estimate_says_so(make_config, norm):
    config = make_config("run", f"model.norm={norm}", *TARGET)
    torch.manual_seed(0)
    found = evaluate_classifier(build_classifier(config, 10, ["none"]), config, images_of(config))
    assert found.results["target"] == found.results["population"] != {}
    assert any(note.startswith("target: no statistics to re-estimate") for note in found.notes)


def test_embeddings_are_the_mixture_of_the_known_domains(make_config):
    config = make_config("run", *EMBEDDINGS)
    model, images = built(config), images_of(config)
    before = copy.deepcopy(model.state_dict())
    found = evaluate_classifier(model, config, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    mixed, right = BatchNormEmbeddings(model).eval(), 0
    with torch.no_grad():
        for batch in composed_batches(config, images["val"], "random", 160):
            right += int((mixed(batch[0].double()).argmax(1) == batch[1]).sum())
    assert found.results == {"embeddings": {"accuracy": pytest.approx(right / 160)}}
    assert set(found.leakage) == {"influence"}
    assert found.notes == ["composition: n.a., DomainBN does not know a corruption of the validation images"]
    assert curves_of(model, config, images) == {"val_accuracy/embeddings": found.results["embeddings"]["accuracy"]}


def test_all_statistics_of_a_domain_norm_where_the_domains_are_known(make_config):
    statistics = "[population, precise, random, same_class, target, embeddings]"
    config = make_config("run", *EMBEDDINGS[:2], "data.val.corruptions=[invert]", f"evaluation.statistics={statistics}")
    found = evaluate_classifier(built(config), config, images_of(config))
    assert list(found.results) == ["population", "precise", "random", "same_class", "target", "embeddings"]
    assert all(0 <= values["accuracy"] <= 1 for values in found.results.values())
    assert set(found.leakage) == {"composition", "influence"}


def test_a_run_on_unknown_domains_leaves_its_curve(make_config, tmp_path):
    record = train(make_config("run", *EMBEDDINGS, "trainer.eval_period=4"))
    assert list(record.results) == ["embeddings"]
    curve = [row["val_accuracy/embeddings"] for row in read_metrics(tmp_path / "run") if len(row) < 5]
    assert len(curve) == 1
    assert 0 <= curve[0] <= 1


def _evaluated(rank, world_size, config_file, settings):
    config = load_config(config_file, [*settings, "evaluation.max_images=150", "leakage.enabled=false"])
    torch.manual_seed(0)
    domains = list(config.data.train.corruptions)
    model = build_classifier(config, 10, domains).double()
    return evaluate_classifier(model, config, images_of(config))


@pytest.mark.parametrize(
    "settings",
    [
        ["model.norm=BN", "data.val.corruptions=[contrast]", *TARGET],
        ["model.norm=SyncBN", "data.val.corruptions=[contrast, none]", *TARGET, "evaluation.source_share=0.3"],
        EMBEDDINGS,
    ],
    ids=["BN", "SyncBN", "embeddings"],
)
def test_numbers_do_not_depend_on_the_number_of_ranks(config_file, settings):
    alone = _evaluated(0, 1, config_file, settings)
    first, second = run_ranks(_evaluated, 2, config_file, settings)
    assert first == second
    assert first.results == alone.results
