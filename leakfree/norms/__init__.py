"""Normalization layers by name, and the conversion of whole models."""

from leakfree.norms.convert import convert_norms
from leakfree.norms.domains import domain
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.moments import BatchMoments
from leakfree.norms.partitioned import (
    BatchNorm,
    BatchStatBatchNorm,
    GhostBatchNorm,
    PartitionedBatchNorm,
    ShuffleBatchNorm,
    SyncBatchNorm,
    batch_statistics,
)
from leakfree.norms.per_domain import DomainBatchNorm
from leakfree.norms.registry import NORMS, GroupNorm, build_norm
from leakfree.norms.renorm import BatchRenorm
from leakfree.norms.statistics import Moments, group_moments, partitioned_batch_norm
from leakfree.partition import NormalizationScope, Partition, image_partition, normalization_scope

__all__ = [
    "NORMS",
    "BatchMoments",
    "BatchNorm",
    "BatchRenorm",
    "BatchStatBatchNorm",
    "DomainBatchNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "Moments",
    "NormalizationScope",
    "Partition",
    "PartitionedBatchNorm",
    "ShuffleBatchNorm",
    "SyncBatchNorm",
    "batch_statistics",
    "build_norm",
    "convert_norms",
    "domain",
    "group_moments",
    "image_partition",
    "normalization_scope",
    "partitioned_batch_norm",
]
