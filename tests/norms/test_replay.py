"""Forwards that run twice, out of order, compiled, copied or saved: each counts once and keeps its groups."""

import contextlib
import copy
import itertools
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.norms import build_norm, image_partition, normalization_scope
from leakfree.shuffle import Shuffled
from tests.ranks import run_ranks

C = 3
ROWS = 12
NORMS = {"BN": {}, "SyncBN": {}, "GhostBN": {"group_size": 4}, "ShuffleBN": {"num_groups": 3}}
modes = pytest.mark.parametrize("reentrant", [False, True])


def _x(seed=0, num_rows=ROWS, dtype=torch.float64):
    return torch.randn(num_rows, C, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _scope(seed=0, num_rows=ROWS):
    """A head's scope: four images with other numbers of rows at each seed."""
    cuts = torch.randperm(num_rows + 1, generator=torch.Generator().manual_seed(seed))[:3].sort().values.tolist()
    return normalization_scope(
        image_partition([b - a for a, b in itertools.pairwise([0, *cuts, num_rows])], 1, across_ranks=False)
    )


class Head(nn.Module):
    """Two convolutions and norms; opens its scope itself, or finds it open, or goes without."""

    def __init__(self, kind, scope="open"):
        super().__init__()
        torch.manual_seed(0)
        first, second = (build_norm(kind, C, **NORMS[kind]) for _ in range(2))
        self.layers = nn.Sequential(
            *(nn.Conv2d(C, C, 3, padding=1), first, nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Conv2d(C, C, 3, padding=1), second, nn.ReLU(inplace=True), nn.Conv2d(C, 2, 1)),
        )
        self.scope = scope
        self.double()

    def forward(self, x, seed=0):
        with _scope(seed, len(x)) if self.scope == "own" else contextlib.nullcontext():
            return self.layers(x)

    @property
    def norms(self):
        return [self.layers[1], self.layers[5]]


def _head(kind, scope="open"):
    """A head, or for "Shuffled" one whose rows are shuffled."""
    return Shuffled(Head("BN", "none"), 3) if kind == "Shuffled" else Head(kind, scope)


def _norms(head):
    return [module for module in head.modules() if hasattr(module, "last_groups")]


def _forward(head, x, seed, reentrant):
    """The scalar of a forward, checkpointed unless ``reentrant`` is None; the dropout is that of the seed."""
    torch.manual_seed(seed)
    own = isinstance(head, Head) and head.scope == "own"
    args = (x, seed) if own else (x,)
    opened = isinstance(head, Head) and head.scope == "open"
    with _scope(seed, len(x)) if opened else contextlib.nullcontext():
        y = head(*args) if reentrant is None else checkpoint(head, *args, use_reentrant=reentrant)
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum()


def _state(head):
    """All that training may have changed: gradients, then state."""
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    return gradients + [value.clone() for value in head.state_dict().values()]


def _assert_same(one, other):
    """Bitwise, for lists of tensors."""
    off = [float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in zip(one, other, strict=True)]
    assert off == [0.0] * len(off)


def _train(head, reentrant, seeds=(0, 1, 2)):
    """Gradients of all inputs, then the state, after forwards and backwards in turn."""
    out = []
    for seed in seeds:
        x = _x(seed).requires_grad_(True)
        _forward(head, x, seed, reentrant).backward()
        out.append(x.grad)
    return out + _state(head)


@modes
@pytest.mark.parametrize("scope", ["open", "own", "none"])
@pytest.mark.parametrize("kind", NORMS)
def test_checkpointing_changes_nothing(kind, scope, reentrant):
    plain, saving = _head(kind, scope), _head(kind, scope)
    _assert_same(_train(plain, None), _train(saving, reentrant))
    assert [int(norm.num_batches_tracked) for norm in saving.norms] == [3, 3]


@modes
def test_checkpointing_a_shuffled_head_changes_nothing(reentrant):
    plain, saving = _head("Shuffled"), _head("Shuffled")
    _assert_same(_train(plain, None), _train(saving, reentrant))
    assert int(saving.num_draws) == 3


def _pending(head, reentrant, order, inputs=(0, 1, 2)):
    """Forwards on all inputs first, then their backwards in some order."""
    xs = [_x(seed).requires_grad_(True) for seed in inputs]
    losses = [_forward(head, x, seed, reentrant) for seed, x in enumerate(xs)]
    for index in order:
        losses[index].backward()
    return [x.grad for x in xs] + _state(head)


PENDING = [("BN", "open"), ("BN", "own"), ("GhostBN", "none"), ("ShuffleBN", "open"), ("ShuffleBN", "none")]


@modes
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize(("kind", "scope"), [*PENDING, ("Shuffled", "none")])
def test_forwards_may_wait_for_backwards_in_any_order(kind, scope, order, reentrant):
    plain, saving = _head(kind, scope), _head(kind, scope)
    _assert_same(_pending(plain, None, order), _pending(saving, reentrant, order))


@modes
def test_one_backward_through_several_forwards(reentrant):
    gradients = []
    for mode in (None, reentrant):
        head = _head("ShuffleBN")
        sum(_forward(head, _x(seed).requires_grad_(True), seed, mode) for seed in range(3)).backward()
        gradients.append(_state(head))
    _assert_same(*gradients)


@modes
@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
@pytest.mark.parametrize(("kind", "scope"), [("BN", "open"), ("ShuffleBN", "none"), ("Shuffled", "none")])
def test_equal_inputs_with_other_groups_are_exact_or_refused(kind, scope, order, reentrant):
    """The first norm sees equal inputs: nothing but the forward's place in time tells them apart."""
    plain, saving = _head(kind, scope), _head(kind, scope)
    try:
        result = _pending(saving, reentrant, order, inputs=(0, 0))
    except RuntimeError as error:
        assert "several forwards with the same input wait for their recomputation" in str(error)  # noqa: PT017
    else:
        _assert_same(_pending(plain, None, order, inputs=(0, 0)), result)


@modes
@pytest.mark.parametrize(("kind", "scope"), [*PENDING, ("Shuffled", "none")])
def test_the_same_input_again_after_its_backward(kind, scope, reentrant):
    """The same batch in each step, as when a model is made to overfit it."""
    plain, saving = _head(kind, scope), _head(kind, scope)
    results = []
    for head, mode in ((plain, None), (saving, reentrant)):
        x = _x().requires_grad_(True)
        for step in range(3):
            _forward(head, x, step, mode).backward()
        results.append([x.grad, *_state(head)])
    _assert_same(*results)


def test_equal_inputs_with_equal_groups_may_wait_together():
    results = []
    for mode in (None, False):
        head = _head("BN")
        x = _x().requires_grad_(True)
        losses = [_forward(head, x, 0, mode) for _ in range(2)]
        losses[0].backward()
        losses[1].backward()
        results.append([x.grad, *_state(head)])
    _assert_same(*results)


@modes
def test_a_forward_without_gradient_in_between_is_not_taken_for_the_one_that_waits(reentrant):
    results = []
    for mode in (None, reentrant):
        head = _head("ShuffleBN", "none")
        x = _x().requires_grad_(True)
        loss = _forward(head, x, 0, mode)
        with torch.no_grad():  # in training mode: it draws, too
            _forward(head, x, 1, None)
        try:
            loss.backward()
        except RuntimeError as error:  # may be refused, but never be wrong
            assert "cannot be told apart" in str(error) and reentrant  # noqa: PT017, PT018
            return
        results.append([x.grad, *_state(head)])
    _assert_same(*results)


def test_a_forward_whose_loss_is_dropped_is_forgotten():
    results = []
    for mode in (None, False):
        head = _head("ShuffleBN", "none")
        x = _x().requires_grad_(True)
        _forward(head, x, 0, mode)  # its graph dies here
        _forward(head, x, 1, mode).backward()
        results.append([x.grad, *_state(head)])
    _assert_same(*results)


@pytest.mark.parametrize("kind", ["BN", "ShuffleBN", "Shuffled"])
@pytest.mark.parametrize("reentrant", [None, False])  # torch's reentrant mode takes no second backward
def test_a_second_backward_through_a_kept_graph_doubles_the_gradients(kind, reentrant):
    head = _head(kind)
    loss = _forward(head, _x().requires_grad_(True), 0, reentrant)
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in head.parameters()]
    buffers = [buffer.clone() for buffer in head.buffers()]
    loss.backward()
    for parameter, gradient in zip(head.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * gradient)
    _assert_same(buffers, list(head.buffers()))


@modes
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of the inner one
def test_checkpoints_in_a_checkpoint(reentrant):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([Head("ShuffleBN", "none"), Head("ShuffleBN", "none")])
            self.between = nn.Conv2d(2, C, 1).double()

        def forward(self, x):
            x = checkpoint(self.heads[0], x, use_reentrant=reentrant) if self.saving else self.heads[0](x)
            x = self.between(x)
            return checkpoint(self.heads[1], x, use_reentrant=reentrant) if self.saving else self.heads[1](x)

    torch.manual_seed(0)
    plain = Outer()
    saving = copy.deepcopy(plain)
    plain.saving, saving.saving = False, True
    _assert_same(_train(plain, None), _train(saving, reentrant))


@modes
def test_a_head_shared_by_levels_in_one_scope(reentrant):
    results = []
    for mode in (None, reentrant):
        head = _head("ShuffleBN", "none")
        levels = [_x(seed)[:, :, :size, :size].clone().requires_grad_(True) for seed, size in enumerate((4, 2, 3))]
        with normalization_scope():
            loss = sum(_forward(head, level, seed, mode) for seed, level in enumerate(levels))
        loss.backward()
        results.append([level.grad for level in levels] + _state(head))
    _assert_same(*results)


@modes
def test_a_recomputation_leaves_no_trace(reentrant):
    """Afterwards the layer tells the groups of its last forward, not of the last one recomputed."""
    head = _head("ShuffleBN", "none")
    losses = [_forward(head, _x(seed).requires_grad_(True), seed, reentrant) for seed in range(2)]
    last = [norm.last_groups.clone() for norm in head.norms]
    losses[1].backward()
    losses[0].backward()
    _assert_same(last, [norm.last_groups for norm in head.norms])


def _lookalikes():
    """Batches that differ, but not in the middle of their first and last row: dark borders, empty scenes."""
    xs = [_x(seed) for seed in range(2)]
    for x in xs:
        x[[0, -1]] = 0
    return xs


@modes
@pytest.mark.parametrize("kind", ["ShuffleBN", "Shuffled"])
def test_inputs_that_agree_in_part_are_told_apart(kind, reentrant):
    results = []
    for mode in (None, reentrant):
        head = _head(kind, "none")
        xs = [x.requires_grad_(True) for x in _lookalikes()]
        losses = [_forward(head, x, seed, mode) for seed, x in enumerate(xs)]
        losses[0].backward()
        losses[1].backward()
        results.append([x.grad for x in xs] + _state(head))
    _assert_same(*results)


@modes
def test_batches_of_other_sizes_that_agree_in_part_are_told_apart(reentrant):
    results = []
    for mode in (None, reentrant):
        head = _head("ShuffleBN", "none")
        xs = [x.requires_grad_(True) for x in (_lookalikes()[0], _lookalikes()[0][[*range(8), -1]])]
        losses = [_forward(head, x, seed, mode) for seed, x in enumerate(xs)]
        losses[0].backward()
        losses[1].backward()
        results.append([x.grad for x in xs] + _state(head))
    _assert_same(*results)


class Unrepeatable(nn.Module):
    """Adds noise that no random state brings back, so that a recomputed forward has another input."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return x + torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


@modes
@pytest.mark.parametrize("kind", ["BN", "ShuffleBN", "Shuffled"])
def test_a_forward_that_cannot_be_found_again_is_refused(kind, reentrant):
    model = nn.Sequential(Unrepeatable(), _head(kind, "none"))
    x = _x().requires_grad_(True)
    with _scope():
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="its input is that of no recent forward"):
        y.sum().backward()


@modes
@pytest.mark.parametrize("kind", ["BN", "SyncBN", "GhostBN"])
def test_groups_that_follow_from_the_input_need_not_be_found_again(kind, reentrant):
    """Outside a scope there is no decision to repeat: noise in a recomputed forward is no fault of the norm's."""
    model = nn.Sequential(Unrepeatable(), _head(kind, "none"))
    checkpoint(model, _x().requires_grad_(True), use_reentrant=reentrant).sum().backward()
    assert [int(norm.num_batches_tracked) for norm in model[1].norms] == [1, 1]


@modes
@pytest.mark.parametrize("kind", ["BN", "SyncBN", "GhostBN"])
def test_any_number_of_forwards_may_wait_where_nothing_is_decided(kind, reentrant):
    seeds = range(40)
    plain, saving = _head(kind, "none"), _head(kind, "none")
    _assert_same(_pending(plain, None, seeds, seeds), _pending(saving, reentrant, seeds, seeds))


@modes
@pytest.mark.parametrize("kind", ["BN", "ShuffleBN", "Shuffled"])
def test_more_forwards_than_are_remembered_are_exact_or_refused(kind, reentrant):
    seeds = range(40)
    plain, saving = _head(kind), _head(kind)
    try:
        result = _pending(saving, reentrant, seeds, seeds)
    except RuntimeError as error:
        assert "its input is that of no recent forward" in str(error)  # noqa: PT017
    else:
        _assert_same(_pending(plain, None, seeds, seeds), result)


def test_gradient_accumulation_adds_up():
    gradients = []
    for seeds in [(0,), (1,), (0, 1)]:
        head = _head("GhostBN")  # its groups know no count of draws
        _train(head, False, seeds)
        gradients.append([parameter.grad for parameter in head.parameters()])
    for a, b, both in zip(*gradients, strict=True):
        torch.testing.assert_close(a + b, both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["frozen", "eval"])
@pytest.mark.parametrize("kind", ["ShuffleBN", "Shuffled"])
def test_a_frozen_or_eval_layer_draws_nothing(kind, how):
    """Forwards in between leave no trace: the next training forward draws what it would have drawn."""
    one, other = _head(kind, "none"), _head(kind, "none")
    for step in range(3):
        _forward(one, _x(step), step, None)
        _forward(other, _x(step), step, None)
        groups = [norm.last_groups for norm in _norms(other)]
        _assert_same([norm.last_groups for norm in _norms(one)], groups)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        if how == "eval":
            other.eval()
        elif kind == "ShuffleBN":
            for norm in _norms(other):
                norm.frozen = True
        else:
            continue  # a frozen norm in a shuffled head: the rows still move
        with normalization_scope() as scope:
            _forward(other, _x(7), 7, None)
        assert scope.num_shuffles == 0
        _assert_same(groups, [norm.last_groups for norm in _norms(other)])
        _assert_same(before.values(), other.state_dict().values())
        other.train()
        for norm in _norms(other):
            norm.frozen = False


@modes
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [*NORMS, "Shuffled"])
def test_copies_go_on_where_the_layer_is(kind, how, reentrant):
    head = _head(kind)
    waiting = _forward(head, _x(9).requires_grad_(True), 9, reentrant)
    twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    waiting.backward()  # the copy left the layer what it remembered
    head.zero_grad()
    _assert_same(_train(head, reentrant), _train(twin, reentrant))


@modes
@pytest.mark.parametrize("kind", ["ShuffleBN", "Shuffled"])
def test_a_state_dict_continues_the_draws(kind, reentrant):
    head, twin = _head(kind), _head(kind)
    _train(head, reentrant)
    twin.load_state_dict(head.state_dict())
    head.zero_grad()
    _assert_same(_train(head, reentrant, (5, 6)), _train(twin, reentrant, (5, 6)))


@modes
@pytest.mark.parametrize("kind", ["BN", "ShuffleBN"])
def test_autocast_and_channels_last(kind, reentrant):
    results = []
    for mode in (None, reentrant):
        head = _head(kind).float().to(memory_format=torch.channels_last)
        x = _x(dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = _forward(head, x, 0, mode)
        loss.backward()
        assert x.grad.dtype == torch.float32
        results.append([x.grad, *_state(head)])
    _assert_same(*results)


def _train_compiled(kind, compile_head):
    head = _head(kind, "none")
    head.layers[3].p = 0.0  # a compiler draws its dropout its own way
    run, out = compile_head(head), []
    for seed in range(2):
        x = _x(seed).requires_grad_(True)
        with _scope(seed):
            y = run(x)
        (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        out += [y.detach(), x.grad]
    return out + _state(head)


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["head", "checkpointed head", "head that checkpoints"])
@pytest.mark.parametrize("kind", ["BN", "ShuffleBN"])
def test_compiled_heads_are_those_of_eager_mode(kind, where, backend):
    def compile_head(head):
        if where == "head that checkpoints":
            return torch.compile(lambda x: checkpoint(head, x, use_reentrant=False), backend=backend)
        compiled = torch.compile(head, backend=backend)
        if where == "head":
            return compiled
        return lambda x: checkpoint(compiled, x, use_reentrant=False)

    torch.compiler.reset()
    for ours, eager in zip(_train_compiled(kind, compile_head), _train_compiled(kind, lambda head: head), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-12)


@modes
@pytest.mark.parametrize("kind", ["BN", "ShuffleBN"])
def test_a_compiled_head_in_a_checkpoint_counts_once(kind, reentrant):
    torch.compiler.reset()
    head = _head(kind, "none")
    compiled = torch.compile(head, backend="aot_eager")
    for seed in range(2):
        with _scope():
            y = checkpoint(compiled, _x(seed).requires_grad_(True), use_reentrant=reentrant)
        y.sum().backward()
    assert [int(norm.num_batches_tracked) for norm in head.norms] == [2, 2]


def test_a_batch_norm_outside_a_scope_compiles_into_one_graph():
    torch.compiler.reset()
    norm, twin = build_norm("BN", C), build_norm("BN", C)
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.testing.assert_close(compiled(_x(seed, dtype=torch.float32)), twin(_x(seed, dtype=torch.float32)))
    assert int(norm.num_batches_tracked) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_inside_and_outside_a_scope_may_wait_together(order):
    """Buffers that move in between must not disturb the backward of either."""
    gradients = []
    for together in (True, False):
        head, xs = _head("BN", "none"), [_x(seed).requires_grad_(True) for seed in range(2)]
        losses = []
        for seed, x in enumerate(xs):
            with _scope() if seed == order[0] else contextlib.nullcontext():
                losses.append(_forward(head, x, seed, None))
            if not together:
                losses[-1].backward()
        for loss in losses if together else ():
            loss.backward()
        gradients.append([x.grad for x in xs] + _state(head))
    _assert_same(*gradients)


def _train_on_ranks(rank, world_size, kind, batches, reentrant, order):
    """Forwards on all batches of a round, then backwards in order."""
    head, out = _head(kind), []
    for sizes in batches:
        xs, losses = [], []
        for seed, shares in enumerate(sizes):
            xs.append(_x(seed, sum(shares)).split(shares)[rank].clone().requires_grad_(True))
            losses.append(_forward(head, xs[-1], seed, reentrant))
        for index in order:
            losses[index].backward()
        out += [x.grad for x in xs]
    return [tensor.numpy() for tensor in out + _state(head)]


def _assert_alike_on_ranks(kind, batches, reentrant, order):
    plain = run_ranks(_train_on_ranks, 2, kind, batches, None, order, timeout=10)
    saving = run_ranks(_train_on_ranks, 2, kind, batches, reentrant, order, timeout=10)
    for rank in range(2):
        _assert_same(map(torch.from_numpy, plain[rank]), map(torch.from_numpy, saving[rank]))


@modes
@pytest.mark.parametrize("sizes", [(7, 5), (12, 0)])
@pytest.mark.parametrize("kind", ["SyncBN", "ShuffleBN", "Shuffled"])
def test_checkpointing_on_ranks_changes_nothing(kind, sizes, reentrant):
    _assert_alike_on_ranks(kind, [[sizes]] * 3, reentrant, (0,))


@modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["SyncBN", "ShuffleBN", "Shuffled"])
def test_forwards_on_ranks_may_wait_for_their_backwards(kind, order, reentrant):
    _assert_alike_on_ranks(kind, [[(7, 5), (4, 6)]] * 2, reentrant, order)


@modes
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("round_", [[(8, 0), (5, 0)], [(0, 0), (8, 5)], [(8, 5), (0, 0)]], ids=str)
@pytest.mark.parametrize("kind", ["SyncBN", "ShuffleBN", "Shuffled"])
def test_a_rank_without_rows_finds_its_forwards_too(kind, round_, order, reentrant):
    """All its inputs are alike, and yet its part in each exchange is another one."""
    _assert_alike_on_ranks(kind, [round_] * 2, reentrant, order)
