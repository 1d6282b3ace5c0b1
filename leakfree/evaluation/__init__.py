"""How good a model is: AP of detectors; neighbours and linear probes of features."""

from leakfree.evaluation.coco import CocoAp
from leakfree.evaluation.features import Features, extract_features
from leakfree.evaluation.neighbors import (
    few_label_knn_accuracy,
    knn_accuracy,
    knn_predict,
    recall_at_k,
    retrieval_map,
)
from leakfree.evaluation.probes import LinearProbe, linear_probe
from leakfree.evaluation.search import InvertedLists, nearest

__all__ = [
    "CocoAp",
    "Features",
    "InvertedLists",
    "LinearProbe",
    "extract_features",
    "few_label_knn_accuracy",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "nearest",
    "recall_at_k",
    "retrieval_map",
]
