"""Image classifiers with chosen norms, and their evaluation under every kind of statistics.

``build_classifier`` makes the model of a config; ``evaluate_classifier`` gives its accuracy and the composition gap.
"""

from leakfree.classification.batches import composed_batches, training_batches
from leakfree.classification.measure import (
    estimate_statistics,
    evaluate_classifier,
    validation_accuracies,
)
from leakfree.classification.model import SmallClassifier, build_classifier, classify, describe_batch

__all__ = [
    "SmallClassifier",
    "build_classifier",
    "classify",
    "composed_batches",
    "describe_batch",
    "estimate_statistics",
    "evaluate_classifier",
    "training_batches",
    "validation_accuracies",
]
