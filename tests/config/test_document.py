"""YAML text becomes plain data or one line that says where it is wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leakfree.config.document import dump_yaml, parse_yaml
from leakfree.errors import ConfigError

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=12)
)
TREES = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.recursive(SCALARS, lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=8), item)),
    max_size=5,
)


@given(TREES)
@settings(deadline=None)
def test_what_is_dumped_reads_back_equal(tree):
    data, _ = parse_yaml(dump_yaml(tree), "dumped")
    assert data == (tree or {})


@pytest.mark.parametrize("text", ["1e-4", "1E5", "on", "off", "no", "010", "1:30", "2020-01-01", "0x1f", "=", "<<"])
def test_text_that_looks_like_something_else_reads_back_as_text(text):
    assert parse_yaml(dump_yaml({"key": text}), "dumped")[0] == {"key": text}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("10_000", 10000),
        ("0x1f", 31),
        ("on", "on"),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ("e5", "e5"),
        (".", "."),
        ("-", "-"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    if text == "-":  # a dash alone starts a list
        text = "'-'"
    data, _ = parse_yaml(f"key: {text}\n", "a.yaml")
    assert data["key"] == value
    assert type(data["key"]) is type(value)


def test_every_key_has_its_line():
    _, lines = parse_yaml("a:\n  b: 1\n\n  c: {d: 2}\n", "a.yaml")
    assert lines == {"a": 1, "a.b": 2, "a.c": 4, "a.c.d": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1, 2\n", ["a.yaml:3:1", "not valid YAML"]),
        ("a: 1\n b: 2\n", ["a.yaml:2:3", "not valid YAML"]),
        ("a:\n\t- 1\n", ["a.yaml:2:1", "not valid YAML"]),
        ("a: 1\nb: {c: 2, c: 3}\n", ["a.yaml:2", "b.c", "twice", "line 2"]),
        ("a: 1\nb: 1\na: 2\n", ["a.yaml:3", "a: given twice", "line 1"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["a.yaml:1:4", "!!python/object/apply:os.system", "plain data"]),
        ("a: !mine 3\n", ["a.yaml:1:4", "!mine"]),
        ("a: !!int x\n", ["a.yaml:1:4", "!!int"]),
        ("a: &x 1\nb: *x\n", ["a.yaml:1:4", "anchors"]),
        ("b: *x\n", ["a.yaml:1:4", "aliases"]),
        ("a: 1\n2: 3\n", ["a.yaml:2", "key must be text", "2"]),
        ("? [a]\n: 3\n", ["a.yaml:1", "key must be text"]),
        ("a: 1\n---\nb: 2\n", ["a.yaml:2", "another document"]),
        ("a: 1\nb: \x01\n", ["a.yaml:2", "#x0001"]),
        ("[" * 5000, ["a.yaml", "nested too deep"]),
        ("a: " + "1" * 5000, ["a.yaml", "not valid YAML"]),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(text, words):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@given(st.text(alphabet="ab:-[]{}!&*#?|>'\"%@`, \n\t0.~$", max_size=30))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_data_or_a_config_error(text):
    message = "a.yaml: read"
    try:
        parse_yaml(text, "a.yaml")
    except ConfigError as error:
        message = str(error)
    assert message.startswith("a.yaml:")
    assert "\n" not in message


@pytest.mark.parametrize("digits", ["9" * 5000, "0x" + "f" * 5000, "1" + "_" * 5000 + "1" * 500])
def test_an_integer_of_thousands_of_digits_is_one_line(digits):
    with pytest.raises(ConfigError, match=r"^a\.yaml:1:7: not valid YAML: an integer of \d+ digits is too large"):
        parse_yaml(f"seed: {digits}", "a.yaml")


@pytest.mark.parametrize(("text", "value"), [("+12", 12), ("-1_000", -1000), ("0x1F", 31), ("-0x10", -16), ("0", 0)])
def test_integers_keep_their_value(text, value):
    assert parse_yaml(text, "a.yaml")[0] == value
