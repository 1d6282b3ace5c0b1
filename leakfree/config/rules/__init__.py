"""What several keys of a config must satisfy together; each key alone is checked in :mod:`leakfree.config.check`.

Every task has a module here with two functions that read the whole config and yield (key, what is wrong):
``problems`` end the command, settings ``without_effect`` are warned of. Whether a combination of methods leaks is
asked elsewhere: :func:`leakfree.leakage.check_config`.
"""

from __future__ import annotations

import logging

from leakfree.config.check import Origin
from leakfree.config.rules import classification, contrastive, detection, every_task
from leakfree.config.rules.every_task import Problems
from leakfree.config.schema import ClassificationRunConfig, ContrastiveRunConfig, DetectionRunConfig, RunConfig
from leakfree.errors import ConfigError

__all__ = ["check_rules"]


def check_rules(config: RunConfig, origin: Origin) -> None:
    """Raise on the first rule that ``config`` breaks; log a warning for a setting that does nothing.

    Raises:
        ConfigError: the message names the key and where it was given.
    """
    for key, problem in _problems(config):
        raise ConfigError(f"{origin(key)}: {key}: {problem}")
    for key, problem in _without_effect(config):
        logging.getLogger("leakfree.config").warning("leakfree: warning: %s: %s: %s", origin(key), key, problem)


def _problems(config: RunConfig) -> Problems:
    yield from every_task.problems(config)
    if isinstance(config, DetectionRunConfig):
        yield from detection.problems(config)
    elif isinstance(config, ClassificationRunConfig):
        yield from classification.problems(config)
    elif isinstance(config, ContrastiveRunConfig):
        yield from contrastive.problems(config)


def _without_effect(config: RunConfig) -> Problems:
    yield from every_task.without_effect(config)
    if isinstance(config, DetectionRunConfig):
        yield from detection.without_effect(config)
    elif isinstance(config, ClassificationRunConfig):
        yield from classification.without_effect(config)
    elif isinstance(config, ContrastiveRunConfig):
        yield from contrastive.without_effect(config)
