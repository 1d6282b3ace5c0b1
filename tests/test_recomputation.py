import copy
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from leakfree.recomputation import Replay, recomputing


class Graph:
    """Stands for the graph of a forward: alive while someone holds it."""


def _same(a, b):
    return a == b


def _replay(**options):
    return Replay("Layer", _same, **options)


def _x(seed=0, *shape):
    return torch.randn(shape or (6, 3, 4, 4), generator=torch.Generator().manual_seed(seed))


def test_only_a_forward_in_a_backward_is_a_recomputation():
    told = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: told.append(recomputing()))
    with torch.no_grad():
        told.append(recomputing())
    y.sum().backward()
    assert [*told, recomputing()] == [False, True, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_once_in_the_forward_and_once_in_the_backward(reentrant):
    told = []

    def forward(x):
        told.append(recomputing())
        return x.sin().cos()

    y = checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
    assert told == [False]
    y.sum().backward()
    assert told == [False, True]
    assert not recomputing()


def test_a_backward_in_a_recomputation_does_not_end_it():
    told = []

    def forward(x):
        with torch.enable_grad():
            weight = torch.ones(1, requires_grad=True)
            torch.autograd.grad(weight.square(), weight)
        told.append(recomputing())
        return x.sin()

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert told == [False, True]


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4), (6, 3, 2, 4, 4), (1, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_forward_is_found_by_its_input(shape, dtype):
    replay = _replay()
    xs = [_x(seed, *shape).to(dtype) for seed in range(3 if 0 not in shape else 1)]
    for number, x in enumerate(xs):
        replay.remember(x, number)
    assert [replay.recall(x.clone()) for x in xs] == list(range(len(xs)))


def _like(x, change):
    return {
        "values": x + 1,
        "dtype": x.double(),
        "device": x.to("meta"),
        "fewer rows": x[[0, 1, -1]],
        "row shape": x[:, :, :3],
        "a row in the middle": torch.cat([x[:2], x[2:3] + 1, x[3:]]),
        "a border": x + torch.nn.functional.pad(torch.zeros(4, 2), (1, 1), value=1.0),
        "no rows": x[:0],
        "no values": x[:, :, :, :0],
    }[change]


CHANGES = [
    *("values", "dtype", "device", "fewer rows", "row shape"),
    *("a row in the middle", "a border", "no rows", "no values"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_input_is_not_taken_for_it(change):
    replay, x = _replay(), _x()
    replay.remember(x, "groups")
    assert replay.recall(_like(x, change)) is None
    assert replay.recall(x) == "groups"


@pytest.mark.parametrize("change", ["fewer rows", "a row in the middle", "a border"])
def test_inputs_that_agree_in_part_are_told_apart(change):
    replay, x = _replay(), _x()
    other = _like(x, change)
    graphs = [Graph(), Graph()]
    replay.remember(x, "groups", graphs[0])
    replay.remember(other, "other groups", graphs[1])
    assert replay.recall(x) == "groups"
    assert replay.recall(other) == "other groups"


def test_empty_inputs_of_other_shapes_are_told_apart():
    replay = _replay()
    replay.remember(torch.zeros(0, 3), "three")
    assert replay.recall(torch.zeros(0, 5)) is None
    assert replay.recall(torch.zeros(0, 3)) == "three"


def test_nan_is_found_again():
    replay, x = _replay(), _x()
    x[:] = float("nan")
    replay.remember(x, "groups")
    assert replay.recall(x.clone()) == "groups"


def test_a_forward_that_ran_again_makes_way_for_one_that_waits():
    replay, x, graphs = _replay(), _x(), [Graph(), Graph()]
    replay.remember(x, "first", graphs[0])
    assert replay.recall(x) == "first"
    assert replay.recall(x) == "first"  # a graph that was kept runs once more
    replay.remember(x, "second", graphs[1])
    assert replay.recall(x) == "second"


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_forward_without_a_graph_makes_way(dropped):
    replay, x, graphs = _replay(), _x(), [Graph(), Graph()]
    for graph, value in zip(graphs, ("first", "second"), strict=True):
        replay.remember(x, value, graph)
    del graph
    graphs[dropped] = None
    assert replay.recall(x) == ("second", "first")[dropped]


@pytest.mark.parametrize("watched", [True, False])
def test_forwards_that_cannot_be_told_apart_are_refused(watched):
    replay, x, graphs = _replay(), _x(), [Graph(), Graph()]
    state = torch.get_rng_state()
    for graph, value in zip(graphs, ("first", "second"), strict=True):
        torch.set_rng_state(state)  # not even that differs
        replay.remember(x, value, graph if watched else None)
    torch.set_rng_state(state)
    with pytest.raises(RuntimeError, match="Layer: several forwards with the same input wait"):
        replay.recall(x)


def test_forwards_that_decided_alike_need_not_be_told_apart():
    replay, x, graphs = _replay(), _x(), [Graph(), Graph()]
    for graph in graphs:
        replay.remember(x, "groups", graph)
    assert [replay.recall(x) for _ in range(3)] == ["groups"] * 3


def test_the_oldest_are_forgotten():
    replay = _replay(size=2)
    for seed in range(3):
        replay.remember(_x(seed), seed)
    assert [replay.recall(_x(seed)) for seed in range(3)] == [None, 1, 2]


@pytest.mark.parametrize("shape", [(64, 3), (64, 3, 4), (64, 3, 4, 4)])
def test_neither_the_input_nor_the_graph_is_kept_alive(shape):
    replay, x, graph = _replay(), _x(0, *shape), Graph()
    replay.remember(x, "groups", graph)
    storage, twin = StorageWeakRef(x.untyped_storage()), x.clone()
    del x, graph
    assert storage.expired()
    replay.remember(twin, "other groups", keep := Graph())
    assert replay.recall(twin) == "other groups"
    assert keep


def test_what_is_remembered_does_not_change_with_the_input():
    replay, x = _replay(), _x()
    before = x.clone()
    replay.remember(x, "groups")
    x.relu_()
    assert replay.recall(before) == "groups"
    assert replay.recall(x) is None


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda replay: pickle.loads(pickle.dumps(replay))])
def test_a_copy_remembers_nothing_and_leaves_the_original(how):
    replay, x, graph = _replay(size=2), _x(), Graph()
    replay.remember(x, "groups", graph)
    twin = how(replay)
    assert twin.recall(x) is None
    for seed in range(3):
        twin.remember(_x(seed), seed, graph)
    assert [twin.recall(_x(seed)) for seed in range(3)] == [None, 1, 2]
    assert replay.recall(x) == "groups"
    assert replay.recall(_x(2)) is None
