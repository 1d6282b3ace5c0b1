"""How good a model is: AP of detectors."""

from leakfree.evaluation.coco import CocoAp

__all__ = ["CocoAp"]
