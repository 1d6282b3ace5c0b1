import copy
import math

import pytest
import torch

from leakfree.data import build_dataset, build_train_loader
from leakfree.detection import build_detector, evaluate_detector, training_targets
from leakfree.detection.measure import _precise_statistics
from tests.ranks import run_ranks


def _train(config, datasets, steps):
    """A detector trained ``steps`` steps in one process."""
    torch.manual_seed(0)
    model = build_detector(config, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = build_train_loader(datasets["train"], config.data, images_per_rank=4, max_steps=steps)
    for step, (images, targets) in enumerate(loader):
        torch.manual_seed(step)
        optimizer.zero_grad()
        sum(model(images, training_targets(targets)).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return model


def _evaluate(rank, world_size, config, steps=6, weights=None):
    """The evaluation over all ranks of a detector with ``weights``, or trained a few steps in one process."""
    datasets = {split: build_dataset(config.data, split) for split in ("train", "val")}
    if weights is not None or world_size > 1:
        torch.manual_seed(0)
        model = build_detector(config, 10)
        model.load_state_dict(weights or model.state_dict())
    else:
        model = _train(config, datasets, steps)
    modes = {module: module.training for module in model.modules()}
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    evaluation = evaluate_detector(model, config, datasets)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training == training for module, training in modes.items())
    assert torch.equal(random_state, torch.get_rng_state())
    return evaluation


def test_every_number_of_a_leaky_detector_is_there_and_the_model_is_untouched(make_config):
    config = make_config("BN")
    config.model.images_per_group = 1
    evaluation = _evaluate(0, 1, config)
    assert list(evaluation.results) == ["population", "precise", "image", "random"]
    for metrics in evaluation.results.values():
        assert 0 <= metrics["bbox/AP"] <= 1
        assert 0 <= metrics["segm/AP"] <= 1
    for split in ("train", "val"):
        accuracies = evaluation.leakage[f"roi_accuracy/{split}"]
        assert set(accuracies) == {"population", "precise", "image", "random"}
        assert all(0 <= value <= 1 for value in accuracies.values())
    influence = evaluation.leakage["influence"]
    assert influence["within_image"] > 0
    assert influence["between_images"] == 0.0  # groups of one image
    assert set(evaluation.leakage["pairs"]) == {"same_class", "random_pair"}
    assert not evaluation.notes


@pytest.mark.parametrize("images_per_group", [1, 2])
def test_results_do_not_depend_on_the_number_of_ranks(make_config, images_per_group):
    config = make_config("BN")
    config.model.images_per_group = images_per_group
    config.evaluation.images_per_batch = 2
    weights = _train(config, {"train": build_dataset(config.data, "train")}, 40).state_dict()
    weights["roi_heads.box_predictor.cls_score.bias"][0] -= 2  # less background: accuracies that can disagree
    one = _evaluate(0, 1, config, weights=weights)
    assert len({one.results[mode]["bbox/AP"] for mode in ("population", "image", "random")}) > 1
    assert max(one.leakage["roi_accuracy/train"].values()) > 0.05
    assert min(one.results[mode]["bbox/AP"] for mode in ("population", "image", "random")) > 0.02
    # "precise" is left out: its statistics come from RoIs that each rank draws for itself
    exact = ("population", "image", "random")
    for other in run_ranks(_evaluate, 2, config, 0, weights):
        for mode in exact:
            assert other.results[mode] == pytest.approx(one.results[mode], abs=1e-6), mode
        for name in ("roi_accuracy/train", "roi_accuracy/val"):
            for mode in exact:
                assert other.leakage[name][mode] == pytest.approx(one.leakage[name][mode], abs=1e-6), (name, mode)
        assert other.leakage["influence"] == pytest.approx(one.leakage["influence"], abs=1e-6)


def test_a_batch_independent_head_is_certified_and_has_one_answer(make_config):
    evaluation = _evaluate(0, 1, make_config("GN", norm_options={"num_groups": 4}))
    assert evaluation.leakage["influence"] == {"within_image": 0.0, "between_images": 0.0, "total": 0.0}
    assert evaluation.results["image"] == evaluation.results["random"] == {}
    assert evaluation.results["precise"] == evaluation.results["population"]
    assert evaluation.leakage["pairs"] == {"same_class": None, "random_pair": None}
    assert "no batch statistics" in evaluation.notes[0]


@pytest.mark.parametrize("options", [{"norm": "SyncBN"}, {"norm": "BN", "roi_shuffle": "features"}])
def test_heads_that_synchronize_are_measured_on_two_ranks_without_a_hang(make_config, options):
    for evaluation in run_ranks(_evaluate, 2, make_config(**options)):
        assert evaluation.leakage["influence"]["between_images"] > 0
        assert all(math.isfinite(value) for value in evaluation.leakage["roi_accuracy/val"].values())


def test_leakage_numbers_can_be_left_out(make_config):
    config = make_config("BN")
    config.leakage.enabled, config.evaluation.statistics = False, ["population"]
    config.model.mask_head.enabled = False
    evaluation = _evaluate(0, 1, config, steps=1)
    assert evaluation.leakage == {}
    assert "segm/AP" not in evaluation.results["population"]


def test_under_precise_statistics_only_the_roi_heads_differ(make_config):
    config = make_config("BN")
    config.model.backbone.norm = "BN"
    datasets = {split: build_dataset(config.data, split) for split in ("train", "val")}
    model = _train(config, datasets, 3)
    before = copy.deepcopy(model.state_dict())
    with _precise_statistics(model, config, datasets["train"]):
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.startswith("roi_heads.") and "running_" in key for key in changed)


def test_asking_for_precise_alone_answers_for_a_head_without_statistics(make_config):
    config = make_config("GN", norm_options={"num_groups": 4})
    config.evaluation.statistics = ["precise"]
    evaluation = _evaluate(0, 1, config, steps=1)
    assert evaluation.results["precise"]["bbox/AP"] is not None
    assert any(note.startswith("precise:") for note in evaluation.notes)
