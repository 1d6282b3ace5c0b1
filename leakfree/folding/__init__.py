"""Folding for inference: norms with constant statistics become part of the convolutions beside them."""

from leakfree.folding.fold import Fold, FoldReport, fold_norms

__all__ = ["Fold", "FoldReport", "fold_norms"]
