"""Normalization layers by name, and the conversion of whole models."""

from leakfree.norms.attachment import attach_convolutions
from leakfree.norms.batch_group import BatchGroupNorm
from leakfree.norms.blocks import substitute_block_norms
from leakfree.norms.convert import ConversionReport, LayerConversion, convert_norms, plan_conversion
from leakfree.norms.cross_iteration import CrossIterationBatchNorm
from leakfree.norms.domains import domain
from leakfree.norms.embeddings import BatchNormEmbeddings, DomainMixture
from leakfree.norms.enhanced import InstanceEnhancementBatchNorm
from leakfree.norms.frozen import FrozenBatchNorm
from leakfree.norms.independent import GroupNorm, InstanceNorm, LayerNorm, PositionalNorm
from leakfree.norms.memorized import MemorizedBatchNorm, double_forward
from leakfree.norms.moments import BatchMoments
from leakfree.norms.pairs import replace_norm_activation_pairs
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
from leakfree.norms.proxy import ProxyNorm
from leakfree.norms.registry import NORMS, build_norm, norm_layer
from leakfree.norms.renorm import BatchRenorm
from leakfree.norms.statistics import Moments, group_moments, partitioned_batch_norm
from leakfree.partition import NormalizationScope, Partition, image_partition, normalization_scope

__all__ = [
    "NORMS",
    "BatchGroupNorm",
    "BatchMoments",
    "BatchNorm",
    "BatchNormEmbeddings",
    "BatchRenorm",
    "BatchStatBatchNorm",
    "ConversionReport",
    "CrossIterationBatchNorm",
    "DomainBatchNorm",
    "DomainMixture",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "InstanceEnhancementBatchNorm",
    "InstanceNorm",
    "LayerConversion",
    "LayerNorm",
    "MemorizedBatchNorm",
    "Moments",
    "NormalizationScope",
    "Partition",
    "PartitionedBatchNorm",
    "PositionalNorm",
    "ProxyNorm",
    "ShuffleBatchNorm",
    "SyncBatchNorm",
    "attach_convolutions",
    "batch_statistics",
    "build_norm",
    "convert_norms",
    "domain",
    "double_forward",
    "group_moments",
    "image_partition",
    "norm_layer",
    "normalization_scope",
    "partitioned_batch_norm",
    "plan_conversion",
    "replace_norm_activation_pairs",
    "substitute_block_norms",
]
