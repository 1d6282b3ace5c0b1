"""SimCLR and MoCo whose batch statistics cannot cheat, and the measures that show when they do."""

from leakfree.contrastive.backbones import SmallBackbone, build_backbone
from leakfree.contrastive.batches import feature_batches, training_views
from leakfree.contrastive.export import export_backbone, write_backbone
from leakfree.contrastive.losses import Contrast, nt_xent, queue_info_nce
from leakfree.contrastive.measure import (
    PretextSwap,
    estimate_statistics,
    evaluate_contrastive,
    pretext_swap,
    validate,
)
from leakfree.contrastive.methods import ContrastiveMethod, Encoder, MoCo, SimCLR, Views
from leakfree.contrastive.mitigation import Mitigation
from leakfree.contrastive.model import build_contrastive, describe_batch, mitigations
from leakfree.contrastive.views import DigitViews, PhotoViews, build_views

__all__ = [
    "Contrast",
    "ContrastiveMethod",
    "DigitViews",
    "Encoder",
    "Mitigation",
    "MoCo",
    "PhotoViews",
    "PretextSwap",
    "SimCLR",
    "SmallBackbone",
    "Views",
    "build_backbone",
    "build_contrastive",
    "build_views",
    "describe_batch",
    "estimate_statistics",
    "evaluate_contrastive",
    "export_backbone",
    "feature_batches",
    "mitigations",
    "nt_xent",
    "pretext_swap",
    "queue_info_nce",
    "training_views",
    "validate",
    "write_backbone",
]
