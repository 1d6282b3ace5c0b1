"""Seeds, optimizer groups and the checks before the first step."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.config.schema import OptimizerConfig
from leakfree.errors import CheckpointError, ConfigError
from leakfree.norms import build_norm
from leakfree.schedules import Epochs
from leakfree.training.detection import DetectionTask
from leakfree.training.module import TrainingModule, build_optimizer, freeze_as_trained, seed_step


def draws(*key):
    seed_step(*key)
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_the_randomness_of_a_step_is_a_function_of_seed_step_and_rank():
    assert draws(0, 5, 1) == draws(0, 5, 1)
    seen = [draws(*key) for key in ((0, 5, 1), (1, 5, 1), (0, 6, 1), (0, 5, 0), (0, 1, 5))]
    assert all(len(set(column)) == len(seen) for column in zip(*seen, strict=True))


def test_norm_parameters_have_a_decay_of_their_own_and_frozen_ones_are_left_out():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), build_norm("BN", 8), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.LayerNorm(8)
    )
    model[3].requires_grad_(False)
    config = OptimizerConfig(name="sgd", lr=0.1, momentum=0.8, weight_decay=0.01, weight_decay_norm=0.0)
    weights, norms = build_optimizer(model, config).param_groups
    assert weights["params"] == list(model[0].parameters())
    assert norms["params"] == [*model[1].parameters(), *model[2].parameters(), *model[4].parameters()]
    assert (weights["weight_decay"], norms["weight_decay"], weights["momentum"]) == (0.01, 0.0, 0.8)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="every weight is frozen"):
        build_optimizer(model, config)


def test_freezing_a_model_without_batch_norm_is_told_before_training(make_config):
    settings = ["model.box_head.norm=none", "model.mask_head.norm=none", "schedule.freeze_bn_at=0.5"]
    config = make_config("run", *settings)
    with pytest.raises(ConfigError, match="the model has no batch norm to freeze"):
        TrainingModule(DetectionTask(config, ""), config)


@pytest.mark.parametrize(
    ("at", "unit", "expected"),
    [(0.5, "share", 0.5), (3, "step", 3), (1.0, "step", 1), (1.5, "epoch", Epochs(1.5)), (1, "share", 1.0)],
)
def test_the_freeze_point_is_of_its_unit(make_config, at, unit, expected):
    config = make_config("run", f"schedule.freeze_bn_at={at}", f"schedule.freeze_bn_unit={unit}")
    module = TrainingModule(DetectionTask(config, ""), config)
    assert module.freeze_bn.at == expected
    assert type(module.freeze_bn.at) is type(expected)


def test_epochs_that_the_run_does_not_reach_are_a_warning(make_config, caplog):
    config = make_config("run", "schedule.freeze_bn_at=900", "schedule.freeze_bn_unit=epoch")
    with caplog.at_level("WARNING"):
        TrainingModule(DetectionTask(config, ""), config)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "schedule.freeze_bn_at: has no effect: the run ends after" in line
    assert "before epoch 900" in line


def test_a_foreign_checkpoint_cannot_be_resumed(make_config):
    config = make_config()
    module = TrainingModule(DetectionTask(config, ""), config)
    with pytest.raises(CheckpointError, match="not written by a leakfree training"):
        module.on_load_checkpoint({"state_dict": {}})


def test_weights_without_a_history_freeze_nothing():
    model = nn.Sequential(build_norm("BN", 2))
    freeze_as_trained(model, {"state_dict": {}})
    assert not model[0].frozen
    entry = {"format": 1, "step": 4, "seconds": 1.0, "world_size": 1, "config": {}, "rank_buffers": [{}]}
    freeze_as_trained(model, {"leakfree": {**entry, "freeze_bn": {"frozen_at": 3, "layers": ["0"]}}})
    assert model[0].frozen


def test_only_the_proxy_of_a_proxy_norm_decays():
    """Labatie et al. 2021: weight decay for the proxy's shift and scale, none for the norm's weight and bias."""
    proxy = build_norm("ProxyNorm", 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), proxy, nn.Conv2d(4, 4, 3), build_norm("BN", 4))
    config = OptimizerConfig(weight_decay=0.3, weight_decay_norm=0.2)
    decay = {
        id(item): group["weight_decay"]
        for group in build_optimizer(model, config).param_groups
        for item in group["params"]
    }
    assert len(decay) == len(list(model.parameters()))
    assert {decay[id(item)] for item in proxy.proxy_parameters()} == {0.3}
    assert {decay[id(item)] for item in (proxy.weight, proxy.bias)} == {0.0}
    assert {decay[id(item)] for item in model[3].parameters()} == {0.2}
    assert {decay[id(item)] for index in (0, 2) for item in model[index].parameters()} == {0.3}
