"""Classifiers by name, their norms and groups, and what is told of wrong ones."""

import pytest
import torch
import torchvision
from torch import nn

from leakfree.classification import build_classifier, classify, describe_batch
from leakfree.config import load_config
from leakfree.errors import ConfigError
from leakfree.norms import CrossIterationBatchNorm, DomainBatchNorm, ProxyNorm
from tests.ranks import run_ranks


def build(config, domains=("none",), num_classes=10):
    torch.manual_seed(0)
    return build_classifier(config, num_classes, list(domains))


def images(count=16, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return torch.rand(count, 3, size, size, generator=generator), labels, torch.zeros(count, dtype=torch.int64)


def test_a_resnet_has_torchvision_s_names_weights_and_outputs(make_config):
    model = build(make_config("run", "model.name=resnet18", "model.images_per_group=0"), num_classes=7)
    torch.manual_seed(0)
    expected = torchvision.models.resnet18(num_classes=7)
    assert {name: value.tolist() for name, value in model.state_dict().items() if "bn1" in name or "fc" in name} == {
        name: value.tolist() for name, value in expected.state_dict().items() if "bn1" in name or "fc" in name
    }
    assert list(model.state_dict()) == list(expected.state_dict())
    batch = images(4, 32)
    for mode in (True, False):
        assert torch.equal(classify(model.train(mode), batch), expected.train(mode)(batch[0]))


@pytest.mark.parametrize("size", [4, 8, 13])
def test_the_small_network_takes_any_size(make_config, size):
    assert classify(build(make_config()), images(16, size)).shape == (16, 10)


def test_consecutive_images_share_statistics_in_training_only(make_config):
    model, batch = build(make_config()), images(16)
    model.train()
    together = classify(model, batch)
    parts = [classify(model, tuple(part[rows] for part in batch)) for rows in (slice(0, 8), slice(8, 16))]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-5)
    model.eval()
    torch.testing.assert_close(classify(model, batch)[:1], classify(model, tuple(part[:1] for part in batch)))


def _outputs(rank, world_size, config_file, overrides):
    config = load_config(config_file, overrides)
    model = build(config).double().train()
    share = 24 // world_size
    mine = tuple(part[rank * share : (rank + 1) * share] for part in images(24))
    return classify(model, mine).detach()


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "ShuffleBN"])
def test_groups_span_ranks_as_in_one_process(config_file, norm):
    settings = [f"model.norm={norm}", "trainer.total_batch_size=24"]
    alone = _outputs(0, 1, config_file, settings)
    parts = run_ranks(_outputs, 2, config_file, settings)  # groups of 8 among 12 + 12 images
    torch.testing.assert_close(torch.cat(parts), alone)


def test_domains_are_told_to_the_norms(make_config):
    config = make_config("run", "model.norm=DomainBN", "data.train.corruptions=[none, invert]")
    model = build(config, ["none", "invert"])
    layer = next(module for module in model.modules() if isinstance(module, DomainBatchNorm))
    assert (layer.num_domains, layer.domain_names) == (2, ("none", "invert"))
    pixels, labels, _ = images(16)
    classify(model.train(), (pixels, labels, torch.ones(16, dtype=torch.int64)))
    assert layer.num_batches_tracked.tolist() == [0, 1]


def test_cbn_is_attached_to_its_convolutions(make_config):
    for name in ("small", "resnet18"):
        model = build(make_config("run", "model.norm=CBN", f"model.name={name}"))
        layers = [module for module in model.modules() if isinstance(module, CrossIterationBatchNorm)]
        assert layers
        assert all(layer.convolution is not None for layer in layers)


@pytest.mark.parametrize("name", ["small", "resnet18"])
@pytest.mark.parametrize("options", ["{}", "{norm: GN, num_groups: 8}"])
def test_proxynorm_takes_the_place_of_norms_and_activations(make_config, name, options):
    settings = [f"model.name={name}", "model.norm=ProxyNorm", f"model.norm_options={options}"]
    model = build(make_config("run", *settings, "model.images_per_group=0"))
    assert any(isinstance(module, ProxyNorm) for module in model.modules())
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert name != "small" or not any(isinstance(module, nn.ReLU) for module in model.modules())
    batch = images(4, 32)
    torch.testing.assert_close(
        classify(model.train(), batch)[:1], classify(model, tuple(part[:1] for part in batch)), rtol=1e-3, atol=1e-4
    )


def test_weights_are_frozen_by_part_with_their_statistics(make_config):
    model = build(make_config("run", "model.freeze=[features]", "model.weights=some.pt"))
    assert not any(parameter.requires_grad for parameter in model.features.parameters())
    assert all(parameter.requires_grad for parameter in model.fc.parameters())
    before = model.features[1].running_mean.clone()
    classify(model.train(), images())
    assert torch.equal(model.features[1].running_mean, before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.norm=ShufleBN"], "model.norm: unknown norm 'ShufleBN'; choose from ShuffleBN, "),
        (["model.norm=GhostBN"], "model.norm_options: norm GhostBN with options"),
        (
            ["model.norm=GN", "model.norm_options={num_groups: 5}"],
            "model.norm_options: GN: num_groups=5 does not divide",
        ),
        (["model.norm=BN", "model.norm_options={window: 3}"], "model.norm_options: norm BN has no option 'window'"),
        (["model.norm=ProxyNorm", "model.norm_options={norm: BN}"], "model.norm_options: .*unknown norm='BN'"),
        (["model.freeze=[features]"], "model.freeze: freezing random weights"),
        (["model.freeze=[layer1]", "model.weights=x.pt"], "model.freeze: the model has no part 'layer1'"),
        (
            ["model.norm=GN", "model.norm_options={num_groups: a}"],
            "model.norm_options.num_groups: must be a whole number",
        ),
        (["model.norm=ProxyNorm", "model.norm_options={eps: a}"], "model.norm_options.eps: must be a number, got 'a'"),
        (["model.norm=DomainBN", "model.norm_options={num_domains: 3}"], "model.norm_options.num_domains: is 3, but"),
    ],
)
def test_a_model_that_cannot_be_built_is_told_by_key(make_config, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(make_config("run", *overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "together"),
    [
        ([], "8 images"),
        (["model.images_per_group=0"], "40 images"),
        (["model.norm=SyncBN"], "80 images"),
        (["model.norm=GhostBN", "model.norm_options={group_size: 5}"], "5 images"),
        (["model.norm=ShuffleBN"], "images dealt at random into 10 groups over 80"),
        (["model.norm=ShuffleBN", "model.images_per_group=0"], "images dealt at random into 2 groups over 80"),
        (["model.norm=GN", "model.norm_options={num_groups: 8}"], "each image alone"),
        (["model.norm=FrozenBN"], "each image alone"),
        (["model.norm=DomainBN"], "the images of a domain among 40"),
    ],
)
def test_the_three_batch_sizes(make_config, overrides, together):
    config = make_config("run", *overrides)
    found = describe_batch(config, build(config), 2)
    assert found == {"total": 80, "per_rank": 40, "normalization": {"model": together}}


def test_one_norm_of_each_block_by_a_word(make_config):
    model = build_classifier(make_config("run", "model.name=resnet18", "model.block_norm=GN"), 10, [])
    kinds = {path: type(module).__name__ for path, module in model.named_modules() if "bn" in path.rpartition(".")[2]}
    assert {path for path, kind in kinds.items() if kind == "GroupNorm"} == {
        f"layer{stage}.{block}.bn1" for stage in (1, 2, 3, 4) for block in (0, 1)
    }
    with pytest.raises(ConfigError, match=r"model\.block_norm: SmallClassifier has no residual block"):
        build_classifier(make_config("run", "model.block_norm=GN"), 10, [])
