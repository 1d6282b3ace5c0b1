"""The schema itself: its defaults are a valid config, and every field says what is valid in a form that is checked."""

import dataclasses

from leakfree.config import schema
from leakfree.config.check import check_tree, schema_kinds
from leakfree.config.schema import TASKS, RunConfig


def test_the_defaults_of_every_task_are_valid():
    for task in TASKS.values():
        check_tree(dataclasses.asdict(task()), task, lambda key: "defaults", resolved=True)


def test_every_task_is_a_run_config_named_by_its_key():
    for name, task in TASKS.items():
        assert issubclass(task, RunConfig)
        assert task().task in (name, "detection")


def test_every_range_is_of_a_kind_that_is_checked():
    for task in TASKS.values():
        for key, (_, valid) in schema_kinds(task).items():
            assert set(valid) <= {"one_of", "low", "high", "above", "registry"}, key


def test_a_default_that_can_change_is_not_shared():
    one, two = schema.DetectionRunConfig(), schema.DetectionRunConfig()
    one.data.min_size.append(1)
    one.model.box_head.norm_options["eps"] = 1
    assert two == schema.DetectionRunConfig()
