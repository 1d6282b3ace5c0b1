"""`key.path=value` texts become keys and typed values."""

import pytest

from leakfree.config.overrides import nest, parse_override
from leakfree.config.schema import DetectionRunConfig
from leakfree.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("seed=3", "seed", 3),
        ("data.keep_empty=true", "data.keep_empty", True),
        ("data.min_size=[480, 640]", "data.min_size", [480, 640]),
        ("model.box_head={norm: BN, num_convs: 2}", "model.box_head", {"norm": "BN", "num_convs": 2}),
        ("model.box_head.norm_options.eps=1e-3", "model.box_head.norm_options.eps", 1e-3),
        (" seed = 3 ", "seed", 3),
        ("nosuchkey=3", "nosuchkey", 3),
    ],
)
def test_a_value_is_yaml(text, key, value):
    assert parse_override(text, DetectionRunConfig) == (key, value)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("007", "007"),
        ("true", "true"),
        ("a: b #c", "a: b #c"),
        ("a=b", "a=b"),
        ("@x", "@x"),
        ("'a b'", "a b"),
        ("", ""),
        ("null", None),
        ("[a]", ["a"]),
    ],
)
def test_a_key_that_holds_text_takes_what_was_typed(typed, value):
    assert parse_override(f"output_dir={typed}", DetectionRunConfig) == ("output_dir", value)


@pytest.mark.parametrize("text", ["seed", "=3", " =3", "SOLVER.BASE_LR"])
def test_what_is_no_override_says_what_one_looks_like(text):
    with pytest.raises(ConfigError, match=r"^command line: got .* expects key\.path=value"):
        parse_override(text, DetectionRunConfig)


def test_a_broken_value_names_its_key():
    with pytest.raises(ConfigError, match=r"^command line: data\.min_size:1:\d+: not valid YAML"):
        parse_override("data.min_size=[1, 2", DetectionRunConfig)


def test_nest_puts_a_value_under_its_dotted_key():
    assert nest("a.b.c", [1]) == {"a": {"b": {"c": [1]}}}


def test_a_key_of_thousands_of_dots_is_one_line():
    with pytest.raises(ConfigError, match="unknown key: none has more than 20 dots"):
        parse_override("model.norm_options." + "a." * 3000 + "b=1", DetectionRunConfig)
