"""Leakage metrics, tensors in and numbers out; and the check of a config before it runs."""

from leakfree.leakage.check import Finding, check_config
from leakfree.leakage.companions import ProbeResult, SwapResult, batchmate_probe, companion_swap
from leakfree.leakage.composition import CompositionGap, composition_gap, error_rates
from leakfree.leakage.estimation_shift import EstimationShift, LayerShift, estimation_shift
from leakfree.leakage.influence import InfluenceResult, cross_sample_influence
from leakfree.leakage.pretext import PretextGap, pretext_gap

__all__ = [
    "CompositionGap",
    "EstimationShift",
    "Finding",
    "LayerShift",
    "PretextGap",
    "ProbeResult",
    "SwapResult",
    "batchmate_probe",
    "check_config",
    "companion_swap",
    "InfluenceResult",
    "composition_gap",
    "cross_sample_influence",
    "error_rates",
    "estimation_shift",
    "pretext_gap",
]
