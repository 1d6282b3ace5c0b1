"""A trained backbone as a file that torchvision, timm or detectron2 loads."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leakfree.contrastive.backbones import build_backbone
from leakfree.errors import CheckpointError, ConfigError, one_line
from leakfree.records import atomic_file

__all__ = ["FORMATS", "export_backbone", "write_backbone"]

FORMATS = ("torchvision", "timm", "detectron2")
_PREFIX = "model.query.backbone."
# What detectron2 calls the parts of a ResNet of torchvision, in this order.
_DETECTRON2 = [
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"^(?=conv1|bn1)", lambda match: "stem."),
    (r"\bbn(\d)", lambda match: f"conv{match[1]}.norm"),
    (r"downsample\.0", lambda match: "shortcut"),
    (r"downsample\.1", lambda match: "shortcut.norm"),
]


def export_backbone(checkpoint: dict[str, Any], format: str) -> dict[str, Any]:
    """The backbone of the queries, as the library names it, with the population statistics of its batch norms.

    ``torchvision``, ``timm``: a state dict of the library's model of that name, without its classifier. It loads
    strictly where the classifier is left out (``model.fc = nn.Identity()``; timm: ``num_classes=0``), and the features
    in eval mode are those of the run.

    ``detectron2``: a ResNet for ``MODEL.WEIGHTS``, as MoCo's ``convert-pretrain-to-detectron2.py`` writes it: {"model":
    name -> numpy array, "__author__", "matching_heuristics"}. It wants ``MODEL.RESNETS.STRIDE_IN_1X1=False``, images in
    RGB, and the run's ``data.mean`` and ``data.std`` times 255.

    Args:
        checkpoint: the content of a checkpoint of a contrastive training.
        format: one of :data:`FORMATS`.

    Raises:
        CheckpointError: not of a contrastive training.
        ConfigError: an unknown format, or a backbone that the library could not load or would compute otherwise.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: unknown {format!r}; choose from {', '.join(FORMATS)}")
    settings = _settings(checkpoint)
    state = {name.removeprefix(_PREFIX): value for name, value in _weights(checkpoint) if name.startswith(_PREFIX)}
    name = settings["backbone"]
    library = "timm" if name.startswith("timm/") else name if name == "small" else "torchvision"
    if library != ("torchvision" if format == "detectron2" else format):
        raise ConfigError(f"format: {format} has no backbone {name}: it is of {_owner(library)}")
    if format == "detectron2" and not name.startswith(("resnet", "resnext", "wide_resnet")):
        raise ConfigError(f"format: detectron2 has the ResNets of torchvision, and model.backbone is {name}")
    with torch.device("meta"):
        plain, _ = build_backbone(name, "BN", {})
    faults = _differences(plain, state, settings)
    if faults:
        raise ConfigError(f"format: {format} could not load this {name}: {'; '.join(faults)}")
    return _for_detectron2(state) if format == "detectron2" else state


def write_backbone(checkpoint: dict[str, Any], format: str, path: Path) -> None:
    """Write :func:`export_backbone` to a file, whole or not at all: pickled for detectron2, else by ``torch.save``.

    Raises:
        CheckpointError, ConfigError: as there; a name that does not end in .pkl for detectron2, which goes by it; a
            folder that does not exist.
    """
    found = export_backbone(checkpoint, format)
    if (path.suffix == ".pkl") != (format == "detectron2"):
        wanted = "to end in .pkl" if format == "detectron2" else "another ending than .pkl, like .pt"
        raise ConfigError(f"output: {path}: {format} needs the name {wanted}")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"output: {path.parent} is no folder")
    if os.path.isdir(path):
        raise ConfigError(f"output: {path} is a folder; give a file")
    try:
        with atomic_file(path) as file:
            if format == "detectron2":
                pickle.dump(found, file)
            else:
                torch.save(found, file)
    except OSError as error:
        raise ConfigError(f"output: {path}: cannot be written ({error.strerror})") from error


def _settings(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """``model`` of the config that the checkpoint holds."""
    entry = checkpoint.get("leakfree")
    written = entry.get("config") if isinstance(entry, dict) else None
    if not isinstance(written, dict):
        raise CheckpointError("not written by a leakfree training: it holds no config")
    if written.get("task") != "contrastive":
        raise CheckpointError(f"of a {written.get('task')} training; backbones are exported from contrastive ones")
    settings = written.get("model")
    kinds = {"backbone": str, "query": str, "stem": str, "norm_options": dict}
    for key, kind in kinds.items():
        if not isinstance(settings, dict) or not isinstance(settings.get(key), kind):
            raise CheckpointError(f"its config is damaged: model.{key} is missing, or another thing")
    assert isinstance(settings, dict)
    return settings


def _weights(checkpoint: dict[str, Any]) -> list[tuple[str, Tensor]]:
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(item, Tensor) for item in state.values()):
        raise CheckpointError("it holds no state dict of tensors")
    try:
        return [(str(name), value.detach().cpu().to_dense().contiguous()) for name, value in state.items()]
    except (RuntimeError, NotImplementedError) as error:  # quantized, without values
        raise CheckpointError(f"its weights are of another kind: {one_line(error)}") from error


def _owner(library: str) -> str:
    return "this package" if library == "small" else library


def _differences(plain: nn.Module, state: dict[str, Tensor], settings: dict[str, Any]) -> list[str]:
    """Why the library's own model would not load ``state``, or not compute the same with it."""
    if settings["query"] == "gn":
        return ["its norms are GN (model.query=gn), and the library's are batch norms"]
    if settings["stem"] != "imagenet":
        return [f"its stem is another one (model.stem={settings['stem']})"]
    faults = []
    for name, value in plain.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=torch.int64))  # FrozenBN counts nothing
        elif name not in state or state[name].shape != value.shape:
            faults.append(f"{name} is missing or of another shape")
    faults += [f"{name} is left over" for name in state.keys() - plain.state_dict().keys()]
    eps = settings["norm_options"].get("eps")
    norms = [layer for layer in plain.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if eps is not None and any(layer.eps != eps for layer in norms):
        faults.append(f"model.norm_options.eps={eps} is not the library's {norms[0].eps}")
    return faults[:3]


def _for_detectron2(state: dict[str, Tensor]) -> dict[str, Any]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in _DETECTRON2:
            name = re.sub(pattern, new, name)
        renamed[name] = value.numpy()
    return {"model": renamed, "__author__": "leakfree", "matching_heuristics": True}
