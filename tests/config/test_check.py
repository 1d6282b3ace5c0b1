"""Unknown keys, wrong types and values out of range: each is one line with the place, the key and the valid choices."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leakfree.config.check import check_tree, field_kind, flatten, nearest_keys, schema_kinds
from leakfree.config.overrides import nest
from leakfree.config.schema import DetectionRunConfig
from leakfree.errors import ConfigError

KINDS = schema_kinds(DetectionRunConfig)
LEAVES = sorted(key for key, (kind, _) in KINDS.items() if not dataclasses.is_dataclass(kind))
WRONG = {int: ["1", 1.5, True, None, [1], {"a": 1}], float: ["1", True, None, [1.0], float("nan"), 10**400],
         bool: ["on", 1, None, [True]], str: [1, 1.5, True, None, ["a"], {"a": 1}]}  # fmt: skip


def problem_of(tree: dict, resolved: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        check_tree(tree, DetectionRunConfig, lambda key: "a.yaml:7", resolved=resolved)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("a.yaml:7: ")
    return message


@pytest.mark.parametrize("key", LEAVES)
def test_no_key_takes_a_value_of_another_type(key):
    kind = KINDS[key][0]
    for value in WRONG.get(kind, ["text", 3, None, True]):
        message = problem_of(nest(key, value))
        assert f" {key}" in message
        assert "expects" in message


@pytest.mark.parametrize("key", [key for key in LEAVES if KINDS[key][0] in (int, float)])
def test_a_number_beyond_its_limits_names_the_limit(key):
    kind, valid = KINDS[key]
    if "low" in valid:
        assert f"at least {valid['low']}" in problem_of(nest(key, kind(valid["low"]) - 1))
        check_tree(nest(key, kind(valid["low"])), DetectionRunConfig, lambda key: "", resolved=True)
    if "high" in valid:
        assert f"at most {valid['high']}" in problem_of(nest(key, kind(valid["high"]) + 1))
        check_tree(nest(key, kind(valid["high"])), DetectionRunConfig, lambda key: "", resolved=True)
    if "above" in valid:
        assert f"above {valid['above']}" in problem_of(nest(key, kind(valid["above"])))


def test_a_choice_lists_the_valid_ones_nearest_first():
    message = problem_of(nest("optimizer.name", "adamv"))
    assert message.endswith("optimizer.name: got text 'adamv'; valid: adamw, lars, sgd")
    assert "valid: statistics" in problem_of(nest("model.box_head.roi_shuffle", "statistic"))


def test_each_element_of_a_list_is_checked():
    message = problem_of(nest("evaluation.statistics", ["image", "popluation"]))
    assert "evaluation.statistics[1]: got text 'popluation'; valid: population" in message
    assert "data.min_size[1]: expects an integer" in problem_of(nest("data.min_size", [1, "x"]))
    assert "anchor_sizes[0][1]: expects an integer" in problem_of(nest("model.rpn.anchor_sizes", [[1, "x"]]))


def test_a_list_key_says_how_to_write_one():
    assert problem_of(nest("model.freeze", "backbone")).endswith("got text 'backbone' (write [backbone])")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.box_head.nrom", "model.box_head.norm?"),
        ("lr", "optimizer.lr?"),
        ("model.lr", "optimizer.lr?"),
        ("MODEL.WEIGHTS", "model.weights?"),
        ("box_head.norm", "model.box_head.norm or"),
        ("trainer.batch_size", "trainer.total_batch_size?"),
        ("schedul.max_steps", "schedule.max_steps?"),
        ("max_iter", None),
        ("data.train.digits.class_shareing", "data.train.digits.class_sharing?"),
    ],
)
def test_an_unknown_key_names_the_nearest_full_key(key, meant):
    message = problem_of(nest(key, 1))
    assert f" {key}: unknown key" in message
    assert meant is None or f"did you mean {meant}" in message


def test_an_unknown_key_lists_its_section_nearest_first():
    assert "keys of optimizer: momentum, " in problem_of(nest("optimizer.momentun", 1))
    assert "keys of a config: seed, " in problem_of({"sed": 1})


@given(st.sampled_from(LEAVES), st.data())
def test_one_wrong_letter_in_any_key_is_caught_and_its_right_spelling_offered(key, data):
    section, _, leaf = key.rpartition(".")
    at = data.draw(st.integers(0, len(leaf) - 1))
    wrong = leaf[:at] + "0" + leaf[at + 1 :]
    message = problem_of(nest(f"{section}.{wrong}" if section else wrong, 1))
    assert "unknown key" in message
    assert leaf in message


def test_norm_options_are_plain_values_under_python_names():
    check_tree(nest("model.box_head.norm_options", {"a": 1, "b": None, "c": "x", "d": 0.5, "e": True}),
               DetectionRunConfig, lambda key: "", resolved=True)  # fmt: skip
    assert "norm_options.a: expects a number" in problem_of(nest("model.box_head.norm_options.a", [1]))
    assert "'a b' cannot be the name" in problem_of(nest("model.box_head.norm_options", {"a b": 1}))
    assert "finite" in problem_of(nest("model.box_head.norm_options.a", float("inf")))


@pytest.mark.parametrize("text", ["???", "${seed}"])
def test_a_stand_in_is_fine_until_the_end(text):
    for key in ("seed", "data.min_size", "model.box_head.norm_options.a"):
        check_tree(nest(key, text), DetectionRunConfig, lambda key: "", resolved=False)
        assert "has no value" in problem_of(nest(key, text))


def test_field_kind_knows_sections_values_and_options():
    assert field_kind(DetectionRunConfig, "seed") is int
    assert dataclasses.is_dataclass(field_kind(DetectionRunConfig, "model.box_head"))
    assert field_kind(DetectionRunConfig, "model.box_head.norm_options.momentum") is not None
    assert field_kind(DetectionRunConfig, "model.nothing") is None


def test_flatten_keeps_lists_whole_and_leaves_out_empty_sections():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": None}) == {"a.b": [1, 2], "d": None}


def test_nearest_keys_is_empty_when_nothing_is_near():
    assert nearest_keys("zzz", KINDS) == []
