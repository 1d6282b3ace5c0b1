"""Typed configs: schema, loading with ``_BASE_`` and overrides, checks, saving. Never imports torch."""

from leakfree.config.load import config_to_dict, diff_configs, load_config, save_config
from leakfree.config.schema import TASKS, ClassificationRunConfig, ContrastiveRunConfig, DetectionRunConfig, RunConfig

__all__ = [
    "TASKS",
    "ClassificationRunConfig",
    "ContrastiveRunConfig",
    "DetectionRunConfig",
    "RunConfig",
    "config_to_dict",
    "diff_configs",
    "load_config",
    "save_config",
]
