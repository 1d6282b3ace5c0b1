"""Files, bases and overrides become one typed config, and what is saved loads to the same."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leakfree.config import DetectionRunConfig, config_to_dict, diff_configs, load_config, save_config
from leakfree.config.check import schema_kinds
from leakfree.errors import ConfigError

DIGITS = "data:\n  train: {name: digit_scenes}\n  val: {name: digit_scenes}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text(DIGITS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> DetectionRunConfig:
    Path("run.yaml").write_text(text)
    config = load_config("run.yaml", overrides)
    assert isinstance(config, DetectionRunConfig)
    return config


def problem_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_is_the_dataclass_with_the_file_over_its_defaults(folder):
    config = load("_BASE_: base.yaml\noptimizer: {lr: 1e-4, weight_decay: 0}\nmodel: {box_head: {fc_dim: 8}}\n")
    expected = DetectionRunConfig()
    expected.data.train.name = expected.data.val.name = "digit_scenes"
    expected.optimizer.lr, expected.optimizer.weight_decay, expected.model.box_head.fc_dim = 1e-4, 0.0, 8
    assert config == expected
    assert type(config.optimizer.weight_decay) is float
    assert type(config.model.box_head) is type(expected.model.box_head)


def test_bases_are_relative_to_their_file_and_later_wins(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "a.yaml").write_text("_BASE_: ../base.yaml\nseed: 1\noptimizer: {lr: 0.1, momentum: 0.5}\n")
    (folder / "deep" / "b.yaml").write_text("seed: 2\ndata: {min_size: [1, 2, 3]}\n")
    config = load("_BASE_: [deep/a.yaml, deep/b.yaml]\noptimizer: {lr: 0.3}\ndata: {min_size: [9]}\n")
    assert (config.seed, config.optimizer.lr, config.optimizer.momentum) == (2, 0.3, 0.5)
    assert config.data.min_size == [9]  # lists replace
    assert config.data.train.name == "digit_scenes"


def test_one_base_reached_twice_is_not_a_circle(folder):
    for name in "ab":
        (folder / f"{name}.yaml").write_text("_BASE_: base.yaml\n")
    load("_BASE_: [a.yaml, b.yaml]\n")


def test_norm_options_are_replaced_by_files_and_set_singly_by_overrides(folder):
    (folder / "gn.yaml").write_text(
        "_BASE_: base.yaml\nmodel: {box_head: {name: 4conv1fc, norm: GN, norm_options: {num_groups: 32, eps: 0.1}}}\n"
    )
    leaf = "_BASE_: gn.yaml\nmodel: {box_head: {norm: GhostBN, norm_options: {group_size: 2}}}\n"
    assert load(leaf).model.box_head.norm_options == {"group_size": 2}
    assert load(leaf, "model.box_head.norm_options.eps=1e-3").model.box_head.norm_options == {
        "group_size": 2,
        "eps": 1e-3,
    }
    assert load(leaf, "model.box_head.norm_options={}").model.box_head.norm_options == {}


def test_overrides_win_and_the_last_one_last(folder):
    config = load("_BASE_: base.yaml\nseed: 1\n", "seed=2", "seed=3", "model.box_head={fc_dim: 8, conv_dim: 4}")
    assert (config.seed, config.model.box_head.fc_dim, config.model.box_head.conv_dim) == (3, 8, 4)
    assert config.model.box_head.num_convs == 4


def test_references_follow_overrides(folder):
    config = load("_BASE_: base.yaml\noutput_dir: out/${model.backbone.name}/${seed}\n", "seed=5")
    assert config.output_dir == "out/resnet50_fpn/5"


def test_a_value_left_open_must_be_given(folder):
    text = "_BASE_: base.yaml\nmodel:\n  weights: ???\n"
    assert problem_of(text).startswith("run.yaml:3: model.weights: has no value")
    assert load(text, "model.weights=x").model.weights == "x"


def test_a_mistake_names_the_file_and_line_that_holds_it(folder):
    (folder / "middle.yaml").write_text("_BASE_: base.yaml\n\noptimizer:\n  lr: high\n")
    assert problem_of("_BASE_: middle.yaml\n").startswith("middle.yaml:4: optimizer.lr: expects a number")
    (folder / "middle.yaml").write_text("_BASE_: base.yaml\noptimizer:\n  lr_rate: 1\n")
    assert problem_of("_BASE_: middle.yaml\n").startswith("middle.yaml:3: optimizer.lr_rate: unknown key")
    assert problem_of("_BASE_: base.yaml\n", "optimizer.lr=high").startswith("command line: optimizer.lr: ")
    assert problem_of("_BASE_: base.yaml\n", "lr=1").startswith("command line: lr: unknown key; did you mean")


def test_a_value_that_came_through_a_reference_is_checked(folder):
    assert "run.yaml:2: data.flip: must be at least 0.0 and at most 1.0, got 7" in problem_of(
        "_BASE_: base.yaml\ndata: {flip: '${seed}'}\n", "seed=7"
    )


def test_a_broken_rule_names_where_its_key_was_given(folder):
    text = "_BASE_: base.yaml\ntrainer: {num_processes: 3, total_batch_size: 8}\n"
    assert problem_of(text).startswith("run.yaml:2: trainer.total_batch_size: ")
    assert problem_of("_BASE_: base.yaml\n", "data.min_size=[]").startswith("command line: data.min_size: ")
    assert problem_of("").startswith("run.yaml: data.train.images: is empty")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1\n", ["run.yaml", "keys and values", "list"]),
        ("3\n", ["run.yaml", "keys and values"]),
        ("_BASE_: 3\n", ["run.yaml:1: _BASE_", "path"]),
        ("_BASE_: [base.yaml, 3]\n", ["run.yaml:1: _BASE_", "path"]),
        ("seed: 1\n_BASE_: bsae.yaml\n", ["run.yaml:2: _BASE_", "bsae.yaml: no such file", "holds: base.yaml"]),
        ("_BASE_: run.yaml\n", ["run.yaml:1: _BASE_", "circle: run.yaml -> run.yaml"]),
        ("model: {_BASE_: base.yaml}\n", ["run.yaml:1: model._BASE_: unknown key"]),
        ("task: detectoin\n", ["run.yaml:1: task", "'detectoin'", "valid: detection"]),
        ("task: [1]\n", ["run.yaml:1: task"]),
        ("seed: 1\nseed: 2\n", ["run.yaml:2: seed: given twice"]),
        ("optimizer:\n", ["run.yaml:1: optimizer: expects a section", "null"]),
    ],
)
def test_a_file_that_cannot_be_used_says_why(folder, text, words):
    message = problem_of(text)
    assert all(word in message for word in words), message


def test_a_circle_over_two_files_is_shown(folder):
    (folder / "other.yaml").write_text("_BASE_: run.yaml\n")
    assert "circle: run.yaml -> other.yaml -> run.yaml" in problem_of("_BASE_: other.yaml\n")


def test_an_unknown_task_on_the_command_line(folder):
    assert problem_of("_BASE_: base.yaml\n", "task=x").startswith(
        "command line: task: got 'x'; valid: classification, contrastive, detection"
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("bsae.yaml", ["bsae.yaml: no such file", "holds: base.yaml"]),
        ("smok/base.yaml", ["no folder smok", "smoke/"]),
        ("base.yaml/x.yaml", ["base.yaml is a file"]),
        ("smoke", ["is a folder", "tiny.yaml"]),
        ("binary.yaml", ["not a text file", "byte 0"]),
    ],
)
def test_a_file_that_is_not_there_names_the_nearest(folder, path, words):
    (folder / "smoke").mkdir()
    (folder / "smoke" / "tiny.yaml").write_text("")
    (folder / "binary.yaml").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# -------------------------------------------------------------------------------------- saving

RULED = {  # keys that have a rule of their own: varied in test_rules
    "evaluation.statistics", "model.images_per_group", "task", "output_dir", "data.min_size", "schedule.milestones",
    "trainer.total_batch_size", "trainer.num_machines", "trainer.num_gpus", "trainer.num_processes",
    "trainer.precision", "schedule.freeze_bn_at", "schedule.freeze_bn_unit", "model.image_mean",
    "model.image_std", "model.rpn.anchor_sizes", "model.rpn.aspect_ratios", "model.box_head.name",
    "model.box_head.norm", "model.box_head.roi_shuffle", "model.mask_head.roi_shuffle", "model.backbone.norm",
    "model.backbone.name",
}  # fmt: skip
KINDS = {
    key: kind
    for key, kind in schema_kinds(DetectionRunConfig).items()
    if not dataclasses.is_dataclass(kind[0]) and key not in RULED and not key.startswith(("data.train.", "data.val."))
}


def valid_values(kind, valid) -> st.SearchStrategy:
    if "one_of" in valid:
        one = st.sampled_from(valid["one_of"])
        return one if kind is str else st.lists(one, max_size=4)
    if kind is int:
        return st.integers(valid.get("low", -5), valid.get("high", 10**6))
    if kind is float:
        low = valid.get("low", valid.get("above", 0.0))
        return st.floats(low, valid.get("high", 1e6), exclude_min="above" in valid)
    if kind is bool:
        return st.booleans()
    letters = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"])  # JSON and YAML differ on the others
    text = st.text(letters, max_size=12).filter(lambda item: "${" not in item and item != "???")
    if kind is str:
        return text
    if kind == list[str]:
        return st.lists(text, max_size=3)
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
    return st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True), plain, max_size=3)


@st.composite
def overrides(draw):
    keys = draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=8, unique=True))
    return {key: draw(valid_values(*KINDS[key])) for key in keys}


@given(overrides())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_saved_loads_to_an_equal_config(folder, values):
    config = load("_BASE_: base.yaml\n", *(f"{key}={json.dumps(value)}" for key, value in values.items()))
    for key, value in values.items():
        assert _get(config, key) == value
    save_config(config, folder / "saved.yaml")
    again = load_config(folder / "saved.yaml")
    assert again == config
    assert json.loads(json.dumps(config_to_dict(again))) == config_to_dict(config)
    assert diff_configs(again, config) == []


def _get(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_the_saved_file_stands_alone(folder, tmp_path_factory):
    config = load("_BASE_: base.yaml\noutput_dir: out/${seed}\n", "seed=4")
    path = save_config(config, tmp_path_factory.mktemp("elsewhere") / "config.yaml")
    assert load_config(path) == config
    assert "_BASE_" not in path.read_text()
    assert "${" not in path.read_text()
    assert path.read_text().startswith("# The resolved config of a run, written by leakfree ")


@pytest.mark.parametrize("name", ["out\udcff", "a\nb", " x ", "1e5", "on", "#x", "${", "über/№ 5"])
def test_any_folder_name_survives_saving(folder, name):
    config = dataclasses.replace(load("_BASE_: base.yaml\n"), output_dir=name)
    if name == "${":
        with pytest.raises(ConfigError, match="not written"):
            save_config(config, folder / "saved.yaml")
    else:
        assert load_config(save_config(config, folder / "saved.yaml")) == config


def test_a_config_that_would_not_load_again_is_not_saved(folder):
    path = save_config(load("_BASE_: base.yaml\n"), folder / "saved.yaml")
    before = path.read_text()
    for change in ({"seed": "1"}, {"output_dir": "${seed}"}, {"seed": -1}):
        with pytest.raises(ConfigError, match="not written"):
            save_config(dataclasses.replace(load("_BASE_: base.yaml\n"), **change), path)
    assert path.read_text() == before


def test_a_difference_has_the_dotted_key_and_both_values(folder):
    one = load("_BASE_: base.yaml\n")
    two = load("_BASE_: base.yaml\n", "optimizer.lr=0.5", "model.box_head.norm_options={eps: 1}", "data.min_size=[1,2]")
    expected = [
        ("data.min_size", [800], [1, 2]),
        ("optimizer.lr", 0.02, 0.5),
        ("model.box_head.norm_options.eps", None, 1),
    ]
    assert diff_configs(one, two) == expected
    assert diff_configs(config_to_dict(one), two) == expected
    assert diff_configs(two, config_to_dict(one)) == [
        (key, b, a) for key, a, b in sorted(expected, key=lambda row: row[0] == "model.box_head.norm_options.eps")
    ]


def test_configs_load_without_torch():
    code = "import sys, leakfree.config; print([name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["pipe", "loop", "x" * 5000, "a/" * 3000, "/dev/zero"])
def test_what_is_no_file_is_one_line_and_nobody_waits(folder, name):
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ConfigError):
        load_config(folder / name)
    assert "_BASE_" in problem_of(f"_BASE_: {name}\n")


def test_text_that_no_file_can_hold_is_refused(folder):
    for text in ("a\\0b", "\\ud800"):
        assert "a character that no file can hold" in problem_of(f'_BASE_: base.yaml\noutput_dir: "{text}"\n')
    assert problem_of('_BASE_: "a\\0b"\n').startswith("run.yaml:1: _BASE_")


def test_an_integer_that_libraries_cannot_take_names_the_limit(folder):
    said = problem_of("_BASE_: base.yaml\n", "schedule.max_steps=3000000000")
    assert said == "command line: schedule.max_steps: must be at most 2147483647, got 3000000000"
