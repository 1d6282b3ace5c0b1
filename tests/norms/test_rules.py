"""The rules that every norm obeys; what is special about one is in its own file."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from leakfree.norms import (
    Partition,
    batch_statistics,
    build_norm,
    convert_norms,
    double_forward,
    normalization_scope,
)
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.norms.cases import (
    BATCH_NORMS,
    CASES,
    DOMAIN_NORMS,
    FROZEN,
    INDEPENDENT_NORMS,
    MIXED_DOMAINS,
    ONE_DOMAIN,
    VARIANTS,
    C,
    assert_close,
    batch,
    changed,
    gradients,
    named,
    probe,
)
from tests.norms.equations import IndependentNorm
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:ShuffleBN")
BATCH_KEYS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
HALF = ["bfloat16", "channels last bfloat16", "bfloat16 in autocast", "channels last bfloat16 in autocast"]
HALF_OF_TORCH = ["bfloat16", "channels last bfloat16", "float32 in autocast"]  # whose group norm changes the dtype
SHAPES = [(), (5,), (1, 4), (4, 3), (2, 2, 2)]
COMPILED = [case for case in CASES if case not in DOMAIN_NORMS and case.title != "BGN 1"]  # domains: test_domain.py


def _each(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


def _shapes(cases, shapes=SHAPES):
    pairs = [(case, shape) for case, shape in itertools.product(cases, shapes) if shape or not case.needs_positions()]
    return pytest.mark.parametrize(("case", "shape"), pairs, ids=str)


def _by_equations(case, norm, method):
    """The forward of the equations with the parameters of ``norm``, in the groups of its last forward."""
    parameters = dict(norm.named_parameters())
    return lambda leaf: method(leaf, parameters, case.groups_of(norm, len(leaf)))


def _taught(case, norm, steps=3):
    """The equations after the training forwards of ``case.trained``, for a copy of which ``norm`` is taken."""
    equation = case.equation()
    for step in range(steps):
        x = batch(step)
        equation.train(x, {name: p.detach() for name, p in norm.named_parameters()}, case.groups_of(norm, len(x)))
    return equation


# ------------------------------------------------------------------------------------ equations


def _assert_follows(case, shape, steps):
    norm, equation = case.make(), case.equation()
    for step in range(steps):
        x = batch(step, 6 + step % 4, shape)
        ours = gradients(case.forward(norm), x, norm.parameters())
        assert_close(ours, gradients(_by_equations(case, norm, equation.train), x, norm.parameters()))
        for name, value in equation.buffers().items():
            table = norm.get_buffer(name)
            assert_close([table[: len(value)] if name.startswith("memory_") and value.ndim else table], [value])
    assert any(getattr(equation, "clipped", [True]))  # that correction is not left out
    x, before = batch(50, 6, shape), copy.deepcopy(norm.state_dict())
    ours = gradients(case.forward(norm.eval()), x, norm.parameters())
    assert_close(ours, gradients(_by_equations(case, norm, equation.evaluate), x, norm.parameters()))
    assert not changed(before, norm)


@_shapes(CASES)
def test_outputs_gradients_and_buffers_are_those_of_the_equations(case, shape):
    _assert_follows(case, shape, 2 if case in INDEPENDENT_NORMS else 7)


@_shapes(VARIANTS, [(), (4, 3)])
def test_so_they_are_with_other_options(case, shape):
    _assert_follows(case, shape, 7)


@_shapes(CASES, [(4, 3), (2,)])
def test_a_batch_of_one_is_defined_by_its_positions(case, shape):
    """A domain without rows keeps its statistics."""
    norm, equation = case.make(), case.equation()
    for step in range(2):
        x = batch(step, 1, shape)
        ours = gradients(case.forward(norm), x, norm.parameters())
        assert_close(ours, gradients(_by_equations(case, norm, equation.train), x, norm.parameters()), 1e-8)
    ours = gradients(case.forward(norm.eval()), x, norm.parameters())
    assert_close(ours, gradients(_by_equations(case, norm, equation.evaluate), x, norm.parameters()))


@_each(CASES)
@pytest.mark.parametrize("train", [True, False])
def test_gradcheck(case, train):
    """From the same state each time: a forward moves it. Where BatchRenorm clips, r and d are constants."""
    options = {"ramp": None, "r_max": 1.1, "d_max": 0.05} if case.name == "BatchRenorm" else {}
    norm = case.trained(0 if options else 2, **options).train(train)
    names = [name for name, _ in norm.named_parameters()]

    def run(x, *parameters):
        layer = copy.deepcopy(norm)
        with case.around(len(x)):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    x = 3 * batch(9, 3, (2,)) + 2
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (x, *norm.parameters())]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------ state


def _keys(case):
    return {"weight", "bias"} if case.kind == "independent" else BATCH_KEYS


@_each(CASES)
def test_a_loaded_a_copied_and_a_pickled_layer_go_on_alike(case):
    norm, loaded = case.trained(), case.trained(1)
    extra = {"proxy_scale", "proxy_shift"} if case.name == "ProxyNorm" else set(case.extra)
    assert set(norm.state_dict()) == _keys(case) | extra
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.load_state_dict(copy.deepcopy(norm.state_dict()))
    others = [loaded, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
    for step in range(3, 7):
        for layer in (norm, *others):
            layer.train(step < 6)
        expected = gradients(case.forward(norm), batch(step), norm.parameters())
        for other in others:
            assert all(map(torch.equal, gradients(case.forward(other), batch(step), other.parameters()), expected))
            assert not changed(norm.state_dict(), other)


def test_a_copys_state_is_its_own():
    for case in BATCH_NORMS:
        norm = case.trained()
        before = copy.deepcopy(norm.state_dict())
        case.forward(copy.deepcopy(norm))(batch(7))
        assert not changed(before, norm)


@_each([case for case in BATCH_NORMS if case.name != "CBN"])  # it has `reset_window`
def test_reset_forgets_everything(case):
    norm = case.trained()
    norm.reset_running_stats()
    assert not changed(case.make().state_dict(), norm)


# ------------------------------------------------------------------------------------ modes and tools


@_each([*BATCH_NORMS, *MIXED_DOMAINS])  # FreezeBN refuses domains that have seen nothing
def test_a_frozen_layer_uses_its_buffers_and_leaves_them_alone(case):
    model = nn.Sequential(case.trained())
    expected = _by_equations(case, model[0], _taught(case, model[0]).frozen)
    before = copy.deepcopy(model.state_dict())
    FreezeBN(at=0).step(model, 0, 10)
    for mode in (True, False):
        ours = gradients(case.forward(model.train(mode)), batch(5), model.parameters())
        if mode or case.name != "BatchStatBN":
            assert_close(ours, gradients(expected, batch(5), model.parameters()))
    assert not changed(before, model)


@_each([*BATCH_NORMS, *DOMAIN_NORMS])
def test_the_batchs_own_statistics_on_request(case):
    """No correction, no past, no buffers; with the groups of the scope, not the layer's own."""
    norm = case.trained()
    before, x = copy.deepcopy(norm.state_dict()), batch(7)
    parameters = dict(norm.named_parameters())
    domains = case.groups_of(norm, len(x)) if case.groups else None
    expected = case.equation().alone(x, parameters, domains)
    norm.frozen = True
    for mode in (True, False):
        with batch_statistics(norm.train(mode)), case.around(len(x)):
            assert_close([norm(x)], [expected])
            if case.groups is None:
                with normalization_scope(Partition.consecutive([2, 4])):
                    y = norm(x)
                assert_close([y], [torch.cat([case.equation().alone(part, parameters) for part in x.split([2, 4])])])
    assert not changed(before, norm)


@_each(named("BN", "SyncBN", "GhostBN", "BGN 2", "BGN 6", "IEBN"))
def test_without_buffers_eval_takes_the_batchs_own(case):
    norm = case.make(track_running_stats=False).eval()
    assert not list(norm.buffers())
    assert_close([norm(batch())], [case.equation().alone(batch(), dict(norm.named_parameters()))])


@_each(BATCH_NORMS)
def test_precise_statistics_are_those_of_its_input_and_nothing_else_changes(case):
    model = nn.Sequential(case.trained())
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    batches = [batch(step, 5 + step) for step in range(4)]
    precise_bn(model.eval(), batches, progress=False)
    assert_close([model[0].running_mean, model[0].running_var], case.equation().population(torch.cat(batches)))
    assert changed(before, model) == {"0.running_mean", "0.running_var"}
    if case.name == "MBN":  # it makes them the memory's again
        assert torch.equal(model.train()(batch(7)), twin(batch(7)))
        assert not changed(twin.state_dict(), model)


@_each([case for case in BATCH_NORMS if case.title not in ("BGN 1", "BGN 2")])
def test_conversion_keeps_what_eval_computes_both_ways(case):
    """IEBN starts with its initial gate; BatchStatBN does not use what it keeps."""
    model = nn.Sequential(nn.BatchNorm2d(C, momentum=0.2).double())
    for step in range(3):
        model(batch(step))
    expected, state, weight = model.eval()(batch(5)), copy.deepcopy(model.state_dict()), model[0].weight
    convert_norms(model, case.name, **{name: case.options[name] for name in case.options if name != "momentum"})
    assert type(model[0]) is type(case.make())
    assert model[0].weight is weight
    assert {value.dtype for value in model.state_dict().values()} <= {torch.float64, torch.int64}
    share = 1 / (1 + math.e) if case.name == "IEBN" else 1.0
    if case.name != "BatchStatBN":
        assert_close([model(batch(5))], [share * expected], 1e-12)
    convert_norms(model, "BN")
    assert not changed(state, model)
    assert model[0].momentum == 0.2
    if case.name not in ("IEBN", "BatchStatBN"):
        trained = nn.Sequential(case.trained().eval())
        expected = trained(batch(5))
        assert_close([convert_norms(trained, "BN")(batch(5))], [expected], 1e-12)


# ------------------------------------------------------------------------------------ groups and ranks


@_each(named("BN", "BatchStatBN", "BatchRenorm", "BGN 2", "BGN 6", "IEBN", "MBN 3 0.6", "CBN"))
def test_groups_of_a_scope_are_batches_of_their_own(case):
    """With the same past, and the state receives the statistics of all of them together."""
    norm, x, sizes = case.trained(), batch(5, 8), [3, 1, 4]
    whole, twins = copy.deepcopy(norm), [copy.deepcopy(norm) for _ in sizes]
    with normalization_scope(Partition.consecutive(sizes)):
        ours = gradients(norm, x, norm.parameters())
    rows = zip(twins, x.split(sizes), probe(x).split(sizes), strict=True)
    parts = [gradients(twin, part, twin.parameters(), v) for twin, part, v in rows]
    assert_close(ours[:2], [torch.cat(tables) for tables in zip(*(part[:2] for part in parts), strict=True)])
    assert_close(ours[2:], [sum(tables) for tables in zip(*(part[2:] for part in parts), strict=True)])
    if case.name != "BatchRenorm":  # which averages the deviations of the groups
        whole(x)
        assert_close(norm.state_dict().values(), whole.state_dict().values())


SPANNING = named("BN", "SyncBN", "ShuffleBN", "BatchRenorm", "BGN 2", "IEBN", "MBN 3 0.6")
SPLITS = [(4, 3), (5, 0), (0, 6), (0, 0), (2, 6)]


def _after(case, model, x, run=None):
    """What else a training step of a norm has; ``run`` is the compiled model."""
    if case.name == "MBN":
        with double_forward(model):
            (model if run is None else run)(2 * x)


def _on_a_rank(rank, world_size, splits):
    results = []
    for case in SPANNING:
        norm, steps = case.make(), []
        for step, sizes in enumerate(splits):
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            x = batch(step, sum(sizes))
            with normalization_scope(Partition(across_ranks=True)):
                steps.append([item.numpy() for item in gradients(norm, x[mine], norm.parameters(), probe(x)[mine])])
                _after(case, norm, x[mine])
        results.append((steps, [value.numpy() for value in norm.state_dict().values()]))
    return results


def test_a_batch_over_ranks_is_one_process():
    """Outputs and gradients of rows side by side, those of parameters summed, the same state everywhere."""
    one = _on_a_rank(0, 1, [(sum(sizes),) for sizes in SPLITS])
    ranks = run_ranks(_on_a_rank, 2, SPLITS, timeout=60)
    for case, (steps, state), *of_ranks in zip(SPANNING, one, *ranks, strict=True):
        for whole, *parts in zip(steps, *(found[0] for found in of_ranks), strict=True):
            whole, *parts = ([torch.from_numpy(item) for item in found] for found in (whole, *parts))
            rows = [torch.cat(tables) for tables in zip(*(part[:2] for part in parts), strict=True)]
            sums = [sum(tables) for tables in zip(*(part[2:] for part in parts), strict=True)]
            assert_close([*rows, *sums], whole)
        for found in of_ranks:
            assert_close(map(torch.from_numpy, found[1]), map(torch.from_numpy, state))
        assert len(state) == len(case.make().state_dict())


# ------------------------------------------------------------------------------------ forwards that run twice


def _train(case, use_reentrant, steps=3):
    torch.manual_seed(0)
    options = {"several_calls": True} if case.name == "CBN" else {}
    norms = [case.make(**options) for _ in range(2)]
    body = nn.Sequential(nn.Conv2d(C, C, 1), norms[0], nn.ReLU(), nn.Conv2d(C, C, 1), norms[1]).double()
    optimizer = torch.optim.SGD(body.parameters(), 0.1)
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        losses = []
        for part in (0, 1):  # two forwards wait for their backward at a time
            x = batch(2 * step + part).requires_grad_(True)
            with case.around(len(x)):
                y = body(x) if use_reentrant is None else checkpoint(body, x, use_reentrant=use_reentrant)
            losses.append((y * probe(y)).sum())
        sum(losses).backward()
        found += [x.grad, *(parameter.grad.clone() for parameter in body.parameters())]
        optimizer.step()
        _after(case, body, x.detach())
    return found, body.state_dict()


@_each(CASES)
def test_a_checkpointed_forward_counts_once_and_has_its_groups_and_past(case):
    expected, expected_state = _train(case, None)
    for use_reentrant in (False, True):
        found, state = _train(case, use_reentrant)
        assert_close(found, expected, 1e-8)
        assert_close(state.values(), expected_state.values(), 1e-8)
    if case in BATCH_NORMS:
        assert state["1.num_batches_tracked"] == 6


@_each(COMPILED)
def test_torch_compile_gives_the_eager_answer(case):
    """Whole in eval, and in training where a forward is not counted."""
    torch.compiler.reset()
    norm = case.make()
    twin = copy.deepcopy(norm)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=case.kind != "batch")
    for step in range(2 if case.kind == "batch" or case.name == "ProxyNorm" else 0):  # the others know no modes
        ours = gradients(case.forward(compiled), batch(step), twin.parameters())
        assert_close(ours, gradients(case.forward(norm), batch(step), norm.parameters()))
        _after(case, norm, batch(step))
        _after(case, twin, batch(step), compiled)
    assert_close(twin.state_dict().values(), norm.state_dict().values())
    torch.compiler.reset()
    compiled = torch.compile(twin.eval(), backend="aot_eager", fullgraph=True)
    ours = gradients(case.forward(compiled), batch(5), twin.parameters())
    assert_close(ours, gradients(case.forward(norm.eval()), batch(5), norm.parameters()))


# ------------------------------------------------------------------------------------ inputs


@_each([*CASES, *named("BatchRenorm affine=False", "BGN 2 affine=False")])
@pytest.mark.parametrize("train", [True, False])
def test_channels_last_equals_contiguous(case, train):
    norm = case.trained().train(train)
    twin = copy.deepcopy(norm)
    for step in range(3):
        x = batch(step, shape=(4, 5))
        last = x.contiguous(memory_format=torch.channels_last)
        ours = gradients(case.forward(twin), last, twin.parameters())
        assert_close(ours, gradients(case.forward(norm), x, norm.parameters()))
        assert_close(twin.state_dict().values(), norm.state_dict().values())
        assert case.forward(copy.deepcopy(twin))(last).is_contiguous(memory_format=torch.channels_last)
        assert case.forward(copy.deepcopy(norm))(x).is_contiguous()


@_each(CASES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_output_may_be_changed_in_place(case, layout):
    norm, x = case.trained(), batch(7).to(memory_format=layout)
    found = []
    for inplace in (False, True):
        twin = copy.deepcopy(norm)
        found.append(gradients(lambda leaf: F.relu(case.forward(twin)(leaf), inplace=inplace), x, twin.parameters()))  # noqa: B023
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("case", "how"),
    [
        (case, how)
        for case in {case.title: case for case in [*CASES, *ONE_DOMAIN]}.values()
        for how in (HALF_OF_TORCH if case.kind == "independent" else HALF)
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [True, False])
def test_half_precision_stays_near_float64(case, how, train):
    """The state stays in float32, as exact as what comes in."""
    norm, exact = case.make(torch.float32), case.make()
    dtypes = {name: value.dtype for name, value in norm.state_dict().items()}
    for step in range(3):
        x = batch(step, dtype=torch.bfloat16)
        for layer, like in ((norm, torch.float32), (exact, torch.float64)):
            case.forward(layer)(x.to(like)).sum().backward()
            layer.zero_grad()
    norm.train(train)
    exact.train(train)
    for step in range(3, 6):
        x = batch(step, dtype=torch.bfloat16 if "bfloat16" in how else torch.float32)
        layout = torch.channels_last if "channels last" in how else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
            ours = gradients(case.forward(norm), x, norm.parameters())
        theirs = gradients(case.forward(exact), x.double(), exact.parameters(), probe(x).double())
        assert ours[0].is_contiguous(memory_format=layout)
        if "autocast" not in how or case.kind != "independent":  # torch's group norm is of float32 in autocast
            assert ours[0].dtype == x.dtype
        assert_close(ours[:1], theirs[:1], 5e-3)  # rounded once
        assert_close(ours[1:2], theirs[1:2], 3e-2)
        assert_close(ours[2:], theirs[2:], 5e-2)
    assert dtypes == {name: value.dtype for name, value in norm.state_dict().items()}
    assert_close(norm.state_dict().values(), exact.state_dict().values(), 1e-5)


@_each(named("BatchRenorm", "BGN 2", "IEBN", "MBN 3 0.6"))
@pytest.mark.parametrize("autocast", [True, False])
def test_sums_over_bfloat16_are_exact(case, autocast):
    norm, exact = case.make(torch.float32), case.make()
    for step in range(3):
        x = batch(step, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = gradients(norm, x, norm.parameters())
        assert_close(ours[2:], gradients(exact, x.double(), exact.parameters(), probe(x).double())[2:], 1e-3)


@_shapes({case.title: case for case in [*CASES, *ONE_DOMAIN]}.values(), [(), (4, 3)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seen", [0, 2])
def test_an_empty_batch_leaves_everything_as_it_is_and_keeps_the_graph(case, shape, train, seen):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        norm = case.trained(seen, torch.float32 if dtype == torch.bfloat16 else dtype).train(train)
        before = copy.deepcopy(norm.state_dict())
        y, *found = gradients(case.forward(norm), batch(1, 0, shape, dtype), norm.parameters())
        assert y.shape == (0, C, *shape)
        assert y.dtype == dtype
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)
        assert not changed(before, norm)


# ------------------------------------------------------------------------------------ what the equations imply


def _torchs(norm):
    twin = nn.BatchNorm2d(C, eps=norm.eps, momentum=norm.momentum).double()
    twin.load_state_dict(norm.state_dict(), strict=False)
    return twin


BATCH_NORM_IN_TRAINING = {
    "BN": ("BN", {}, 0),
    "SyncBN": ("SyncBN", {}, 1e-12),
    "BatchStatBN": ("BatchStatBN", {}, 0),
    "GhostBN of one group": ("GhostBN", {"group_size": 100}, 0),
    "ShuffleBN of one group": ("ShuffleBN", {"num_groups": 1}, 1e-12),
    "BGN of a channel in each group": ("BGN", {"num_groups": C}, 0),
    "BGN of no more groups than channels": ("BGN", {"num_groups": 32}, 0),
    "BatchRenorm without correction": ("BatchRenorm", {"r_max": 1.0, "d_max": 0.0, "ramp": None}, 1e-9),
    "BatchRenorm before its ramp": ("BatchRenorm", {"ramp": (100, 200, 200)}, 1e-9),
    "MBN of one entry": ("MBN", {"memory": 1}, 1e-9),
    "CBN with a window of one": ("CBN", {"window": 1}, 0),
    "CBN in its burn-in": ("CBN", {"burn_in": 9, "rho": 0.0}, 0),
    "DomainBN that shares all": (
        "DomainBN",
        {"num_domains": 3, "train_statistics": "shared", "running_statistics": "shared"},
        0,
    ),
}


@pytest.mark.parametrize(("name", "options", "tolerance"), BATCH_NORM_IN_TRAINING.values(), ids=BATCH_NORM_IN_TRAINING)
def test_a_special_case_is_torchs_batch_norm(name, options, tolerance):
    norm = build_norm(name, C, **options).double()
    with torch.no_grad():
        for parameter, values in zip(norm.parameters(), batch(3, 2, ()), strict=True):
            parameter.copy_(values)
    twin = _torchs(norm)
    for step in range(3):
        ours = gradients(norm, batch(step), norm.parameters())
        assert_close(ours, gradients(twin, batch(step), twin.parameters()), tolerance)
    if name not in ("BatchRenorm", "MBN"):  # which average deviations, or keep biased variances
        for key, value in twin.state_dict().items():
            assert_close([norm.state_dict()[key]], [value], tolerance)
    if name != "BatchStatBN":
        twin.load_state_dict(norm.state_dict(), strict=False)
        assert_close([norm.eval()(batch(9))], [twin.eval()(batch(9))], tolerance)


def test_frozen_is_batch_norm_in_eval():
    norm = FROZEN.make()
    twin = _torchs(norm).eval()
    before = copy.deepcopy(norm.state_dict())
    for mode in (True, False):
        ours = gradients(norm.train(mode), batch(), norm.parameters())
        assert_close(ours, gradients(twin, batch(), twin.parameters()), 1e-12)
    assert not changed(before, norm)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_batch_group_norm_of_a_batch_of_one_is_group_norm(num_groups):
    norm, twin = (build_norm(name, C, num_groups=num_groups).double() for name in ("BGN", "GN"))
    x = batch(rows=1)
    assert_close(gradients(norm, x, norm.parameters()), gradients(twin, x, twin.parameters()))


def test_batch_renorm_without_limits_normalizes_by_the_moving_averages():
    (case,) = named("BatchRenorm")
    norm = case.make(ramp=None, r_max=100.0, d_max=100.0)
    for step in range(4):
        expected = copy.deepcopy(norm).eval()(batch(step))
        assert_close([norm(batch(step))], [expected])


@_each([*named("BN", "SyncBN", "BatchStatBN", "BatchRenorm", "BGN 2", "IEBN", "MBN 3 0.6", "CBN"), *INDEPENDENT_NORMS])
def test_the_order_of_the_batch_does_not_matter(case):
    norm, x = case.trained(), batch(8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    assert_close([copy.deepcopy(norm)(x[order])], [norm(x)[order]])


@_each([FROZEN, *INDEPENDENT_NORMS, *(case for case in BATCH_NORMS if case.name != "BatchStatBN")])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sample_does_not_see_the_others(case, memory_format):
    """Bit for bit: in both modes, or in eval where training shares the batch's statistics."""
    norm = case.trained(dtype=torch.float32)
    x, others = batch(8, 4, dtype=torch.float32), 10 * batch(9, 3, dtype=torch.float32) - 20
    other = torch.cat([x[:1], others]).contiguous(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    for mode in (False,) if case in BATCH_NORMS else (True, False):
        assert torch.equal(norm.train(mode)(x)[0], norm(other)[0])


def test_the_equations_tell_other_definitions_apart():
    """That what is compared with is not blind: definitions that differ in one point give other answers."""
    x, plain = batch(), {}
    outputs = [IndependentNorm(sharing).train(x, plain) for sharing in ("sample", "groups of 2", "channel", "position")]
    outputs += [case.equation().alone(x, plain) for case in named("BN", "BGN 2", "BGN 1", "BGN 3")]
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(one, other, atol=1e-2)
