"""Conversion on the models that people have: eval outputs and state dict keys stay, there and back again.

Weights are random (nothing is downloaded) and the running statistics are random too, so that a norm that is
dropped, doubled or given another's state shows in the output. Models are the smallest of their family.
"""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn

from leakfree.errors import ConfigError
from leakfree.norms import FrozenBatchNorm, PartitionedBatchNorm, convert_norms, plan_conversion

SAME_IN_EVAL = [("BN", {}), ("SyncBN", {}), ("GhostBN", {"group_size": 2}), ("ShuffleBN", {}), ("BatchRenorm", {})]

# model -> size of the images; one for each timm family (file of timm.models) that has batch norms
TIMM = {
    "convmixer_768_32": 32,
    "cpubone_nano": 64,
    "cspnext_tiny": 64,
    "densenet121": 64,
    "dla46x_c": 64,
    "dpn48b": 64,
    "efficientformerv2_s0": 224,
    "efficientvim_m1": 64,
    "efficientvit_b0": 64,
    "efficientvit_m0": 64,
    "ese_vovnet19b_slim_dw": 64,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "ghostnet_050": 64,
    "hardcorenas_a": 64,
    "hgnetv2_b0": 64,
    "hrnet_w18_small": 64,
    "iformer_t": 64,
    "inception_next_atto": 64,
    "inception_v3": 96,
    "lambda_resnet26t": 64,
    "lcnet_035": 64,
    "lcnetv2_small": 64,
    "legacy_seresnet18": 64,
    "legacy_xception": 64,
    "levit_128s": 224,
    "mobilevit_xxs": 64,
    "nextvit_small": 64,
    "regnetx_002": 64,
    "repghostnet_050": 64,
    "repvit_m0_9": 64,
    "res2next50": 64,
    "resnest14d": 64,
    "resnetv2_18": 64,
    "rexnet_100": 64,
    "selecsls42": 64,
    "shvit_s1": 64,
    "skresnet18": 64,
    "starnet_s050": 64,
    "swiftformer_xs": 64,
    "test_byobnet": 64,
    "test_coatnet": 160,
    "test_efficientnet": 64,
    "test_resnet": 64,
    "tiny_vit_5m_224": 64,
    "tresnet_m": 64,
    "visformer_tiny": 224,
    "xception41p": 64,
    "xcit_nano_12_p8_224": 64,
}

# file of torchvision.models -> its model and the size of the images
CLASSIFICATION = {
    "densenet": ("densenet121", 64),
    "efficientnet": ("efficientnet_b0", 64),
    "googlenet": ("googlenet", 64),
    "inception": ("inception_v3", 96),
    "maxvit": ("a small one", 64),  # maxvit_t takes images of 224 only
    "mnasnet": ("mnasnet0_5", 64),
    "mobilenetv2": ("mobilenet_v2", 64),
    "mobilenetv3": ("mobilenet_v3_small", 64),
    "regnet": ("regnet_x_400mf", 64),
    "resnet": ("resnet18", 64),
    "shufflenetv2": ("shufflenet_v2_x0_5", 64),
    "vgg": ("vgg11_bn", 64),
}
CLASSIFICATION_WITHOUT = {"alexnet", "convnext", "squeezenet", "swin_transformer", "vision_transformer"}
FEW_BOXES = {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_test": 8}
DETECTION = {
    "faster_rcnn": ("fasterrcnn_resnet50_fpn_v2", {**FEW_BOXES, "box_score_thresh": 0.0}),
    "fcos": ("fcos_resnet50_fpn", {"min_size": 64, "max_size": 64, "score_thresh": 0.0}),
    "keypoint_rcnn": ("keypointrcnn_resnet50_fpn", {**FEW_BOXES, "box_score_thresh": 0.0}),
    "mask_rcnn": ("maskrcnn_resnet50_fpn_v2", {**FEW_BOXES, "box_score_thresh": 0.0}),
    "retinanet": ("retinanet_resnet50_fpn", {"min_size": 64, "max_size": 64, "score_thresh": 0.0}),
    "ssdlite": ("ssdlite320_mobilenet_v3_large", {}),
}
DETECTION_WITHOUT = {"ssd"}


def with_random_statistics(model):
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def check_there_and_back(model, run, run_frozen=None):
    """``run(model)`` is compared bit for bit; in float64, FrozenBN's ``run_frozen(model)`` up to its rounding."""
    before = run(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    num_norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, options in SAME_IN_EVAL:
        report = plan_conversion(model, name, **options)
        assert len(report.converted) == num_norms
        assert not [row for row in report.converted if row.lost]
        convert_norms(model, name, **options)
        torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    assert sum(isinstance(module, PartitionedBatchNorm) for module in model.modules()) == num_norms
    run_frozen = run_frozen or run
    expected = run_frozen(model.double())
    convert_norms(model, "FrozenBN")
    assert sum(isinstance(module, FrozenBatchNorm) for module in model.modules()) == num_norms
    torch.testing.assert_close(run_frozen(model), expected, rtol=1e-8, atol=1e-8)
    convert_norms(model.float(), "BN")
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {id(parameter) for parameter in model.parameters()} == parameters
    assert all(parameter.requires_grad for parameter in model.parameters())


def images(size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return lambda model: model(x.to(next(model.parameters()).dtype))


def test_the_zoo_is_of_different_families():
    families = {timm.models.model_entrypoint(name).__module__ for name in TIMM}
    assert len(families) == len(TIMM) >= 25


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    torch.manual_seed(0)
    model = with_random_statistics(timm.create_model(name, pretrained=False, num_classes=5))
    check_there_and_back(model, images(TIMM[name]))


def test_a_model_without_batch_norms_is_told_so():
    model = timm.create_model("resnetv2_50d_evos", pretrained=False, num_classes=5)
    with pytest.raises(ConfigError, match="there is no batch norm to convert"):
        convert_norms(model, "SyncBN")


def small_maxvit():
    return torchvision.models.maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 32, 32],
        block_layers=[1, 1, 1, 1],
        head_dim=8,
        stochastic_depth_prob=0.2,
        num_classes=5,
    )


def families_of(module):
    names = torchvision.models.list_models(module=module)
    return {torchvision.models.get_model_builder(name).__module__.rpartition(".")[2] for name in names}


def test_no_family_of_torchvision_is_missing():
    assert families_of(torchvision.models) == set(CLASSIFICATION) | CLASSIFICATION_WITHOUT
    assert families_of(torchvision.models.detection) == set(DETECTION) | DETECTION_WITHOUT


@pytest.mark.parametrize("family", CLASSIFICATION)
def test_torchvision_classification(family):
    torch.manual_seed(0)
    name, size = CLASSIFICATION[family]
    with warnings.catch_warnings():  # of googlenet and inception, on their initialization
        warnings.simplefilter("ignore", FutureWarning)
        model = small_maxvit() if family == "maxvit" else torchvision.models.get_model(name, weights=None)
    check_there_and_back(with_random_statistics(model), images(size))


@pytest.mark.parametrize("family", DETECTION)
def test_torchvision_detection(family):
    torch.manual_seed(0)
    name, options = DETECTION[family]
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **options)
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    features = images(64)
    check_there_and_back(
        with_random_statistics(model), lambda model: model([x]), lambda model: features(model.backbone)
    )
