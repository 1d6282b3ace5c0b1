import ast
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from leakfree.shuffle.nest import replace_tensors, tensors_of


class _Pair(NamedTuple):
    boxes: object
    scores: object


_others = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3))
_nests = st.recursive(
    st.one_of(_others, st.integers(0, 9).map(lambda number: torch.tensor([number]))),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(_Pair, inner, inner),
    ),
    max_leaves=12,
)


def _plain(value):
    """A nest with its tensors as ("tensor", number), to be compared."""
    if isinstance(value, Tensor):
        return ("tensor", int(value))
    if isinstance(value, dict):
        return (type(value), [(key, _plain(item)) for key, item in value.items()])
    if isinstance(value, (tuple, list)):
        return (type(value), [_plain(item) for item in value])
    return value


@given(_nests)
def test_taking_out_and_putting_back_changes_nothing(nest):
    before = _plain(nest)
    found = tensors_of(nest, "x")
    assert _plain(replace_tensors(nest, (tensor for _, tensor in found))) == before
    others = [torch.tensor([100 + number]) for number in range(len(found))]
    changed = replace_tensors(nest, iter(others))
    assert [int(tensor) for _, tensor in tensors_of(changed, "x")] == [100 + n for n in range(len(found))]
    assert [path for path, _ in tensors_of(changed, "x")] == [path for path, _ in found]
    assert _plain(nest) == before  # the given nest itself stays as it was


@given(_nests)
def test_a_path_leads_to_its_tensor(nest):
    found = tensors_of(nest, "nest")
    assert len({path for path, _ in found}) == len(found)
    for path, tensor in found:
        assert _follow(nest, path) is tensor


def _follow(value, path):
    """What stands at the path, read as Python would."""
    steps = []
    node = ast.parse(path, mode="eval").body
    while not isinstance(node, ast.Name):
        steps.append(node)
        node = node.value
    for step in reversed(steps):
        value = getattr(value, step.attr) if isinstance(step, ast.Attribute) else value[ast.literal_eval(step.slice)]
    return value


def test_paths_are_those_of_python():
    nest = {"rows": torch.zeros(1), "pair": _Pair((torch.zeros(1), 3), [None, torch.zeros(1)])}
    paths = [path for path, _ in tensors_of(nest, "out")]
    assert paths == ["out['rows']", "out['pair'].boxes[0]", "out['pair'].scores[1]"]


@pytest.mark.parametrize(
    "nest",
    [
        OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
        defaultdict(list, b=torch.ones(1)),
        torch.eye(3).max(1),  # torch's own named results
        torch.eye(3).sort(),
        {"size": torch.Size([2, 3]), "x": torch.ones(1)},
    ],
    ids=lambda nest: type(nest).__name__,
)
def test_relatives_of_dict_and_tuple_keep_their_type(nest):
    found = tensors_of(nest, "x")
    again = replace_tensors(nest, (tensor + 1 for _, tensor in found))
    assert type(again) is type(nest)
    for (_, old), (_, new) in zip(found, tensors_of(again, "x"), strict=True):
        assert torch.equal(new, old + 1)
    if isinstance(nest, defaultdict):
        assert again.default_factory is nest.default_factory


def test_a_parameter_is_a_tensor():
    parameter = nn.Parameter(torch.ones(2))
    ((path, found),) = tensors_of([parameter], "x")
    assert path == "x[0]"
    assert found is parameter


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", 1j, torch.float32, range(3)])
def test_other_values_are_refused_with_their_path_and_type(value):
    with pytest.raises(TypeError, match=rf"cannot shuffle input\['a'\]\[1\] of type {type(value).__name__}; use"):
        tensors_of({"a": (torch.zeros(1), value)}, "input")
