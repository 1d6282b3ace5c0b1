"""The layers on real ranks against a formula in one process: any sizes, the groups, what goes over the wire, DDP.

Each call of ``run_ranks`` sets up a process group, so one call runs a list of cases.
"""

import contextlib
import itertools
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from leakfree.norms import batch_statistics, build_norm, image_partition, normalization_scope
from leakfree.shuffle import Shuffled
from leakfree.shuffle.plan import GroupDraw, mix_seed
from tests.ranks import run_ranks
from tests.wire import recorded

C = 3
STEPS = 2  # forwards and backwards of a case: the second draw is another one


def _sent(calls):
    """(name, numbers this rank puts in) of each collective."""
    return [(call.name, call.numbers) for call in calls]


@dataclass(frozen=True)
class Case:
    """Layers of one kind behind each other, on ranks with ``sizes`` rows."""

    kind: str
    sizes: tuple[int, ...]
    shape: tuple[int, ...] = ()
    options: dict = field(default_factory=dict)
    scoped: bool = False
    images: tuple[tuple[int, ...], ...] | None = None  # rows of each image of each rank: the base of the scope
    per_group: int = 1
    dtype: torch.dtype = torch.float64
    detached: bool = False  # the inputs of empty ranks need no gradient

    @property
    def total(self):
        return sum(self.sizes)

    @property
    def depth(self):
        return 2 if self.dtype == torch.float64 else 1  # a second layer magnifies the rounding of the first

    @property
    def rows(self):
        """The slice of all rows that each rank holds."""
        ends = np.cumsum(self.sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def spanning(self):
        """Whether rows of different ranks share statistics."""
        if self.kind != "BN":
            return len(self.sizes) > 1
        return self.images is not None and any(first % self.per_group for first in self.first_images)

    @property
    def first_images(self):
        return np.cumsum([0, *map(len, self.images[:-1])]).tolist()

    @property
    def num_groups(self):
        """Over all ranks."""
        if self.kind == "SyncBN":
            return 1
        if self.kind == "ShuffleBN" and self.options["num_groups"] is not None:
            return self.options["num_groups"]
        if self.images is not None:
            return -(-sum(map(len, self.images)) // self.per_group)
        return max(2, len(self.sizes)) if self.kind == "ShuffleBN" else len(self.sizes)

    @property
    def refused(self):
        """Whether torch's own kernel would meet a single value: it raises, as in any batch norm of torch."""
        if np.prod(self.shape) != 1 or self.spanning:
            return False
        if self.kind != "BN":
            return self.num_groups == 1 == self.total
        alone = [self.images is None or len(images) <= self.per_group for images in self.images or self.sizes]
        return any(one and size == 1 for one, size in zip(alone, self.sizes, strict=True))

    def numbers(self, salt, *shape):
        """Random numbers that the dtype can hold, in float64, alike on all ranks."""
        generator = torch.Generator().manual_seed(100 * self.total + salt)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype).double()

    def batch(self, step):
        """x and the gradient of y, of all ranks."""
        shape = (self.total, C, *self.shape)
        return (self.numbers(2 * step, *shape) * 2 + 1).to(self.dtype).double(), self.numbers(2 * step + 1, *shape)

    def affine(self):
        """(weight, bias) of each layer; no weight near 0, where the next layer would magnify all rounding."""
        numbers = [self.numbers(50 + layer, 2, C) for layer in range(self.depth)]
        return [(weight + weight.sign(), bias) for weight, bias in numbers]

    def in_one_process(self):
        """The same with all rows on one rank."""
        options = {**self.options, "num_groups": self.num_groups} if self.kind == "ShuffleBN" else self.options
        images = None if self.images is None else (tuple(itertools.chain(*self.images)),)
        return replace(self, sizes=(self.total,), options=options, images=images)


def _array(tensor):
    return tensor.detach().double().numpy()  # a tensor in a pipe would cost a file descriptor


def _run(rank, world_size, cases):
    """What this rank sees of each case."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ShuffleBN: ", UserWarning)  # of groups without rows: meant here
        return [_run_one(rank, case) for case in cases]


def _run_one(rank, case):
    layers = []
    for weight, bias in case.affine():
        layer = build_norm(case.kind, C, dim=len(case.shape) or 1, **case.options).to(case.dtype)
        layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        layers.append(layer)
    steps = []
    for step in range(STEPS):
        x, v = (everyone[case.rows[rank]].to(case.dtype) for everyone in case.batch(step))
        x = x.clone().requires_grad_(len(x) > 0 or not case.detached)
        scope = contextlib.nullcontext()
        if case.images is not None:
            scope = normalization_scope(image_partition(case.images[rank], case.per_group))
        elif case.scoped:
            scope = normalization_scope()
        with scope, recorded() as forward:
            y = nn.Sequential(*layers)(x)
        with recorded() as backward:
            (y * v).sum().backward()
        assert y.dtype == case.dtype
        groups = [None if layer.last_groups is None else layer.last_groups.tolist() for layer in layers]
        dx = _array(torch.zeros_like(x) if not x.requires_grad else x.grad)
        steps.append({"y": _array(y), "dx": dx, "groups": groups, "wire": (_sent(forward), _sent(backward))})
    gradients = [_array(torch.stack([layer.weight.grad, layer.bias.grad])) for layer in layers]
    buffers = [_array(torch.stack([layer.running_mean, layer.running_var])) for layer in layers]
    return {
        "steps": steps,
        "gradients": gradients,
        "buffers": buffers,
        "counts": [int(layer.num_batches_tracked) for layer in layers],
    }


def _groups(case, layer, counts):
    """The group of each row of all ranks."""
    if case.kind == "ShuffleBN":
        seed, index = case.options["seed"], counts[layer]
        if (case.scoped or case.images is not None) and case.options["draw"] == "layer":
            seed = mix_seed(seed, layer + 1)
        draws = [GroupDraw(case.sizes, rank, case.num_groups, seed, index) for rank in range(len(case.sizes))]
        return torch.from_numpy(np.concatenate([draw.groups for draw in draws]))
    if case.kind == "BN" and case.images is not None:  # images in rank order; no group spans ranks by chance
        counts = torch.tensor(list(itertools.chain(*case.images)))
        return torch.repeat_interleave(torch.arange(len(counts)) // case.per_group, counts)
    ranks = torch.arange(len(case.sizes)) * (case.kind == "BN")
    return torch.repeat_interleave(ranks, torch.tensor(case.sizes))


def _formula(x, groups, weight, bias, eps=1e-5):
    """Batch norm of each group by its definition, in autograd; and the largest 1 / std."""
    columns, dims, largest = (1, C, *[1] * (x.ndim - 2)), [0, *range(2, x.ndim)], 1.0
    y = 0 * (x + weight.view(columns) + bias.view(columns))  # of no row, too, it has a gradient
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        part = x[rows]
        deviation = part - part.mean(dims, keepdim=True)
        std = ((deviation**2).mean(dims, keepdim=True) + eps).sqrt()
        y = y.index_add(0, rows, deviation / std * weight.view(columns) + bias.view(columns))
        largest = max(largest, 1 / std.min().item())
    return y, largest


def _moved(buffers, x):
    """(mean, variance) after torch's update by all values of ``x``."""
    values = x.detach().movedim(1, 0).flatten(1)
    new = torch.stack([values.mean(1), values.var(1, correction=1 if values.shape[1] > 1 else 0)])
    return 0.9 * buffers + 0.1 * new


def _reference(case):
    """Like the results of :func:`_run`, in float64 in this process; buffers and counts by layer and rank."""
    affine = [[tensor.clone().requires_grad_(True) for tensor in pair] for pair in case.affine()]
    fresh = torch.stack([torch.zeros(C), torch.ones(C)]).double()
    pools = [slice(None)] * len(case.sizes) if case.spanning else case.rows  # whose rows move a rank's buffers
    buffers = [[fresh for _ in pools] for _ in affine]
    counts = [[0 for _ in pools] for _ in affine]
    steps, magnification = [], 1.0
    for step in range(STEPS):
        x, v = case.batch(step)
        y = x.requires_grad_(True)
        groups = [_groups(case, layer, [ranks[0] for ranks in counts]) for layer in range(case.depth)]
        for layer, (weight, bias) in enumerate(affine):
            for rank, pool in enumerate(pools):
                if len(y[pool]):
                    buffers[layer][rank] = _moved(buffers[layer][rank], y[pool])
                    counts[layer][rank] += 1
            y, largest = _formula(y, groups[layer], weight, bias)
            magnification = max(magnification, largest)
        (y * v).sum().backward()
        steps.append({"y": y.detach(), "dx": x.grad, "groups": groups})
    gradients = [torch.stack([tensor.grad for tensor in pair]) for pair in affine]
    return steps, gradients, buffers, counts, magnification


def _promised(case):
    """The wire of a forward and of a backward."""
    if len(case.sizes) == 1 or not case.spanning:
        return [], []
    forward, shares_draws = [], case.options.get("draw") == "head" and (case.scoped or case.images is not None)
    for layer in range(case.depth):
        if case.kind == "ShuffleBN" and not (shares_draws and layer):
            forward.append(("all_gather_into_tensor", "sizes"))
        forward.append(("all_reduce", case.num_groups * (2 * C + 1)))
    return forward, [("all_reduce", case.num_groups * 2 * C)] * case.depth


def _close(actual, expected, bound, *what):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, what
    error = np.abs(actual - expected).max(initial=0.0)
    assert error <= bound, (f"off by {error:.1e}", *what)


def _check(case, ranks):
    """Each number that the ranks told of a case."""
    steps, gradients, buffers, counts, magnification = _reference(case)
    bound = 1e-9 if case.dtype == torch.float64 else 1e-5
    # A gradient of order 1 / std is a difference of numbers of that order.
    gradient_bound = bound * (1 if case.dtype == torch.float64 else magnification)
    for step, expected in enumerate(steps):
        seen = [rank["steps"][step] for rank in ranks]
        _close(np.concatenate([here["y"] for here in seen]), expected["y"], bound, "y", case)
        _close(np.concatenate([here["dx"] for here in seen]), expected["dx"], gradient_bound, "dx", case)
        for here in seen:
            forward, backward = here["wire"]
            small = [(name, "sizes" if name == "all_gather_into_tensor" and n <= 8 else n) for name, n in forward]
            assert (small, backward) == _promised(case), case
        if case.kind == "ShuffleBN":
            for layer, groups in enumerate(expected["groups"]):
                told = [here["groups"][layer] for here in seen]
                if case.num_groups == 1:
                    assert told == [None] * len(told), case
                else:
                    assert list(itertools.chain(*told)) == groups.tolist(), case
    for layer in range(case.depth):
        _close(sum(rank["gradients"][layer] for rank in ranks), gradients[layer], gradient_bound, "parameters", case)
        for rank, told in enumerate(ranks):
            _close(told["buffers"][layer], buffers[layer][rank], bound, "buffers", case)
            assert told["counts"][layer] == counts[layer][rank], case
    if case.dtype == torch.float64 and not case.in_one_process().refused:
        _check_against_one_process(case, ranks)


def _check_against_one_process(case, ranks):
    """k ranks with a group each are one process with k virtual groups, for the layer itself."""
    (one,) = _run(0, 1, [case.in_one_process()])
    for step, expected in enumerate(one["steps"]):
        seen = [rank["steps"][step] for rank in ranks]
        for name in ("y", "dx"):
            _close(np.concatenate([here[name] for here in seen]), expected[name], 1e-9, name, "one process", case)
    _close(sum(np.stack(rank["gradients"]) for rank in ranks), one["gradients"], 1e-9, "one process", case)
    if case.spanning:
        for rank in ranks:
            _close(rank["buffers"], one["buffers"], 1e-9, "one process", case)
            assert rank["counts"] == one["counts"], case


def _check_all(world_size, cases):
    cases = [case for case in cases if not case.refused]
    for first in range(0, len(cases), 80):  # so few that ten seconds without an answer are a hang
        some = cases[first : first + 80]
        ranks = run_ranks(_run, world_size, some, timeout=10) if world_size > 1 else [_run(0, 1, some)]
        for index, case in enumerate(some):
            _check(case, [rank[index] for rank in ranks])


def _shuffles():
    """(options, scoped) of all ShuffleBN layers tried."""
    for num_groups, draw, scoped in itertools.product((None, 2, 3), ("head", "layer"), (False, True)):
        yield {"num_groups": num_groups, "draw": draw, "seed": 11}, scoped


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_all_sizes_on_two_ranks(shape):
    cases = []
    for sizes in itertools.product(range(4), repeat=2):
        cases += [Case("SyncBN", sizes, shape), Case("SyncBN", sizes, shape, detached=True)]
        cases += [Case("ShuffleBN", sizes, shape, options, scoped) for options, scoped in _shuffles()]
        single = tuple((1,) * size or (0,) for size in sizes)  # an image for each row
        whole = tuple((size,) for size in sizes)  # an image for each rank
        cases += [Case("BN", sizes, shape, images=single, per_group=per_group) for per_group in (1, 2, 3)]
        cases += [Case("BN", sizes, shape, images=whole, per_group=2)]
        cases += [Case("ShuffleBN", sizes, shape, next(_shuffles())[0], images=single, per_group=2)]
    cases += [replace(case, dtype=torch.float32) for case in cases if case.sizes in ((0, 3), (1, 2), (3, 3))]
    _check_all(2, cases)


@st.composite
def _cases(draw, world_size):
    kind = draw(st.sampled_from(["SyncBN", "ShuffleBN", "ShuffleBN", "BN"]))
    options, scoped, images = {}, False, None
    if kind == "ShuffleBN":
        options, scoped = draw(st.sampled_from(list(_shuffles())))
    if kind == "BN" or draw(st.integers(0, 3)) == 0:
        images = tuple(tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))) for _ in range(world_size))
        sizes = tuple(map(sum, images))
    else:
        sizes = draw(st.tuples(*[st.integers(0, 3)] * world_size))
    return Case(
        kind,
        sizes,
        draw(st.sampled_from([(), (3,), (2, 3)])),
        options,
        scoped,
        images,
        draw(st.integers(1, 4)),
        draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        draw(st.booleans()),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_case_on_any_number_of_ranks(world_size):
    @settings(max_examples=4, phases=[Phase.generate])  # shrinking would run all ranks again and again
    @given(st.lists(_cases(world_size), min_size=15, max_size=25))
    def check(cases):
        _check_all(world_size, cases)

    check()


def _subgroup(ranks):
    return dist.new_subgroups_by_enumeration(ranks)[0]


def _run_in_halves(rank, world_size, cases):
    half = _subgroup([[0, 2], [1, 3]])
    cases = [replace(case, options={**case.options, "process_group": half}) for case in cases[rank % 2]]
    return _run(rank // 2, 2, cases)


def test_layers_over_some_ranks_know_only_these():
    shuffle = {"num_groups": None, "draw": "head", "seed": 3}
    halves = [[Case("SyncBN", sizes), Case("ShuffleBN", sizes, (2,), shuffle, True)] for sizes in [(2, 3), (4, 0)]]
    ranks = run_ranks(_run_in_halves, 4, halves, timeout=10)
    for half, cases in enumerate(halves):
        for index, case in enumerate(cases):
            _check(case, [ranks[half][index], ranks[half + 2][index]])


def _over_all_ranks_and_over_one(rank, world_size):
    groups = []
    for process_group in (None, _subgroup([[0], [1]])):
        layer = build_norm("ShuffleBN", C, dim=1, num_groups=2, process_group=process_group)
        groups.append(layer)
    with normalization_scope():
        nn.Sequential(*groups)(torch.randn(6, C))
    return [layer.last_groups.tolist() for layer in groups]


def test_layers_over_other_ranks_do_not_share_a_draw():
    ranks = run_ranks(_over_all_ranks_and_over_one, 2, timeout=10)
    for rank, (everywhere, here) in enumerate(ranks):
        assert everywhere == GroupDraw((6, 6), rank, 2, 0, 0).groups.tolist()
        assert here == GroupDraw((6,), 0, 2, 0, 0).groups.tolist()


def _random_groups_of_images(rank, world_size, images):
    layer = build_norm("ShuffleBN", C, dim=1)
    with normalization_scope(image_partition(images[rank], 1)):
        layer(torch.randn(sum(images[rank]), C))
    return layer.last_groups.tolist()


def test_a_rank_without_images_adds_no_random_group():
    images = ((4, 4), (4,), ())
    together = list(itertools.chain(*run_ranks(_random_groups_of_images, 3, images, timeout=10)))
    assert sorted(set(together)) == [0, 1, 2]
    assert together == _random_groups_of_images(0, 1, (tuple(itertools.chain(*images)),))


def _stay_away(rank, world_size):
    if rank == 0:
        build_norm("SyncBN", C, dim=1)(torch.randn(4, C))


def test_a_rank_that_stays_away_is_found_within_seconds():
    with pytest.raises(AssertionError, match="rank 0 raised"):
        run_ranks(_stay_away, 2, timeout=3)


def _draw_out_of_step(rank, world_size):
    layer = build_norm("ShuffleBN", C, dim=1)
    layer.num_batches_tracked.fill_(rank)
    with pytest.raises(RuntimeError, match="every rank must shuffle equally often"):
        layer(torch.randn(4, C))


def test_ranks_out_of_step_are_all_told():
    run_ranks(_draw_out_of_step, 2, timeout=10)


def _recompute(rank, world_size, reentrant):
    head = nn.Sequential(build_norm("ShuffleBN", C, dim=1, num_groups=2), nn.Linear(C, C))
    x = torch.randn(6, C, requires_grad=True)
    y = checkpoint(head, x, use_reentrant=reentrant)
    with recorded() as log:
        y.sum().backward()
    return _sent(log)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_sends_its_statistics_but_draws_nothing(reentrant):
    expected = [("all_reduce", 2 * (2 * C + 1)), ("all_reduce", 2 * 2 * C)]
    assert run_ranks(_recompute, 2, reentrant, timeout=10) == [expected] * 2


def _silent(rank, world_size, kind, mode):
    layer = build_norm(kind, C, dim=1, **({"track_running_stats": False} if mode == "untracked" else {}))
    model = nn.Sequential(nn.Linear(C, C), Shuffled(layer) if mode == "shuffled" else layer)
    model.train(mode in ("frozen", "measured"))
    layer.frozen = mode == "frozen"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with recorded() as log:
        for _ in range(1 + rank):  # so that a collective would also hang
            with normalization_scope(), batch_statistics(model) if mode == "measured" else contextlib.nullcontext():
                model(torch.randn(4, C)).square().sum().backward()
    assert log == []
    assert layer.last_groups is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *itertools.product(["SyncBN", "ShuffleBN"], ["eval", "frozen", "measured"]),
        *[("SyncBN", "untracked"), ("BN", "shuffled")],
    ],
)
def test_what_draws_or_shares_no_statistics_communicates_nothing(kind, mode):
    run_ranks(_silent, 2, kind, mode, timeout=10)


def _parallel_model(kind):
    torch.manual_seed(0)
    norms = [build_norm(kind, 4, **({"num_groups": 2} if kind == "ShuffleBN" else {})) for _ in range(2)]
    layers = [nn.Conv2d(C, 4, 1), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1], nn.Conv2d(4, 2, 1)]
    return nn.Sequential(*layers).double()


def _train(rank, world_size, kind, batches, accumulate):
    """Gradients and state after steps of SGD on the mean loss, each of ``accumulate`` batches' gradients."""
    model = step = _parallel_model(kind)
    if world_size > 1:
        step = DistributedDataParallel(model, broadcast_buffers=False)  # they are alike without
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradients = []
    for number, sizes in enumerate(batches):
        last = number % accumulate == accumulate - 1
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) if world_size > 1 else slice(None)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(sum(sizes), C, 2, 3, dtype=torch.float64, generator=generator)
        v = torch.randn(sum(sizes), 2, 2, 3, dtype=torch.float64, generator=generator)
        images = [[1] * size for size in sizes] if world_size > 1 else [[1] * sum(sizes)]
        scope = normalization_scope(image_partition(images[rank], 3) if kind == "BN" else None)
        with contextlib.nullcontext() if last or world_size == 1 else step.no_sync(), scope:
            loss = world_size * (step(x[mine]) * v[mine]).sum() / sum(sizes)  # DDP takes the mean over ranks
            loss.backward()
        if last:
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            optimizer.step()
            optimizer.zero_grad()
    return _array(torch.stack(gradients)), {key: _array(value) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["SyncBN", "ShuffleBN", "BN"])
def test_data_parallel_training_is_training_in_one_process(kind, accumulate):
    batches = [(5, 3), (4, 4), (8, 0), (2, 7)]
    gradients, state = _train(0, 1, kind, batches, accumulate)
    for rank in run_ranks(_train, 2, kind, batches, accumulate, timeout=10):
        _close(rank[0], gradients, 1e-9, kind)
        for key, value in state.items():
            _close(rank[1][key], value, 1e-9, kind, key)
        assert rank[1]["1.num_batches_tracked"] == len(batches)
