"""What several keys of a config must satisfy together; each key alone is checked in :mod:`leakfree.config.check`.

Every task has a module here with two functions that read the whole config and yield (key, what is wrong):
``problems`` end the command, settings ``without_effect`` are warned of. Whether a combination of methods leaks is
asked elsewhere: :func:`leakfree.leakage.check_config`.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

from leakfree.config.check import Origin
from leakfree.config.rules import classification, contrastive, detection, every_task
from leakfree.config.schema import RunConfig
from leakfree.errors import ConfigError

__all__ = ["check_rules"]

_OF_TASK = {"classification": [classification], "contrastive": [contrastive], "detection": [detection]}


def check_rules(config: RunConfig, origin: Origin) -> None:
    """Raise on the first rule that ``config`` breaks; log a warning for a setting that does nothing.

    Raises:
        ConfigError: the message names the key and where it was given.
    """
    rooms: list[Any] = [every_task, *_OF_TASK.get(config.task, ())]
    for key, problem in chain.from_iterable(rules.problems(config) for rules in rooms):
        raise ConfigError(f"{origin(key)}: {key}: {problem}")
    for key, problem in chain.from_iterable(rules.without_effect(config) for rules in rooms):
        logging.getLogger("leakfree.config").warning("leakfree: warning: %s: %s: %s", origin(key), key, problem)
