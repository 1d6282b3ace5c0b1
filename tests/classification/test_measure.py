"""One classifier under several statistics: the numbers, what they leave alone, and a leak that they show."""

import collections
import copy

import pytest
import torch

from leakfree.classification import (
    build_classifier,
    classify,
    composed_batches,
    estimate_statistics,
    evaluate_classifier,
    training_batches,
    validation_accuracies,
)
from leakfree.config import load_config
from leakfree.data import build_images
from leakfree.training.classification import ClassificationTask
from tests.ranks import run_ranks


def images_of(config):
    return {split: build_images(config.data, split) for split in ("train", "val")}


def trained(config, steps):
    """A model after some steps of a plain loop."""
    torch.manual_seed(0)
    task = ClassificationTask(config)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.05, momentum=0.9)
    task.model.train()
    for batch in training_batches(config, task.images["train"], max_steps=steps):
        optimizer.zero_grad()
        task.losses(batch)["loss_classifier"].backward()
        optimizer.step()
    return task.model


def test_every_number_is_there_and_the_model_is_untouched(make_config):
    config = make_config()
    model, images = trained(config, 3), images_of(make_config())
    model.eval()
    model.fc.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = evaluate_classifier(model, config, images)
    assert list(found.results) == ["population", "precise", "random", "same_class"]
    assert all(0 < values["accuracy"] < 1 for values in found.results.values())
    gap = found.leakage["composition"]
    assert gap["leak"] == pytest.approx(gap["population"] - gap["same_class"])
    assert gap["population"] == pytest.approx(1 - found.results["precise"]["accuracy"])
    assert gap["random"] == pytest.approx(1 - found.results["random"]["accuracy"])
    assert set(found.leakage["influence"]) == {"within_class", "between_classes", "total"}
    assert 0 < found.leakage["influence"]["total"] < 1
    assert found.notes == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.fc.training) == (False, True)
    assert evaluate_classifier(model, config, images) == found


def test_accuracies_are_those_of_a_plain_loop(make_config):
    config = make_config()
    model, images = trained(config, 3).eval(), images_of(config)
    right = seen = 0
    with torch.no_grad():
        for batch in composed_batches(config, images["val"], "random", 160):
            right += int((classify(model, batch).argmax(1) == batch[1]).sum())
            seen += len(batch[1])
    assert seen == 160
    found = evaluate_classifier(model, config, images)
    assert found.results["population"]["accuracy"] == pytest.approx(right / 160)
    curves = validation_accuracies(model, config, images)
    assert curves["val_accuracy/population"] == found.results["population"]["accuracy"]
    assert curves["val_accuracy/same_class"] == found.results["same_class"]["accuracy"]
    estimate_statistics(model, config, images["train"])
    again = evaluate_classifier(model, config, images)
    assert again.results["population"] == again.results["precise"] == found.results["precise"]


def test_images_that_are_left_out_are_spread_over_the_classes(make_config):
    config = make_config("run", "evaluation.max_images=40")
    images = images_of(config)["val"]
    order = torch.cat([batch[1] for batch in composed_batches(config, images, "random", 40)])
    assert len(order) == 40
    assert len(order.unique()) > 6


def test_an_image_without_another_of_its_class_is_in_no_batch_of_one_class(make_config):
    config = make_config("run", "evaluation.max_images=12")
    images = images_of(config)["val"]
    batches = {
        composition: [batch[1].tolist() for batch in composed_batches(config, images, composition, 12)]
        for composition in ("random", "same_class")
    }
    assert sum(map(len, batches["random"])) == 12
    counts = collections.Counter(label for batch in batches["random"] for label in batch)
    assert 1 in counts.values()
    assert sorted(map(len, batches["same_class"])) == sorted(count for count in counts.values() if count > 1)


def test_only_what_is_asked_for_is_measured(make_config):
    config = make_config("run", "evaluation.statistics=[population]", "leakage.enabled=false")
    said = []
    found = evaluate_classifier(
        trained(config, 1), config, images_of(config), track=lambda batches, what: said.append(what) or batches
    )
    assert list(found.results) == ["population"]
    assert found.leakage == {}
    assert said == ["accuracy under population statistics"]


@pytest.mark.parametrize("norm", ["GN", "FrozenBN"])
def test_a_batch_independent_model_is_certified_and_has_one_answer(make_config, norm):
    options = ["model.norm_options={num_groups: 8}"] if norm == "GN" else []
    config = make_config("run", f"model.norm={norm}", *options)
    found = evaluate_classifier(trained(config, 2), config, images_of(config))
    assert found.results["random"] == found.results["same_class"] == {}
    assert found.results["precise"] == found.results["population"]
    assert found.leakage["influence"]["total"] == 0.0
    assert found.leakage["composition"]["leak"] == 0.0
    assert found.notes[0] == "random, same_class: n.a., the model has no batch statistics"


def test_batches_of_one_class_leak_and_shuffled_groups_do_not(make_config):
    """Methods 21, M1: errors on one-class batches far below those under population statistics, or far above."""
    settings = ["data.composition=same_class", "evaluation.max_images=0", "evaluation.precise_images=800"]
    leaks = {}
    for norm in ("BN", "ShuffleBN"):
        config = make_config("run", f"model.norm={norm}", *settings)
        found = evaluate_classifier(trained(config, 60), config, images_of(config))
        leaks[norm] = found.leakage["composition"]["leak"]
    assert leaks["BN"] > 0.1
    assert leaks["ShuffleBN"] < -0.1


def _evaluated(rank, world_size, config_file, norm):
    config = load_config(config_file, [f"model.norm={norm}", "evaluation.max_images=150"])
    torch.manual_seed(0)
    model = build_classifier(config, 10, ["none"]).double()
    return evaluate_classifier(model, config, images_of(config))


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "LN"])
def test_numbers_do_not_depend_on_the_number_of_ranks(config_file, norm):
    alone = _evaluated(0, 1, config_file, norm)
    first, second = run_ranks(_evaluated, 2, config_file, norm)
    assert first == second
    assert first.results == alone.results
    for group, values in alone.leakage.items():
        assert first.leakage[group] == pytest.approx(values, abs=1e-9)
