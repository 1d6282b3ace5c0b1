"""Leakage metrics: tensors in, numbers out."""

from leakfree.leakage.influence import InfluenceResult, cross_sample_influence

__all__ = ["InfluenceResult", "cross_sample_influence"]
