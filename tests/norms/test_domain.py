"""DomainBN against torch's batch norms, one for each domain."""

import contextlib
import copy
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import (
    DomainBatchNorm,
    batch_statistics,
    build_norm,
    convert_norms,
    domain,
    image_partition,
    normalization_scope,
)
from leakfree.population import precise_bn
from tests.norms import equations
from tests.norms.cases import assert_close, batch, gradients, probe
from tests.ranks import run_ranks

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
STEPS = [[0, 2, 0, 1, 2, 2, 1, 0, 2], [1, 1, 0, 1, 0, 0], [2, 2, 2, 2], [0, 1, 2, 2, 1, 0, 0]]  # domains of the rows
CHOICES = list(itertools.product(("domain", "shared"), ("domain", "shared"), ("shared", "separate")))


def _x(num_rows, shape=(4, 4), seed=0, dtype=torch.float64):
    return batch(seed, num_rows, shape, dtype, channels=3)


def _norm(choice=("domain", "domain", "shared"), *, num_domains=3, **options):
    training, running, affine = choice
    norm = build_norm(
        "DomainBN",
        3,
        num_domains=num_domains,
        **({"train_statistics": training, "running_statistics": running, "affine": affine} | options),
    ).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return norm


def _trained(choice=("domain", "domain", "shared"), **options):
    norm = _norm(choice, **options)
    for seed, ids in enumerate(STEPS):
        with domain(torch.tensor(ids)):
            norm(_x(len(ids), seed=seed))
    return norm


def _rows_of(table, ids):
    """The row of each id of a (D, C) table, as (N, C, 1, 1); of a (C,) table the same for all."""
    table = table.expand(len(ids), -1) if table.ndim == 1 else table[ids]
    return table[:, :, None, None]


def _reference(norm, x, ids):
    """The training output by the equations."""
    equation = equations.DomainBatchNorm(3, norm.num_domains, norm.train_statistics, norm.running_statistics)
    return equation.train(x, dict(norm.named_parameters()), ids)


# ------------------------------------------------------------------------------------ against torch


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mixed", [True, False])
def test_it_is_a_batch_norm_of_torch_for_each_domain(dim, momentum, mixed):
    norm = _norm(affine="separate", dim=dim, momentum=momentum)
    twins = [TORCH[dim](3, momentum=momentum).double() for _ in range(3)]
    for index, twin in enumerate(twins):
        twin.weight.data.copy_(norm.weight[index])
        twin.bias.data.copy_(norm.bias[index])
    for seed, ids in enumerate(map(torch.tensor, STEPS)):
        x = _x(len(ids), (3,) * dim, seed).requires_grad_(True)
        copy_of_x = x.detach().clone().requires_grad_(True)
        y, expected = torch.zeros_like(x), torch.zeros_like(x)
        if mixed:
            with domain(ids):
                y = norm(x)
        for index in ids.unique().tolist():
            rows = (ids == index).nonzero()[:, 0]
            expected = expected.index_put((rows,), twins[index](copy_of_x[rows]))
            if not mixed:
                with domain(index):
                    y = y.index_put((rows,), norm(x[rows]))
        (y * probe(x)).sum().backward()
        (expected * probe(x)).sum().backward()
        assert_close([y, x.grad], [expected, copy_of_x.grad])
    for index, twin in enumerate(twins):
        assert_close([norm.weight.grad[index], norm.bias.grad[index]], [twin.weight.grad, twin.bias.grad])
        assert_close([buffer[index] for buffer in norm.buffers()], twin.buffers())
        with domain(index):
            assert_close([norm.eval()(x)], [twin.eval()(x)])


@pytest.mark.parametrize("choice", CHOICES)
def test_one_domain_for_all_rows_is_the_tensor_of_its_index(choice):
    one, other = _trained(choice), _trained(choice)
    for mode in (True, False):
        one.train(mode)
        other.train(mode)
        with domain(1):
            ours = gradients(one, _x(6, seed=9), one.parameters())
        with domain(torch.full((6,), 1)):
            theirs = gradients(other, _x(6, seed=9), other.parameters())
        assert_close(ours, theirs)
        assert_close(one.buffers(), other.buffers())


@pytest.mark.parametrize("bias", [True, False])
def test_without_weight_or_bias(bias):
    norm, ids = _norm(affine=False), torch.tensor([0, 2, 2, 0, 0])
    with domain(ids):
        y = norm(_x(5))
        norm.eval()(_x(5))
    assert_close([y], [_reference(build_norm("DomainBN", 3, num_domains=3), _x(5), ids)])
    source = nn.BatchNorm2d(3, bias=bias).double()
    converted = convert_norms(source, "DomainBN", num_domains=3, affine="separate", train_statistics="shared")
    assert (converted.bias is None) != bias
    with domain(ids):
        for mode in (False, True):
            assert_close([converted.train(mode)(_x(5))], [source.train(mode)(_x(5))])


def test_a_domain_without_rows_is_untouched_bit_for_bit():
    norm = _trained().float()
    before = {name: buffer[1].clone() for name, buffer in norm.named_buffers()}
    with domain(torch.tensor([0, 0, 2, 2])):
        norm(_x(4, dtype=torch.float32))
    assert all(torch.equal(buffer[1], before[name]) for name, buffer in norm.named_buffers())
    assert norm.num_batches_tracked.tolist() == [4, 3, 4]


def test_one_graph_may_hold_calls_of_every_kind():
    """A call that updates statistics leaves alone what the backward of an earlier one needs."""
    calls = [
        (torch.tensor([0, 1, 1, 0, 2, 2]), True),
        (0, True),
        (0, False),
        (torch.tensor([2, 2, 0, 0, 2, 0]), False),
        (torch.tensor([0, 0, 0, 1, 1, 1]), True),
        (1, True),
    ]

    def run(backward_at_once):
        norm, x = _trained(affine="separate"), _x(6, seed=3).requires_grad_(True)
        losses = []
        for key, mode in calls:
            norm.train(mode)
            with domain(key):
                loss = (norm(x) * probe(x)).sum()
            loss.backward() if backward_at_once else losses.append(loss)
        if losses:
            sum(losses).backward()
        return [x.grad, norm.weight.grad, norm.bias.grad]

    assert_close(run(False), run(True))


# ------------------------------------------------------------------------- levels of a pyramid


def _levels():
    return {
        name: _x(2, shape, seed)
        for seed, (name, shape) in enumerate({"p3": (4, 4), "p4": (2, 2), "p5": (1, 2)}.items())
    }


def _on_levels(norm, levels, run):
    leaves = {name: level.clone().requires_grad_(True) for name, level in levels.items()}
    outputs = run(leaves)
    norm.zero_grad()
    sum((outputs[name] * probe(level)).sum() for name, level in levels.items()).backward()
    grads = [leaf.grad for leaf in (*leaves.values(), *norm.parameters())]
    return [*(outputs[name].detach() for name in levels), *grads]


@pytest.mark.parametrize("order", [["p3", "p4", "p5"], ["p5", "p3"], ["p4"]])
@pytest.mark.parametrize("choice", CHOICES)
def test_levels_with_shared_statistics_are_one_batch_laid_side_by_side(choice, order):
    names = ["p3", "p4", "p5"]
    norm = _norm(choice, domain_names=names)
    twin = copy.deepcopy(norm)
    levels = {name: _levels()[name] for name in order}

    def one_by_one(leaves):
        outputs = {}
        for name, leaf in leaves.items():
            with domain(name):
                outputs[name] = twin(leaf)
        return outputs

    def side_by_side(leaves):
        flat = torch.cat([leaf.flatten(2) for leaf in leaves.values()], 2)
        parts = F.batch_norm(flat, None, None, training=True).split([leaf[0, 0].numel() for leaf in leaves.values()], 2)
        weights, biases = (
            dict(zip(names, t, strict=True)) if t.ndim == 2 else dict.fromkeys(names, t)
            for t in (norm.weight, norm.bias)
        )
        return {
            name: part.view(leaf.shape) * weights[name][:, None, None] + biases[name][:, None, None]
            for (name, leaf), part in zip(leaves.items(), parts, strict=True)
        }

    together = norm.train_statistics == "shared"
    ours = _on_levels(norm, levels, norm)
    assert_close(ours, _on_levels(norm, levels, side_by_side) if together else _on_levels(twin, levels, one_by_one))
    if together and norm.running_statistics == "domain":
        for name in names:
            one = nn.BatchNorm2d(3).double()
            if name in levels:
                one(levels[name])
            assert_close([buffer[names.index(name)] for buffer in norm.buffers()], one.buffers())
    elif together:
        one = nn.BatchNorm1d(3).double()
        one(torch.cat([level.flatten(2) for level in levels.values()], 2))
        assert_close(norm.buffers(), one.buffers())
    else:
        assert_close(norm.buffers(), twin.buffers())
    twin.load_state_dict(norm.state_dict())
    norm.eval()
    twin.eval()
    assert_close(_on_levels(norm, levels, norm), _on_levels(twin, levels, one_by_one))


@pytest.mark.parametrize("training", ["domain", "shared"])
def test_levels_keep_their_layout_and_may_be_changed_in_place(training):
    norm = _norm((training, "domain", "shared"))
    levels = {index: level.to(memory_format=torch.channels_last) for index, level in enumerate(_levels().values())}
    results = []
    for inplace in (False, True):
        outputs = []

        def run(leaves, outputs=outputs, inplace=inplace):
            normalized = norm(leaves)
            outputs.extend(normalized.values())
            return {index: F.relu(y, inplace=inplace) for index, y in normalized.items()}

        results.append(_on_levels(norm, levels, run))
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
    assert_close(*results)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_levels_in_every_dimension(dim):
    norm = _norm(("shared", "domain", "separate"), num_domains=2, dim=dim)
    shapes = [(5,) * dim, (2,) * dim]
    outputs = norm({index: _x(3, shape) for index, shape in enumerate(shapes)})
    assert [y.shape for y in outputs.values()] == [(3, 3, *shape) for shape in shapes]
    assert norm.num_batches_tracked.tolist() == [1, 1]
    if dim == 1:
        assert [y.shape for y in norm({0: _x(3, ()), 1: _x(3, (4,))}).values()] == [(3, 3), (3, 3, 4)]


# ------------------------------------------------------------------------------------- over ranks


def _on_rank(rank, world_size, choice, sizes, ids):
    """Two steps and an evaluation on this rank's rows: outputs, input gradients, parameter gradients, buffers."""
    norm = _norm(choice, across_ranks=True)
    ids = torch.tensor(ids)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    outputs, grads = [], []
    for seed in range(2):
        x = _x(sum(sizes), seed=seed)
        leaf = x[mine].clone().requires_grad_(True)
        own = ids[mine]
        alone = len(own.unique()) == 1 and seed == 0  # the index, too, while others give a tensor
        with domain(int(own[0]) if alone else own):
            y = norm(leaf)
        (y * probe(x)[mine]).sum().backward()
        outputs.append(y.detach())
        grads.append(leaf.grad)
    norm.eval()
    if rank == 0:  # evaluation is local
        with domain(1):
            norm(_x(2))
    parameters = torch.stack([norm.weight.grad, norm.bias.grad])
    return torch.stack(outputs, 1), torch.stack(grads, 1), parameters, list(norm.buffers())


@pytest.mark.parametrize(
    ("sizes", "ids"),
    [
        ([4, 4], [0, 1, 2, 1, 2, 2, 0, 0]),
        ([3, 5], [1, 1, 1, 0, 2, 2, 0, 2]),  # a rank with one domain
        ([6, 0], [0, 2, 2, 0, 2, 0]),  # an empty rank, a missing domain
        ([2, 3, 4], [0, 0, 1, 1, 1, 2, 2, 2, 2]),  # a domain on each rank
        ([3, 0, 5], [2, 2, 0, 0, 1, 1, 0, 0]),
    ],
)
@pytest.mark.parametrize("choice", [c for c in CHOICES if c[2] == "shared"] + [("shared", "domain", "separate")])
def test_domains_over_all_ranks_equal_one_process(choice, sizes, ids):
    shards = run_ranks(_on_rank, len(sizes), choice, sizes, ids)
    y, dx, parameters, buffers = _on_rank(0, 1, choice, [sum(sizes)], ids)
    assert_close([torch.cat([shard[0] for shard in shards])], [y])
    assert_close([torch.cat([shard[1] for shard in shards])], [dx])
    assert_close([sum(shard[2] for shard in shards)], [parameters])
    for shard in shards:
        assert_close(shard[3], buffers)


def _levels_on_rank(rank, world_size, training, sizes):
    norm = _norm((training, "domain", "separate"), across_ranks=True)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    levels = {index: _x(sum(sizes), (size, size), index) for index, size in ((2, 3), (0, 2))}
    leaves = {index: level[mine].clone().requires_grad_(True) for index, level in levels.items()}
    outputs = norm(leaves)
    sum((y * probe(levels[index])[mine]).sum() for index, y in outputs.items()).backward()
    grads = [leaf.grad for leaf in leaves.values()]
    return [*(y.detach() for y in outputs.values()), *grads], norm.weight.grad, list(norm.buffers())


@pytest.mark.parametrize("training", ["domain", "shared"])
@pytest.mark.parametrize("sizes", [[2, 3], [4, 0]])
def test_levels_over_all_ranks_equal_one_process(training, sizes):
    shards = run_ranks(_levels_on_rank, 2, training, sizes)
    rows, weight, buffers = _levels_on_rank(0, 1, training, [sum(sizes)])
    assert_close([torch.cat(parts) for parts in zip(*(shard[0] for shard in shards), strict=True)], rows)
    assert_close([sum(shard[1] for shard in shards)], [weight])
    for shard in shards:
        assert_close(shard[2], buffers)


def _all_empty(rank, world_size):
    norm = _norm(across_ranks=True)
    with domain(rank):
        norm(_x(0)).sum().backward()
    return norm.num_batches_tracked.tolist(), norm.running_mean.abs().sum().item(), norm.weight.grad.abs().sum().item()


def test_all_ranks_empty_neither_hangs_nor_counts():
    assert run_ranks(_all_empty, 2) == [([0, 0, 0], 0.0, 0.0)] * 2


def _uneven_eval(rank, world_size):
    norm = _norm(across_ranks=True, track_running_stats=False).eval()
    with domain(torch.tensor([0, 1, 1, 0])):
        return [norm(_x(4)).shape for _ in range(1 + rank)]


def test_eval_without_buffers_communicates_nothing():
    run_ranks(_uneven_eval, 2, timeout=20)


def _apart(rank, world_size):
    norm = _norm()
    with domain(rank):
        norm(_x(4, seed=rank))
    return norm.num_batches_tracked.tolist()


def test_ranks_stay_apart_by_default():
    assert run_ranks(_apart, 2) == [[1, 0, 0], [0, 1, 0]]


# --------------------------------------------------------------------------------- modes and flags


def test_last_groups_are_the_domains_of_a_mixed_batch():
    norm, ids = _norm(), torch.tensor([2, 0, 2, 0])
    with domain(ids):
        norm(_x(4))
        assert norm.last_groups.tolist() == ids.tolist()
        norm.eval()(_x(4))
        assert norm.last_groups.tolist() == ids.tolist()
    with domain(1):
        norm.train()(_x(4))
    assert norm.last_groups is None
    shared = _norm(("shared", "domain", "shared"))
    with domain(ids):
        shared(_x(4))
    assert shared.last_groups is None


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_a_frozen_layer_uses_the_buffers_of_the_one_domain(affine):
    norm = _trained(affine=affine)
    with domain(1):
        expected = norm.eval()(_x(5))
        norm.frozen = True
        before = copy.deepcopy(norm.state_dict())
        assert torch.equal(norm.train()(_x(5)), expected)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("affine", ["shared", "separate"])
def test_batch_statistics_measures_it_under_the_scopes_groups(affine):
    norm = _trained(affine=affine).eval()
    norm.frozen = True
    before = copy.deepcopy(norm.state_dict())
    x, ids = _x(6), torch.tensor([2, 0, 0, 1, 1, 2])
    needs = domain(ids) if affine == "separate" else contextlib.nullcontext()  # else no domain is looked at
    with batch_statistics(norm), normalization_scope(image_partition([4, 2], 1)), needs:
        y = norm(x)
    normal = torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split([4, 2])])
    assert_close([y], [normal * _rows_of(norm.weight, ids) + _rows_of(norm.bias, ids)])
    with batch_statistics(norm), domain(2):
        y = norm(x)
    weight, bias = _rows_of(norm.weight, torch.full((6,), 2)), _rows_of(norm.bias, torch.full((6,), 2))
    assert_close([y], [F.batch_norm(x, None, None, training=True) * weight + bias])
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_a_scope_around_it_changes_nothing():
    norm, ids = _norm(), torch.tensor([0, 0, 1, 1, 0])
    with normalization_scope(image_partition([2, 3], 1)), domain(ids):
        y = norm(_x(5))
    assert_close([y], [_reference(norm, _x(5), ids)])


@pytest.mark.parametrize("training", ["domain", "shared"])
def test_without_buffers_eval_takes_the_batchs_own_statistics_of_each_domain(training):
    norm, ids = _norm((training, "domain", "shared"), track_running_stats=False).eval(), torch.tensor([0, 2, 2, 0, 0])
    assert not list(norm.buffers())
    with domain(ids):
        assert_close([norm(_x(5))], [_reference(norm, _x(5), ids)])
        norm.frozen = True
        with pytest.raises(LeakfreeError, match="frozen, but it keeps no running statistics"):
            norm(_x(5))


@pytest.mark.parametrize("mode", [True, False])
def test_torch_compile_sees_every_change_of_domain(mode):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), _trained(affine="separate").float(), nn.ReLU()).train(mode)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")

    @torch.compile(backend="aot_eager")
    def opens_it_inside(x, key):
        with domain(key):
            return last(x)

    last = copy.deepcopy(model)
    for seed, key in enumerate([0, 1, torch.tensor([2, 2, 1, 1]), torch.tensor([0, 0, 1, 1]), 0]):
        x = _x(4, seed=seed, dtype=torch.float32)
        with domain(key):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(opens_it_inside(x, key), expected)
    for other in (twin, last):
        torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))


# ------------------------------------------------------------------------------ the context


def test_the_innermost_context_holds_until_it_closes():
    norm = _norm()
    with domain(0):
        with domain(2):
            norm(_x(4))
        with pytest.raises(RuntimeError, match="stop"), domain(1):
            raise RuntimeError("stop")
        norm(_x(4))
    assert norm.num_batches_tracked.tolist() == [1, 0, 1]
    with pytest.raises(LeakfreeError):
        norm(_x(4))


def test_names_and_skipped_levels():
    norm = _norm(domain_names=["p3", "p4", "p5"])
    for name in ("p5", "p3", "p5"):
        with domain(name):
            norm(_x(4))
    assert norm.num_batches_tracked.tolist() == [1, 0, 2]
    assert norm.index_of("p5") == norm.index_of(2) == 2


def test_a_thread_of_its_own_has_a_domain_of_its_own():
    norms, told = [_norm(), _norm()], []

    def work():
        try:
            norms[0](_x(4))
        except LeakfreeError as error:
            told.append(str(error))
        with domain(2):
            both_open.wait(10)
            norms[0](_x(4))

    both_open = threading.Barrier(2)
    thread = threading.Thread(target=work)
    with domain(1):
        thread.start()
        both_open.wait(10)
        norms[1](_x(4))
        thread.join()
    assert len(told) == 1
    assert [norm.num_batches_tracked.tolist() for norm in norms] == [[0, 0, 1], [0, 1, 0]]


def test_changing_the_tensor_later_changes_nothing():
    norm, ids, x = _norm(), torch.tensor([0, 0, 1, 1, 2, 2]), _x(6).requires_grad_(True)
    with domain(ids):
        y = norm(x)
    ids.fill_(0)
    (y * probe(x)).sum().backward()
    leaf = _x(6).requires_grad_(True)
    (_reference(norm, leaf, torch.tensor([0, 0, 1, 1, 2, 2])) * probe(x)).sum().backward()
    assert_close([x.grad], [leaf.grad])


# ------------------------------------------------------------------------- activation checkpointing


def _block(affine="separate"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1).double(), _trained(affine=affine), nn.ReLU())


def _step(model, calls, run, where="outside"):
    """One backward over calls of (x, key); gradients and buffers."""
    model.zero_grad()
    loss, leaves = 0.0, []
    for x, key in calls:
        leaves.append(x.clone().requires_grad_(True))
        with domain(key):
            loss = loss + (run(leaves[-1]) * probe(x)).sum()
    if where == "in another thread":
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        with domain(1) if where == "in another domain" else contextlib.nullcontext():
            loss.backward()
    return [*(leaf.grad for leaf in leaves), *(p.grad for p in model.parameters()), *model.buffers()]


CALLS = [
    (_x(6, seed=1), 0),
    (_x(6, seed=2), torch.tensor([1, 0, 2, 2, 1, 0])),
    (_x(6, seed=3), 2),
    (_x(0), 1),
    (_x(0), torch.tensor([], dtype=torch.int64)),
]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("where", ["outside", "in another domain", "in another thread"])
def test_checkpointing_repeats_the_domain_wherever_the_backward_runs(reentrant, mode, where):
    model = _block().train(mode != "eval")
    model[1].frozen = mode == "frozen"
    twin = copy.deepcopy(model)
    expected = _step(twin, CALLS, twin)
    ours = _step(model, CALLS, lambda x: checkpoint(model, x, use_reentrant=reentrant), where)
    assert_close(ours, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_context_inside_the_checkpointed_function_comes_first(reentrant):
    model = _block()
    twin = copy.deepcopy(model)
    x = _x(6)

    def run(leaf, key):
        with domain(key):
            return model(leaf)

    leaf = x.clone().requires_grad_(True)
    y = sum((key + 1) * checkpoint(run, leaf, key, use_reentrant=reentrant) for key in range(3))  # of the same input
    with domain(0):
        (y * probe(x)).sum().backward()
    other = x.clone().requires_grad_(True)
    for key in range(3):
        with domain(key):
            ((key + 1) * twin(other) * probe(x)).sum().backward()
    assert_close([leaf.grad, *(p.grad for p in model.parameters())], [other.grad, *(p.grad for p in twin.parameters())])
    assert_close(model.buffers(), twin.buffers())


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_input_in_several_domains_is_refused_when_it_cannot_be_told_apart(reentrant):
    model, x = _block(), _x(6).requires_grad_(True)
    loss = 0.0
    for key in (0, 1):
        with domain(key):
            loss = loss + checkpoint(model, x, use_reentrant=reentrant).sum()
    with pytest.raises(LeakfreeError, match="on the same input but in different domains"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_input_in_several_domains_step_after_step(reentrant):
    model, twin = _block(), _block()
    for key in (0, 1, 0, torch.tensor([0, 1, 0, 1, 2, 2])):
        ours = _step(model, [(_x(6), key)], lambda x: checkpoint(model, x, use_reentrant=reentrant))
        assert_close(ours, _step(twin, [(_x(6), key)], twin))
        for other in (model, twin):
            _step(other, [(_x(6), 2)], other)  # without a checkpoint


@pytest.mark.parametrize("reentrant", [True, False])
def test_forwards_without_gradient_between_do_not_lead_astray(reentrant):
    model, x = _block(), _x(6)
    with torch.inference_mode(), domain(1):  # can never be recomputed
        model(x)
    leaf = x.clone().requires_grad_(True)
    with domain(0):
        y = checkpoint(model, leaf, use_reentrant=reentrant)
    with torch.inference_mode(), domain(1):
        model(x)
    with torch.no_grad(), domain(2):
        model(_x(6, seed=1))
    (y * probe(x)).sum().backward()
    twin, other = _block(), x.clone().requires_grad_(True)
    with domain(0):
        (twin(other) * probe(x)).sum().backward()
    assert_close([leaf.grad], [other.grad])


def test_a_forward_that_is_not_remembered_is_refused():
    model, x = _block(), _x(6).requires_grad_(True)
    with domain(0):
        y = checkpoint(model, x, use_reentrant=False)
    for seed in range(40):
        with domain(1):
            model(_x(6, seed=100 + seed))
    with pytest.raises(LeakfreeError, match="cannot be found again"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", ["domain", "shared"])
def test_checkpointing_of_levels(reentrant, training):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 3, 1).double(), _norm((training, "domain", "separate"))
    twin = copy.deepcopy(norm)

    def head(norm):
        return lambda *levels: tuple(norm(dict(enumerate(map(conv, levels)))).values())

    def run(of):
        return lambda leaves: dict(zip(leaves, of(*leaves.values()), strict=True))

    ours = _on_levels(norm, _levels(), run(lambda *levels: checkpoint(head(norm), *levels, use_reentrant=reentrant)))
    assert_close(ours, _on_levels(twin, _levels(), run(head(twin))))
    assert_close(norm.buffers(), twin.buffers())


# ------------------------------------------------------------------------------------------ errors


def test_no_domain_is_one_clear_error_that_says_how_to_give_it():
    for mode in (True, False):
        with pytest.raises(
            LeakfreeError, match=r"inside `with leakfree\.norms\.domain\(k\):`.* 3 domains, or int64 \(N,\)"
        ):
            _norm().train(mode)(_x(4))
    with pytest.raises(LeakfreeError, match=r"index or name \(a, b, c\)"):
        _norm(domain_names=["a", "b", "c"])(_x(4))


@pytest.mark.parametrize("mode", [True, False])
def test_no_domain_is_needed_where_nothing_depends_on_it(mode):
    norm, twin = _norm(("shared", "shared", "shared")).train(mode), nn.BatchNorm2d(3).double().train(mode)
    twin.load_state_dict(norm.state_dict())
    assert torch.equal(norm(_x(4)), twin(_x(4)))
    _norm(("domain", "shared", "shared")).eval()(_x(4))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (3, "domain 3 is out of range; the layer has 3 domains, from 0 to 2"),
        (-1, "domain -1 is out of range"),
        (torch.tensor([0, 1, 3, 0]), "domain 3 is out of range"),
        (torch.tensor([0, -2, 0, 0]), "domain -2 is out of range"),
        (torch.tensor([0, 1, 2]), "the domains of 3 rows are given, but the input has 4"),
        (torch.tensor([0, 1, 2, 1], dtype=torch.int32), r"expected .* got torch.int32 of shape \(4,\)"),
        (torch.tensor(1), r"expected .* got torch.int64 of shape \(\)"),
        (torch.tensor([[0, 1, 2, 1]]), r"expected .* got torch.int64 of shape \(1, 4\)"),
        (1.0, "expected an index, a name, or an int64 tensor .* got 1.0"),
        (True, "expected .* got True"),
        (None, "expected .* got None"),
        ("p3", "domain 'p3' is a name, but the layer has no domain_names; give an index from 0 to 2"),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_wrong_domains_are_named(key, message, mode):
    norm = _norm().train(mode)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(LeakfreeError, match=message), domain(key):
        norm(_x(4))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_unknown_names_list_the_known_nearest_first():
    with pytest.raises(LeakfreeError, match="no domain 'sketches'; choose from sketch, art, photo"), domain("sketches"):
        _norm(domain_names=["art", "photo", "sketch"])(_x(4))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ({}, "expected a tensor for each of some domains, got none"),
        ({"a": _x(2), 0: _x(2)}, r"expected a tensor for each of some domains, got \['a', 0\]"),
        ({"a": _x(2), "d": _x(2)}, "no domain 'd'"),
        ({"a": _x(2), "b": _x(3)}, r"the same number of rows, got \(2, 3, 4, 4\), \(3, 3, 4, 4\)"),
        ({"a": _x(2), "b": _x(2, (4,))}, r"expects \(N, 3, \*\)"),
    ],
)
def test_wrong_levels_are_named(levels, message):
    with pytest.raises(ValueError, match=message):
        _norm(("shared", "domain", "shared"), domain_names=["a", "b", "c"])(levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "num_domains"),
        ({"num_domains": 0}, "num_domains must be at least 1, got 0"),
        ({"num_domains": 2, "domain_names": ["a"]}, r"domain_names must be 2 different names, got \['a'\]"),
        ({"num_domains": 2, "domain_names": ["a", "a"]}, "2 different names"),
        ({"num_domains": 2, "train_statistics": "level"}, "train_statistics must be 'domain' or 'shared', got 'level'"),
        ({"num_domains": 2, "running_statistics": "none"}, "running_statistics must be"),
        ({"num_domains": 2, "affine": "own"}, "affine must be 'shared', 'separate' or a bool, got 'own'"),
        ({"num_domain": 2}, "no option 'num_domain'; it takes num_domains"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_norm("DomainBN", 3, **options)


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match=r"DomainBatchNorm\(3, dim=2\) expects .* got \(4, 3, 4\)"), domain(0):
        _norm()(_x(4, (4,)))


# -------------------------------------------------------------------------------------- conversion


def _model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Conv2d(3, 2, 1)).double()
    for seed in range(3):
        model(_x(8, seed=seed))
    return model


@pytest.mark.parametrize("affine", ["shared", "separate"])
@pytest.mark.parametrize("source", ["BN", "SyncBN", "FrozenBN"])
def test_every_domain_starts_from_the_converted_norm(affine, source):
    model = convert_norms(_model().eval(), source)
    expected, old = model(_x(6)), model[1]
    convert_norms(model, "DomainBN", num_domains=3, affine=affine)
    norm = model[1]
    assert isinstance(norm, DomainBatchNorm)
    assert (norm.momentum, norm.dim, norm.training) == (0.3, 2, False)
    assert all(parameter.requires_grad for parameter in norm.parameters())
    assert norm.num_batches_tracked.tolist() == [3, 3, 3]
    with domain(torch.tensor([0, 1, 2, 2, 1, 0])):
        assert_close([model(_x(6))], [expected])
    if affine == "shared":
        assert norm.weight is old.weight
    else:
        assert norm.weight.shape == (3, 3)
        norm.weight.data[0] = 0  # copies: neither the old norm's nor each other's
        assert_close([norm.weight[1]], [old.weight])


@pytest.mark.parametrize("affine", ["shared", "separate"])
@pytest.mark.parametrize("target", ["BN", "FrozenBN"])
def test_the_way_back_is_for_one_domain(affine, target):
    model = nn.ModuleDict(
        {"head": convert_norms(_model(), "DomainBN", num_domains=2, domain_names=["a", "b"], affine=affine)}
    )
    head = model["head"]
    with domain(torch.tensor([0, 0, 0, 1, 1, 1, 1])):
        head(_x(7, seed=9))
    with pytest.raises(ConfigError, match=r"^head\.1: .* each of 2 domains.* choose one with `domain`, among a, b"):
        convert_norms(model, target)
    with pytest.raises(ConfigError, match=r"^head\.1: .*no domain 'c'"):
        convert_norms(model, target, domain="c")
    assert isinstance(head[1], DomainBatchNorm)
    head.eval()
    with domain("b"):
        expected = head(_x(4))
    weight = head[1].weight
    convert_norms(model, target, domain="b")
    assert_close([head(_x(4))], [expected])
    assert (head[1].weight is weight) == (affine == "shared")
    assert head[1].weight.requires_grad == (target == "BN")
    with pytest.raises(ConfigError, match="domain=1: there is no DomainBN to convert"):
        convert_norms(model, "BN", domain=1)


def test_what_the_domains_share_converts_without_a_choice():
    norm = _trained(("domain", "shared", "shared"))
    plain = convert_norms(norm, "BN")
    assert plain.weight is norm.weight
    assert torch.equal(plain.eval()(_x(4)), norm.eval()(_x(4)))
    assert convert_norms(_trained(), "GN", num_groups=3).weight.shape == (3,)
    with pytest.raises(ConfigError, match="with a weight for each of 3 domains"):
        convert_norms(_trained(affine="separate"), "GN", num_groups=3)
    with pytest.raises(ConfigError, match="with a weight for each of 3 domains"):
        convert_norms(_trained(affine="separate", running_statistics="shared"), "BN", affine=False)


def test_what_does_not_train_does_not_train_after_conversion():
    source = nn.BatchNorm2d(3)
    source.bias.requires_grad_(False)
    norm = convert_norms(source, "DomainBN", num_domains=2, affine="separate")
    assert [parameter.requires_grad for parameter in norm.parameters()] == [True, False]
    plain = convert_norms(norm, "BN", domain=1)
    assert [parameter.requires_grad for parameter in plain.parameters()] == [True, False]


def test_a_domain_norm_converts_to_as_many_domains():
    norm = _trained()
    again = convert_norms(norm, "DomainBN", num_domains=3, across_ranks=True)
    assert again.across_ranks
    assert again is not norm
    assert all(torch.equal(value, norm.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(ConfigError, match="running_mean for each of 3 domains"):
        convert_norms(again, "DomainBN", num_domains=4)
    four = convert_norms(again, "DomainBN", num_domains=4, domain=1)
    assert torch.equal(four.running_var, norm.running_var[1].expand(4, 3))


def test_a_frozen_layer_stays_frozen_through_conversion():
    norm = convert_norms(_trained(), "BN", domain=2)
    assert not norm.frozen
    norm.frozen = True
    assert convert_norms(norm, "DomainBN", num_domains=2).frozen
    assert convert_norms(convert_norms(norm, "DomainBN", num_domains=2), "BN", domain=0).frozen


# ----------------------------------------------------------------------------- precise statistics


def _batches():
    return [(_x(len(ids), seed=30 + seed), torch.tensor(ids)) for seed, ids in enumerate(STEPS)]


def _in_its_domain(model, batch):
    with domain(batch[1]):
        model(batch[0])


@pytest.mark.parametrize("choice", CHOICES)
def test_precise_statistics_are_those_of_each_domains_data(choice):
    norm = _trained(choice)
    before = norm.num_batches_tracked.clone()
    result = precise_bn(nn.ModuleDict({"n": norm}), _batches(), forward=lambda m, b: _in_its_domain(m["n"], b))
    x, ids = (torch.cat(parts) for parts in zip(*_batches(), strict=True))
    separate = norm.running_statistics == "domain"
    parts = [x[ids == index] for index in range(3)] if separate else [x]
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts])
    var = torch.stack([part.var((0, 2, 3)) for part in parts])
    assert_close([norm.running_mean, norm.running_var], [mean, var] if separate else [mean[0], var[0]])
    assert list(result.layers) == (["n[0]", "n[1]", "n[2]"] if separate else ["n"])
    assert result.num_samples == len(x)
    assert torch.equal(norm.num_batches_tracked, before)


def test_precise_statistics_of_one_domain_leave_the_others_alone():
    norm = _trained(domain_names=["photo", "art", "sketch"])
    before = copy.deepcopy(norm.state_dict())

    def forward(model, batch):
        with domain("art"):
            model["n"](batch)

    result = precise_bn(nn.ModuleDict({"n": norm}), [_x(6, seed=1), _x(2, seed=2)], forward=forward)
    assert list(result.layers) == ["n[art]"]
    assert result.untouched == ("n[photo]", "n[sketch]")
    x = torch.cat([_x(6, seed=1), _x(2, seed=2)])
    assert_close([norm.running_mean[1], norm.running_var[1]], [x.mean((0, 2, 3)), x.var((0, 2, 3))])
    for index in (0, 2):
        assert torch.equal(norm.running_mean[index], before["running_mean"][index])
        assert torch.equal(norm.running_var[index], before["running_var"][index])


@pytest.mark.parametrize("choice", CHOICES)
def test_precise_statistics_of_levels(choice):
    norm = _norm(choice, domain_names=["p3", "p4", "p5"])
    precise_bn(norm, [_levels()], forward=lambda model, levels: model(levels))
    flat = [level.flatten(2) for level in _levels().values()]
    if norm.running_statistics == "domain":
        mean, var = (torch.stack([of.mean((0, 2)) for of in flat]), torch.stack([of.var((0, 2)) for of in flat]))
    else:
        mean, var = torch.cat(flat, 2).mean((0, 2)), torch.cat(flat, 2).var((0, 2))
    assert_close([norm.running_mean, norm.running_var], [mean, var])


def test_precise_statistics_without_a_domain_are_refused_and_change_nothing():
    norm = _trained()
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(LeakfreeError, match="the domain of the rows is not known"):
        precise_bn(norm, [_x(4)])
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def _precise_on_rank(rank, world_size, across):
    norm = _norm(across_ranks=across)
    precise_bn(norm, _batches()[2 * rank : 2 * rank + 2], forward=_in_its_domain)
    return norm.running_mean, norm.running_var


@pytest.mark.parametrize("across", [True, False])
def test_precise_statistics_over_ranks_equal_one_process(across):
    norm = _norm()
    precise_bn(norm, _batches(), forward=_in_its_domain)
    for mean, var in run_ranks(_precise_on_rank, 2, across):
        assert_close([mean, var], [norm.running_mean, norm.running_var])


def _out_of_step(rank, world_size):
    with pytest.raises(LeakfreeError, match="communicates in its forward"):
        precise_bn(_norm(across_ranks=True), _batches()[: 1 + rank], forward=_in_its_domain)


def test_precise_statistics_need_ranks_in_step_where_domains_meet():
    run_ranks(_out_of_step, 2)
