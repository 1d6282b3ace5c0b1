"""A trained backbone in the formats of other libraries: loaded there, it computes what it computed here."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from leakfree.cli import main
from leakfree.config import config_to_dict
from leakfree.contrastive import build_contrastive, export_backbone
from leakfree.errors import CheckpointError, ConfigError
from leakfree.training import train
from tests.contrastive.conftest import MakeConfig


def checkpoint_of(make_config: MakeConfig, *overrides: str) -> tuple[dict[str, Any], nn.Module]:
    """What a training would have written, and its backbone in eval mode; statistics are not those of the start."""
    config = make_config("run", "data.image_size=32", *overrides)
    torch.manual_seed(0)
    model = build_contrastive(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return {"state_dict": state, "leakfree": {"config": config_to_dict(config)}}, model.query.backbone.eval()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MODEL = {"backbone": "resnet18", "query": "bn", "stem": "imagenet", "norm_options": {}}
GOOD = {"task": "contrastive", "model": MODEL}


def features(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(IMAGES)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v3_small", "densenet121"])
@pytest.mark.parametrize("query", ["bn", "frozen_bn"])
def test_torchvision_loads_it_strictly_and_computes_the_same(make_config: MakeConfig, name: str, query: str) -> None:
    checkpoint, backbone = checkpoint_of(
        make_config, f"model.backbone={name}", f"model.query={query}", "model.weights=other.pt"
    )
    other = torchvision.models.get_model(name, weights=None)
    if name.startswith("resnet"):
        other.fc = nn.Identity()
    elif name == "densenet121":
        other.classifier = nn.Identity()
    else:
        other.classifier[3] = nn.Identity()
        other.classifier[2] = nn.Identity()
    other.load_state_dict(export_backbone(checkpoint, "torchvision"), strict=True)
    torch.testing.assert_close(features(other), features(backbone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_timm_loads_it_strictly_and_computes_the_same(make_config: MakeConfig, name: str) -> None:
    checkpoint, backbone = checkpoint_of(make_config, f"model.backbone=timm/{name}", "model.method=simclr")
    other = timm.create_model(name, num_classes=0)
    other.load_state_dict(export_backbone(checkpoint, "timm"), strict=True)
    torch.testing.assert_close(features(other), features(backbone), rtol=1e-9, atol=1e-9)


def test_names_of_detectron2_are_those_of_moco_s_converter(make_config: MakeConfig) -> None:
    checkpoint, backbone = checkpoint_of(make_config, "model.backbone=resnet50")
    found = export_backbone(checkpoint, "detectron2")
    assert found["matching_heuristics"] is True
    assert isinstance(found["__author__"], str)
    arrays, state = found["model"], backbone.state_dict()
    assert len(arrays) == len(state)
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    for ours, theirs in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "bn1.num_batches_tracked": "stem.conv1.norm.num_batches_tracked",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn1.weight": "res2.0.conv1.norm.weight",
        "layer2.3.bn3.running_var": "res3.3.conv3.norm.running_var",
        "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
        "layer4.0.downsample.1.bias": "res5.0.shortcut.norm.bias",
    }.items():
        assert np.array_equal(arrays[theirs], state[ours].numpy()), theirs


@pytest.mark.parametrize("depth", [18, 50])
def test_detectron2_loads_it_and_computes_the_same(make_config: MakeConfig, tmp_path: Path, depth: int) -> None:
    pytest.importorskip("detectron2.modeling")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    checkpoint, backbone = checkpoint_of(make_config, f"model.backbone=resnet{depth}")
    path = tmp_path / "resnet.pkl"
    path.write_bytes(pickle.dumps(export_backbone(checkpoint, "detectron2")))
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    model = nn.ModuleDict({"backbone": build_resnet_backbone(cfg, ShapeSpec(channels=3))})
    DetectionCheckpointer(model).load(str(path))
    with torch.no_grad():
        maps = model.double().eval()["backbone"](IMAGES)["res5"]
    torch.testing.assert_close(maps.mean((2, 3)), features(backbone), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("format", "overrides", "words"),
    [
        ("keras", [], "format: unknown 'keras'; choose from torchvision, timm, detectron2"),
        ("torchvision", [], "format: torchvision has no backbone small: it is of this package"),
        ("timm", ["model.backbone=resnet18"], "format: timm has no backbone resnet18: it is of torchvision"),
        ("torchvision", ["model.backbone=timm/resnet18"], "no backbone timm/resnet18: it is of timm"),
        ("detectron2", ["model.backbone=timm/resnet18"], "detectron2 has no backbone timm/resnet18: it is of timm"),
        ("detectron2", ["model.backbone=densenet121"], "detectron2 has the ResNets of torchvision"),
        (
            "torchvision",
            ["model.backbone=resnet18", "model.stem=small_images"],
            r"its stem is another one \(model.stem",
        ),
        ("torchvision", ["model.backbone=resnet18", "model.query=gn"], r"its norms are GN \(model\.query=gn\)"),
        (
            "torchvision",
            ["model.backbone=resnet18", "model.norm_options.eps=0.1"],
            "eps=0.1 is not the library's 1e-05",
        ),
    ],
)
def test_what_the_library_could_not_load_is_refused(
    make_config: MakeConfig, format: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export_backbone(checkpoint_of(make_config, *overrides)[0], format)


def test_a_checkpoint_with_other_weights_than_its_config_tells_is_refused(make_config: MakeConfig) -> None:
    checkpoint, _ = checkpoint_of(make_config, "model.backbone=resnet18")
    del checkpoint["state_dict"]["model.query.backbone.bn1.weight"]
    with pytest.raises(ConfigError, match=r"could not load this resnet18: bn1\.weight is missing"):
        export_backbone(checkpoint, "torchvision")
    checkpoint["leakfree"]["config"]["task"] = "detection"
    with pytest.raises(CheckpointError, match="of a detection training"):
        export_backbone(checkpoint, "torchvision")
    with pytest.raises(CheckpointError, match="not written by a leakfree training"):
        export_backbone({"state_dict": {}}, "torchvision")


# -------------------------------------------------------------------------------------------- command


def test_the_command_exports_a_run_and_tells_mistakes(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = ["leakage.enabled=false", "evaluation.statistics=[population]", "evaluation.max_images=40"]
    short = ["schedule.max_steps=2", "trainer.checkpoint_period=1", "schedule.warmup_steps=0"]
    train(make_config("run", "model.backbone=resnet18", *quiet, *short))
    run, output = str(tmp_path / "run"), tmp_path / "resnet18.pt"

    def exported(*argv: str) -> str:
        code = main(["export", *argv])
        captured = capsys.readouterr()
        assert code == (2 if captured.err else 0)
        return captured.err or captured.out

    capsys.readouterr()
    said = exported(run, "--format", "torchvision", "--output", str(output))
    assert said == f"{tmp_path}/run/model_final.pt -> {output} (torchvision)\n"
    state = torch.load(output, weights_only=True)
    content = torch.load(tmp_path / "run" / "model_final.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, content[f"model.query.backbone.{name}"]) for name, value in state.items())
    other = torchvision.models.resnet18()
    other.fc = nn.Identity()
    other.load_state_dict(state, strict=True)
    exported(f"{run}/checkpoint_0000001.pt", "-o", str(tmp_path / "first.pt"), "--format", "torchvision")
    assert not torch.equal(torch.load(tmp_path / "first.pt", weights_only=True)["conv1.weight"], state["conv1.weight"])
    exported(run, "--format", "detectron2", "-o", str(tmp_path / "resnet18.pkl"))
    assert pickle.loads((tmp_path / "resnet18.pkl").read_bytes())["model"]["stem.conv1.weight"].shape == (64, 3, 7, 7)

    for argv, words in (
        ([run, "--format", "timm", "-o", "x.pt"], "format: timm has no backbone resnet18"),
        ([run, "--format", "detectron2", "-o", "x.pt"], "output: x.pt: detectron2 needs the name to end in .pkl"),
        ([run, "--format", "torchvision", "-o", "x.pkl"], "torchvision needs the name another ending than .pkl"),
        ([run, "--format", "torchvision", "-o", "no/x.pt"], "output: no is no folder"),
        ([run, "--format", "onnx", "-o", "x.pt"], "invalid choice: 'onnx'"),
        ([run, "--format", "timm"], "required: -o/--output"),
        ([str(tmp_path), "--format", "timm", "-o", "x.pt"], "the folder holds no checkpoint of a run"),
        (["nowhere.pt", "--format", "timm", "-o", "x.pt"], "nowhere.pt: cannot be read as a checkpoint"),
        ([str(output), "--format", "timm", "-o", "x.pt"], f"{output}: not written by a leakfree training"),
        ([run, "--format", "torchvision", "-o", str(tmp_path)], f"output: {tmp_path} is a folder; give a file"),
    ):
        said = exported(*argv)
        assert words in said, said
        assert said.count("\n") == 1
    assert not Path("x.pt").exists()


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({"leakfree": 3}, "holds no config"),
        ({"leakfree": {"config": []}}, "holds no config"),
        ({"leakfree": {"config": {"task": "contrastive"}}}, "its config is damaged: model.backbone"),
        ({"leakfree": {"config": {"task": "contrastive", "model": {"backbone": "small", "query": 3}}}}, "model.query"),
        ({"leakfree": {"config": GOOD}}, "no state dict of tensors"),
        ({"leakfree": {"config": GOOD}, "state_dict": {"model.query.backbone.a": 3}}, "no state dict of tensors"),
        ({"leakfree": {"config": GOOD}, "state_dict": {"a": torch.zeros(2, device="meta")}}, "of another kind"),
    ],
)
def test_a_checkpoint_of_other_content_is_one_line(checkpoint, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        export_backbone(checkpoint, "torchvision")
    assert "\n" not in str(caught.value)
