"""How good a model is: AP of detectors; neighbours and linear probes of features."""

from leakfree.evaluation.coco import CocoAp
from leakfree.evaluation.features import Features, extract_features
from leakfree.evaluation.neighbors import (
    InvertedLists,
    knn_accuracy,
    knn_predict,
    nearest,
    recall_at_k,
    retrieval_map,
)
from leakfree.evaluation.probes import LinearProbe, linear_probe

__all__ = [
    "CocoAp",
    "Features",
    "InvertedLists",
    "LinearProbe",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "nearest",
    "recall_at_k",
    "retrieval_map",
]
