"""The typed schema of a run: every key a config file may hold, documented once.

Data only: nothing here imports torch, builds a model, or reads a file. Values are checked by type
when a file is merged (OmegaConf) and by range in :func:`leakfree.config.load_config`, which reads
the ``valid=`` metadata of each field.
Units are in the comments; a "step" is one optimizer update over all ranks.
"""

# ruff: noqa: RUF009  (``_f`` is dataclasses.field with the valid values of the field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "BackboneConfig",
    "BoxHeadConfig",
    "ClassificationDataConfig",
    "ClassificationEvaluationConfig",
    "ClassificationModelConfig",
    "ClassificationRunConfig",
    "ContrastiveDataConfig",
    "ContrastiveEvaluationConfig",
    "ContrastiveLeakageConfig",
    "ContrastiveModelConfig",
    "ContrastiveRunConfig",
    "DataConfig",
    "DatasetConfig",
    "DetectionDataConfig",
    "DetectionEvaluationConfig",
    "DetectionLeakageConfig",
    "DetectionModelConfig",
    "DetectionRunConfig",
    "DigitScenesConfig",
    "EvaluationConfig",
    "ImagesConfig",
    "LabelledDataConfig",
    "LeakageConfig",
    "MaskHeadConfig",
    "OptimizerConfig",
    "RpnConfig",
    "RunConfig",
    "ScheduleConfig",
    "TASKS",
    "TrainerConfig",
    "ViewsConfig",
]


def _f(
    default: Any,
    *,
    one_of: tuple[Any, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    registry: str | None = None,
) -> Any:
    """A field with its valid values: ``one_of`` a list, ``low <= value <= high``, ``above < value``,
    or the names of a registry (checked where the registry lives: ``norms``)."""
    valid = {"one_of": one_of, "low": low, "high": high, "above": above, "registry": registry}
    metadata = {"valid": {key: value for key, value in valid.items() if value is not None}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# -------------------------------------------------------------------- sections that every task has


@dataclass
class DataConfig:
    """Where data lies, and who reads it. A task adds what the model sees."""

    root: str = "datasets"  # where relative paths start, and where what is made here is written (once)
    num_workers: int = _f(2, low=0, high=1024)  # loader processes per rank


@dataclass
class EvaluationConfig:
    """The same checkpoint under several statistics; see ``docs/measures.md``. A task says which it knows."""

    statistics: list[str] = _f(["population", "precise"])
    images_per_batch: int = _f(8, low=1)
    precise_images: int = _f(320, low=1)  # training images behind the precise population statistics
    max_images: int = _f(0, low=0)  # 0 = all


@dataclass
class LeakageConfig:
    """What every run measures about who learns from whom."""

    enabled: bool = True
    influence_batches: int = _f(4, low=1)
    influence_probes: int = _f(16, low=1)  # outputs per batch whose gradient is followed
    seed: int = _f(0, low=0)  # of random groups and probes


# ----------------------------------------------------------------------------------- detection: data


@dataclass
class DigitScenesConfig:
    """The embedded data set: real handwritten digits composed into scenes (``name: digit_scenes``).

    The defaults are the measured regime in which batch statistics leak visibly.
    """

    num_images: int = _f(1500, low=0)  # scenes in this split
    image_size: int = _f(96, low=32)  # pixels, square
    objects_per_image: int = _f(5, low=0)  # digits, at most one per cell of the grid
    grid: int = _f(3, low=1)  # the image is a grid x grid of cells, a digit stays in its cell
    digit_size: list[int] = _f([20, 28])  # pixels, smallest and largest side of an upsampled digit
    class_sharing: float = _f(1.0, low=0.0, high=1.0)  # share of images whose digits are all of one class
    clutter: float = _f(0.35, low=0.0)  # standard deviation of the background texture
    mask_format: str = _f("rle", one_of=("rle", "polygon"))
    seed: int = _f(0, low=0)  # of the scenes; the split of the digits is always the same


@dataclass
class DatasetConfig:
    """One split: COCO instances on disk, or the embedded digit scenes."""

    name: str = _f("coco", one_of=("coco", "digit_scenes"))
    images: str = ""  # coco: folder of the images
    annotations: str = ""  # coco: the instances JSON
    digits: DigitScenesConfig = field(default_factory=DigitScenesConfig)


@dataclass
class DetectionDataConfig(DataConfig):
    train: DatasetConfig = field(default_factory=DatasetConfig)
    val: DatasetConfig = field(default_factory=DatasetConfig)
    on_error: str = _f("raise", one_of=("raise", "skip"))  # broken image or annotation: stop, or skip and count
    flip: float = _f(0.5, low=0.0, high=1.0)  # probability of a horizontal flip in training
    min_size: list[int] = _f([800])  # pixels of the shorter side; one is drawn per image in training, the last in tests
    max_size: int = _f(1333, low=1)  # pixels of the longer side
    keep_empty: bool = False  # train on images without objects


# ---------------------------------------------------------------------------------- detection: model


@dataclass
class BackboneConfig:
    name: str = _f("resnet50_fpn", one_of=("small", "resnet18_fpn", "resnet50_fpn"))
    norm: str = _f("BN", registry="norms")  # "none" only for the small backbone
    norm_options: dict[str, Any] = _f({})
    freeze_at: int = _f(0, low=0, high=5)  # ResNet: 1 = stem, 2 = stem and res2, ... 5 = all (detectron2's FREEZE_AT)


@dataclass
class RpnConfig:
    """Anchors and proposals; an empty list of anchors means torchvision's own."""

    anchor_sizes: list[list[int]] = _f([])  # pixels, one list per feature map
    aspect_ratios: list[float] = _f([0.5, 1.0, 2.0])
    pre_nms_top_n_train: int = _f(2000, low=1)
    pre_nms_top_n_test: int = _f(1000, low=1)
    post_nms_top_n_train: int = _f(2000, low=1)
    post_nms_top_n_test: int = _f(1000, low=1)
    nms_threshold: float = _f(0.7, low=0.0, high=1.0)


@dataclass
class BoxHeadConfig:
    name: str = _f("2fc", one_of=("2fc", "4conv1fc"))
    norm: str = _f("none", registry="norms")  # 4conv1fc: after each convolution
    norm_options: dict[str, Any] = _f({})
    num_convs: int = _f(4, low=0)  # 4conv1fc
    conv_dim: int = _f(256, low=1)  # channels; 4conv1fc
    fc_dim: int = _f(1024, low=1)  # features
    roi_shuffle: str = _f("none", one_of=("none", "statistics", "features"))  # none, ShuffleBN, Shuffled
    batch_size_per_image: int = _f(512, low=1)  # RoIs sampled per image in training
    positive_fraction: float = _f(0.25, above=0.0, high=1.0)  # share of foreground among them, at most
    score_threshold: float = _f(0.05, low=0.0, high=1.0)
    nms_threshold: float = _f(0.5, low=0.0, high=1.0)
    detections_per_image: int = _f(100, low=1)


@dataclass
class MaskHeadConfig:
    enabled: bool = True  # false: Faster R-CNN
    norm: str = _f("none", registry="norms")
    norm_options: dict[str, Any] = _f({})
    num_convs: int = _f(4, low=1)
    conv_dim: int = _f(256, low=1)  # channels
    roi_shuffle: str = _f("none", one_of=("none", "statistics", "features"))


@dataclass
class DetectionModelConfig:
    """Mask R-CNN. The defaults are torchvision's ``maskrcnn_resnet50_fpn``, weight for weight."""

    num_classes: int = _f(0, low=0)  # without background; 0 = as many as the training data has
    weights: str = ""  # checkpoint to start from, or to evaluate
    weights_parts: list[str] = _f([])  # load only these submodules (backbone, rpn, ...); [] = all
    freeze: list[str] = _f([])  # submodules whose weights and statistics stay as loaded (backbone, rpn, ...)
    images_per_group: int = _f(0, low=0)  # RoIs of so many images share statistics; 0 = all images of a rank
    image_mean: list[float] = _f([0.485, 0.456, 0.406])
    image_std: list[float] = _f([0.229, 0.224, 0.225])
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    rpn: RpnConfig = field(default_factory=RpnConfig)
    box_head: BoxHeadConfig = field(default_factory=BoxHeadConfig)
    mask_head: MaskHeadConfig = field(default_factory=MaskHeadConfig)


# ------------------------------------------------------------------------------ detection: measures


@dataclass
class DetectionEvaluationConfig(EvaluationConfig):
    statistics: list[str] = _f(
        ["population", "precise", "image", "random"], one_of=("population", "precise", "image", "random")
    )
    images_per_batch: int = _f(8, low=1)  # images whose RoIs meet in one head forward


@dataclass
class DetectionLeakageConfig(LeakageConfig):
    max_images: int = _f(240, low=1)  # images per split for RoI accuracy


# -------------------------------------------------------------------------------------- classification


@dataclass
class ImagesConfig:
    """One split of labelled images: the embedded digits, CIFAR, or a folder of images on disk.

    ``corruptions`` are the domains of the split: image i gets corruption ``i % len(corruptions)``.
    """

    name: str = _f("digits", one_of=("digits", "image_folder", "cifar10", "cifar100"))
    # image_folder: a folder with a subfolder of images for each class; cifar10, cifar100: where the folder
    # cifar-10-batches-py or cifar-100-python lies (empty = data.root), or that folder
    path: str = ""
    corruptions: list[str] = _f(["none"], one_of=("none", "blur", "contrast", "invert"))
    noise: float = _f(0.0, low=0.0)  # standard deviation of Gaussian noise, pixels are in [0, 1]; fixed per image
    seed: int = _f(0, low=0)  # of the noise


@dataclass
class LabelledDataConfig(DataConfig):
    """Labelled images, squared and standardized."""

    train: ImagesConfig = field(default_factory=ImagesConfig)
    val: ImagesConfig = field(default_factory=ImagesConfig)
    image_size: int = _f(8, low=4)  # pixels, square
    mean: list[float] = _f([0.0, 0.0, 0.0])  # subtracted from pixels in [0, 1]: red, green, blue
    std: list[float] = _f([1.0, 1.0, 1.0])  # and what they are divided by


@dataclass
class ClassificationDataConfig(LabelledDataConfig):
    min_crop: float = _f(1.0, above=0.0, high=1.0)  # training: smallest share of the image in a random crop; 1 = none
    flip: float = _f(0.0, low=0.0, high=1.0)  # probability of a horizontal flip in training
    # How training batches are composed: images at random, or groups of group_size images of one class each,
    # while the classes of the whole batch stay balanced.
    composition: str = _f("random", one_of=("random", "same_class"))
    group_size: int = _f(16, low=1)  # images; same_class


@dataclass
class ClassificationModelConfig:
    """An image classifier with a norm after each convolution."""

    name: str = _f("small", one_of=("small", "resnet18", "resnet34", "resnet50", "resnet101"))
    norm: str = _f("BN", registry="norms")  # "none" only for the small one
    norm_options: dict[str, Any] = _f({})
    block_norm: str = _f("none", registry="norms")  # resnets: in place of one norm of each residual block (XBN)
    block_norm_options: dict[str, Any] = _f({})
    num_classes: int = _f(0, low=0)  # 0 = as many as the training data has
    weights: str = ""  # checkpoint to start from, or to evaluate
    weights_parts: list[str] = _f([])  # load only these submodules (layer1, ...); [] = all
    freeze: list[str] = _f([])  # submodules whose weights and statistics stay as loaded
    images_per_group: int = _f(0, low=0)  # consecutive images that share statistics in training; 0 = all of a rank


@dataclass
class ClassificationEvaluationConfig(EvaluationConfig):
    statistics: list[str] = _f(
        ["population", "precise", "random", "same_class"],
        one_of=("population", "precise", "random", "same_class", "target", "embeddings"),
    )
    images_per_batch: int = _f(16, low=1)  # images that share statistics under "random" and "same_class"
    precise_images: int = _f(1200, low=1)  # training images behind the precise population statistics
    # "target" (AdaBN): statistics of unlabelled validation images, each corruption by itself; "embeddings": a DomainBN
    # predicts in each domain it knows, and the predictions are mixed by the distance of the image to the domains.
    target_images: int = _f(0, low=0)  # images behind "target", spread over the split; 0 = those that are evaluated
    source_share: float = _f(0.0, low=0.0, high=1.0)  # of the stored statistics in those of "target"; below 1


# ----------------------------------------------------------------------------------------- contrastive

_SHARING = ("bn", "sync_bn", "ghost_bn", "shuffle_bn", "shuffle_images", "gn", "frozen_bn")


@dataclass
class ViewsConfig:
    """How the two views of an image are drawn in training."""

    name: str = _f("moco_v2", one_of=("digits", "simclr", "moco_v2"))  # the last two: lightly's
    strength: float = _f(1.0, low=0.0)  # digits: of all distortions; simclr, moco_v2: of the colour jitter
    min_crop: float = _f(0.2, above=0.0, high=1.0)  # simclr, moco_v2: smallest share of the image in a crop
    flip: float = _f(0.5, low=0.0, high=1.0)  # simclr, moco_v2: probability of a horizontal flip
    blur: float = _f(0.5, low=0.0, high=1.0)  # simclr, moco_v2: probability of a Gaussian blur
    # digits: an illumination that belongs to the image, survives the views and tells nothing of the class:
    style: float = _f(0.0, low=0.0)  # its size, in units of ink; above 0 it takes the place of contrast and brightness
    style_noise: float = _f(0.3, low=0.0)  # how much it differs between the views of an image, relative to itself


@dataclass
class ContrastiveDataConfig(LabelledDataConfig):
    views: ViewsConfig = field(default_factory=ViewsConfig)


@dataclass
class ContrastiveModelConfig:
    """SimCLR or MoCo. Who shares batch statistics is one word for each encoder: see ``docs/contrastive.md``."""

    method: str = _f("moco", one_of=("moco", "simclr"))
    backbone: str = "resnet50"  # small, a model of torchvision, or timm/NAME
    stem: str = _f("imagenet", one_of=("imagenet", "small_images"))  # resnets: 7x7 and pooling, or 3x3 (CIFAR)
    head: str = _f("mlp", one_of=("mlp", "linear"))  # mlp: lightly's projection head of the method
    hidden_dim: int = _f(0, low=0)  # of the mlp; 0 = as many as the backbone has features
    feature_dim: int = _f(128, low=1)  # of what is compared
    temperature: float = _f(0.2, above=0.0)
    query: str = _f("bn", one_of=_SHARING)  # the encoder, or the first view of SimCLR
    # The momentum encoder, or the second view of SimCLR; same = as query.
    key: str = _f("same", one_of=("same", *_SHARING, "loader_shuffle", "eman"))
    images_per_group: int = _f(0, low=0)  # images that bn and the shuffles normalize together; 0 = a rank's batch
    norm_options: dict[str, Any] = _f({})  # ghost_bn: group_size; gn: num_groups
    queue_size: int = _f(65536, low=1)  # moco: keys of earlier batches to compare with
    momentum: float = _f(0.999, low=0.0, high=1.0)  # moco: of the key encoder's weights
    momentum_end: float = _f(0.0, low=0.0, high=1.0)  # moco: a cosine from momentum to here over the run; 0 = constant
    # moco: running statistics of the key encoder: its own, copies of the query encoder's, or their moving average
    teacher_statistics: str = _f("auto", one_of=("auto", "own", "copy", "ema"))  # auto: ema with eman, else own
    channels_last: bool = True
    weights: str = ""  # checkpoint to start from, or to evaluate
    weights_parts: list[str] = _f([])  # load only these submodules (query.backbone, ...); [] = all
    freeze: list[str] = _f([])  # submodules whose weights and statistics stay as loaded


@dataclass
class ContrastiveEvaluationConfig(EvaluationConfig):
    """Features of the backbone, judged by their neighbours and a linear probe."""

    statistics: list[str] = _f(["population", "precise"], one_of=("population", "precise"))
    images_per_batch: int = _f(64, low=1)
    precise_images: int = _f(2048, low=1)  # training images behind the precise population statistics
    views: str = _f("plain", one_of=("plain", "augmented"))  # what features are of: the image, or one fixed view of it
    knn_k: int = _f(20, low=1)  # neighbours
    knn_temperature: float = _f(0.1, above=0.0)
    few_labels: int = _f(10, low=1)  # labels of each class for kNN with few labels
    backend: str = _f("faiss", one_of=("faiss", "torch"))
    online_images: int = _f(2048, low=1)  # images of each split for kNN during training


@dataclass
class ContrastiveLeakageConfig(LeakageConfig):
    max_images: int = _f(2048, low=2)  # held-out images whose keys are encoded among other batch-mates


# ------------------------------------------------------------------------------------ training


@dataclass
class OptimizerConfig:
    name: str = _f("sgd", one_of=("sgd", "adamw", "lars"))
    lr: float = _f(0.02, above=0.0)  # at total_batch_size; never scaled behind your back
    momentum: float = _f(0.9, low=0.0, high=1.0)  # sgd, lars
    weight_decay: float = _f(1e-4, low=0.0)
    weight_decay_norm: float = _f(1e-4, low=0.0)  # of normalization layers' affine parameters
    clip_gradients: float = _f(0.0, low=0.0)  # largest norm of the whole gradient; 0 = off


@dataclass
class ScheduleConfig:
    max_steps: int = _f(90000, low=1)
    warmup_steps: int = _f(1000, low=0)
    warmup_factor: float = _f(0.001, low=0.0, high=1.0)  # lr of step 0, as a share of lr
    decay: str = _f("step", one_of=("step", "cosine", "constant"))
    milestones: list[float] = _f([2 / 3, 8 / 9])  # step: as shares of max_steps
    gamma: float = _f(0.1, low=0.0, high=1.0)  # step: lr factor at each milestone
    freeze_bn_at: float = _f(1.0, low=0.0)  # point of the run from which BN is frozen; as a share, 1 = never
    # What freeze_bn_at counts: a share of max_steps, steps, or epochs (passes over the training images, as 1.5).
    freeze_bn_unit: str = _f("share", one_of=("share", "step", "epoch"))
    freeze_bn_statistics: str = _f("precise", one_of=("precise", "ema"))  # what it is frozen with
    # BatchRenorm's ramp and CBN's burn-in follow max_steps; false = as norm_options (or the papers' long runs) say.
    scale_ramps: bool = True
    burn_in: float = _f(2 / 3, low=0.0, high=1.0)  # with scale_ramps: share of the run in which CBN is plain BN
    double_forward: bool = False  # MBN: run each batch once more after its update, so that the memory stays fresh


@dataclass
class TrainerConfig:
    total_batch_size: int = _f(16, low=1)  # images per step over all ranks
    num_machines: int = _f(1, low=1)  # more than one needs a launcher: leakfree launch, torchrun (--num-machines)
    num_gpus: int = _f(0, low=0)  # ranks on GPUs of each machine (--num-gpus)
    num_processes: int = _f(1, low=1)  # ranks on CPU of each machine when num_gpus is 0 (--num-processes)
    num_threads: int = _f(0, low=0, high=4096)  # CPU threads per rank; 0 = cores / ranks
    precision: str = _f("32-true", one_of=("32-true", "bf16-mixed", "16-mixed", "64-true"))
    checkpoint_period: int = _f(5000, low=1)  # steps
    keep_checkpoints: int = _f(2, low=1)
    log_period: int = _f(20, low=1)  # steps
    eval_period: int = _f(0, low=0)  # steps; 0 = only at the end
    stuck_after: float = _f(1800.0, low=0.0)  # seconds without progress of a rank that end the run; 0 = never

    @property
    def ranks_per_machine(self) -> int:
        return self.num_gpus or self.num_processes

    @property
    def num_ranks(self) -> int:
        """Over all machines."""
        return self.num_machines * self.ranks_per_machine


@dataclass
class RunConfig:
    """Keys of every task. A task adds its ``model`` and narrows other sections in a subclass."""

    task: str = "detection"
    seed: int = _f(0, low=0, high=2**32 - 1)
    output_dir: str = "output"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    leakage: LeakageConfig = field(default_factory=LeakageConfig)


@dataclass
class DetectionRunConfig(RunConfig):
    data: DetectionDataConfig = field(default_factory=DetectionDataConfig)
    evaluation: DetectionEvaluationConfig = field(default_factory=DetectionEvaluationConfig)
    leakage: DetectionLeakageConfig = field(default_factory=DetectionLeakageConfig)
    model: DetectionModelConfig = field(default_factory=DetectionModelConfig)


@dataclass
class ClassificationRunConfig(RunConfig):
    task: str = "classification"
    data: ClassificationDataConfig = field(default_factory=ClassificationDataConfig)
    evaluation: ClassificationEvaluationConfig = field(default_factory=ClassificationEvaluationConfig)
    model: ClassificationModelConfig = field(default_factory=ClassificationModelConfig)


@dataclass
class ContrastiveRunConfig(RunConfig):
    task: str = "contrastive"
    data: ContrastiveDataConfig = field(default_factory=ContrastiveDataConfig)
    evaluation: ContrastiveEvaluationConfig = field(default_factory=ContrastiveEvaluationConfig)
    leakage: ContrastiveLeakageConfig = field(default_factory=ContrastiveLeakageConfig)
    model: ContrastiveModelConfig = field(default_factory=ContrastiveModelConfig)


TASKS: dict[str, type[RunConfig]] = {
    "classification": ClassificationRunConfig,
    "contrastive": ContrastiveRunConfig,
    "detection": DetectionRunConfig,
}
