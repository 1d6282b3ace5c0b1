"""Rules of labelled images, for the tasks that read them."""

from __future__ import annotations

from leakfree.config.rules.every_task import Problems, changed, pixels_are_normalized
from leakfree.config.schema import LabelledDataConfig

__all__ = ["problems", "without_effect"]


def problems(data: LabelledDataConfig) -> Problems:
    for split, images in (("train", data.train), ("val", data.val)):
        if images.name == "image_folder" and not images.path:
            yield (
                f"data.{split}.path",
                f"is empty: data.{split}.name=image_folder needs a folder with a subfolder of images for each class "
                "(names: digits, image_folder, cifar10, cifar100)",
            )
        if not images.corruptions:
            yield f"data.{split}.corruptions", "is empty: name at least one of none, blur, contrast, invert"
    yield from pixels_are_normalized({"data.mean": data.mean, "data.std": data.std})


def without_effect(data: LabelledDataConfig) -> Problems:
    for split, images in (("train", data.train), ("val", data.val)):
        if images.name == "digits" and images.path:
            yield f"data.{split}.path", f"has no effect with data.{split}.name=digits: it is for files on disk"
        if not images.noise and changed(images, "seed"):
            yield f"data.{split}.seed", f"has no effect with data.{split}.noise=0: it is of the noise"
