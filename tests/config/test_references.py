"""`${key.path}` becomes the value of that key; nothing else can be referred to."""

import os

import pytest

from leakfree.config.references import resolve_references
from leakfree.errors import ConfigError

TREE = {"seed": 3, "name": "x", "model": {"sizes": [1, 2], "lr": 0.5}}


def resolve(value):
    return resolve_references({**TREE, "new": value}, lambda key: f"a.yaml:{key}")["new"]


def test_a_lone_reference_keeps_the_type():
    assert resolve("${seed}") == 3
    assert resolve("${model.sizes}") == [1, 2]
    assert resolve("${model.lr}") == 0.5


def test_a_reference_inside_text_becomes_text():
    assert resolve("out/${name}/${seed}") == "out/x/3"


def test_a_reference_in_a_list_and_through_another_reference():
    tree = resolve_references({**TREE, "a": ["${seed}", 1], "b": "${c}", "c": "${seed}"}, str)
    assert (tree["a"], tree["b"]) == ([3, 1], 3)


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "${now:%Y}", "${.seed}", "${seed", "${}", "${a${seed}}", "\\${seed}", "${model[lr]}"]
)
def test_other_interpolations_are_refused(text):
    with pytest.raises(ConfigError, match=r"^a\.yaml:new: new: .*only \$\{key\.path\} of this config"):
        resolve(text)


def test_the_environment_cannot_be_read():
    os.environ["LEAKFREE_TEST_SECRET"] = "secret"
    with pytest.raises(ConfigError) as caught:
        resolve("${oc.env:LEAKFREE_TEST_SECRET}")
    assert "'secret'" not in str(caught.value)


def test_an_unknown_reference_names_the_nearest_key():
    with pytest.raises(ConfigError, match=r"\$\{sed\} is not a key of this config; did you mean seed\?"):
        resolve("${sed}")


def test_a_section_and_a_circle_are_refused():
    with pytest.raises(ConfigError, match="is a section"):
        resolve("${model}")
    with pytest.raises(ConfigError, match=r"^a\.yaml:new: new: Recursive"):
        resolve("${new}")


def test_references_that_multiply_are_refused_before_they_are_put_in():
    laughs = {"a0": "lol"} | {f"a{level}": "${a%d}" % (level - 1) * 9 for level in range(1, 60)}  # noqa: UP031
    with pytest.raises(ConfigError, match=r"^a\.yaml:a\d+: a\d+: its references stand for \d+ characters; at most"):
        resolve_references(laughs, lambda key: f"a.yaml:{key}")
    few = resolve_references(dict(list(laughs.items())[:4]), str)
    assert few["a3"] == "lol" * 9**3
