import itertools
import os
import re
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leakfree.norms import build_norm
from leakfree.shuffle import Ticket, batch_shuffle, batch_unshuffle, exchange
from leakfree.shuffle.nest import tensors_of
from tests.ranks import run_ranks
from tests.wire import bits, recorded, told_by

pytestmark = pytest.mark.filterwarnings("ignore:batch_shuffle over one rank")


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _rows(sizes, rank):
    start = sum(sizes[:rank])
    return torch.arange(start, start + sizes[rank], dtype=torch.float64)[:, None].expand(-1, 3).clone()


def _round_trip(rank, world_size, sizes):
    x = _rows(sizes, rank).requires_grad_(True)
    shuffled, ticket = batch_shuffle(x, generator=_generator())
    home = batch_unshuffle(shuffled * 2, ticket)
    (home * (x.detach() + 1)).sum().backward()
    return shuffled.detach(), torch.equal(home, 2 * x), x.grad, x.detach()


@pytest.mark.parametrize("sizes", [[5, 5], [3, 0], [0, 0], [1, 6, 0], [2, 3, 1]])
def test_round_trip_is_bitwise_and_differentiable_on_uneven_ranks(sizes):
    results = run_ranks(_round_trip, len(sizes), sizes)
    everyone = torch.cat([shuffled for shuffled, *_ in results])
    assert sorted(everyone[:, 0].tolist()) == list(range(sum(sizes)))
    counts = [len(shuffled) for shuffled, *_ in results]
    assert max(counts) - min(counts) <= 1
    for _, same, gradient, x in results:
        assert same
        assert torch.equal(gradient, 2 * (x + 1))
    alone = batch_shuffle(torch.arange(sum(sizes), dtype=torch.float64)[:, None].expand(-1, 3), generator=_generator())[
        0
    ]
    assert torch.equal(everyone, alone)  # the same permutation as one process draws


@given(st.integers(0, 20), st.integers(0, 100))
def test_one_process_permutes_and_returns(num_rows, seed):
    x = torch.randn(num_rows, 2, generator=_generator(seed))
    shuffled, ticket = batch_shuffle(x, generator=_generator(seed))
    assert torch.equal(batch_unshuffle(shuffled, ticket), x)


def test_the_default_generator_moves_on():
    x = torch.arange(50.0)[:, None]
    assert not torch.equal(batch_shuffle(x)[0], batch_shuffle(x)[0])


def test_wrong_number_of_rows_is_refused():
    _, ticket = batch_shuffle(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"output of shape \(3, 1\): the shuffle returned 4 rows"):
        batch_unshuffle(torch.zeros(3, 1), ticket)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6))
def test_gradcheck(num_rows):
    def round_trip(x):
        shuffled, ticket = batch_shuffle(x, generator=_generator())
        return batch_unshuffle(shuffled.sin(), ticket)

    assert torch.autograd.gradcheck(round_trip, torch.randn(num_rows, 2, dtype=torch.float64, requires_grad=True))


def _disagreeing(rank, world_size):
    with pytest.raises(RuntimeError, match="drew different shuffles"):
        batch_shuffle(torch.zeros(2, 1), generator=_generator(rank))
    return True


def test_ranks_with_different_generators_are_told_and_do_not_hang():
    assert run_ranks(_disagreeing, 2) == [True, True]


# --- every row comes home, bit by bit, from where one process would have put it ---


def _places(rank: int, world_size: int, cases: list[tuple[tuple[int, ...], bool]]) -> list[list[int]]:
    """Which rows met on this rank, for each case."""
    places = []
    for number, (sizes, balance) in enumerate(cases):
        x = torch.arange(sum(sizes)).split(sizes)[rank]
        met, ticket = batch_shuffle(x, generator=_generator(number), balance=balance)
        assert isinstance(ticket, Ticket)
        assert ticket.num_rows == len(met)
        assert torch.equal(batch_unshuffle(met, ticket), x)
        places.append(met.tolist())
    return places


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_hold_shares_of_the_permutation_of_one_process(world_size):
    most = 4 if world_size < 4 else 2  # up to 4 rows on 4 ranks: a sample, in the test below
    cases = [(sizes, bal) for sizes in itertools.product(range(most + 1), repeat=world_size) for bal in (True, False)]
    results = run_ranks(_places, world_size, cases)
    for number, ((sizes, balance), *shares) in enumerate(zip(cases, *results, strict=True)):
        alone, _ = batch_shuffle(torch.arange(sum(sizes)), generator=_generator(number))
        assert list(itertools.chain(*shares)) == alone.tolist(), (sizes, balance)
        counts = [len(share) for share in shares]
        assert max(counts) - min(counts) <= 1 if balance else counts == list(sizes), (sizes, balance)


_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
_ROWS = ((), (1,), (3,), (0,), (5, 2), (3, 2, 3), (2, 0, 3), (4, 1, 1), (2, 3, 1, 2))
_LAYOUTS = ("contiguous", "channels_last", "strided", "expanded", "odd offset")


class _Kind(NamedTuple):
    dtype: torch.dtype
    row: tuple[int, ...]
    layout: str


def _whole(kind: _Kind, num_rows: int, seed: int) -> Tensor:
    """The rows of all ranks: any bits, so NaNs with payloads and negative zeros too."""
    shape = (1 if kind.layout == "expanded" else num_rows, *kind.row)
    if kind.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=_generator(seed)).bool().expand(num_rows, *kind.row)
    values = torch.Size(shape).numel() * kind.dtype.itemsize
    noise = torch.randint(0, 256, (values,), generator=_generator(seed), dtype=torch.uint8)
    return noise.view(kind.dtype).view(shape).expand(num_rows, *kind.row)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and x.ndim > 3:
        return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "strided":
        room = torch.zeros(2 * len(x), *(2 * side for side in x.shape[1:]), dtype=x.dtype)
        room = room[tuple(slice(None, None, 2) for _ in x.shape)]
        return room.copy_(x)
    if layout == "odd offset":
        return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return x if layout == "expanded" else x.contiguous()


def _travel(rank: int, world_size: int, cases: list[tuple[tuple[int, ...], bool, tuple[_Kind, ...]]]) -> bool:
    for seed, (sizes, balance, kinds) in enumerate(cases):
        wholes = [torch.arange(sum(sizes)), *(_whole(kind, sum(sizes), seed) for kind in kinds)]
        layouts = ["contiguous", *(kind.layout for kind in kinds)]
        mine = [_laid_out(x.split(sizes)[rank], layout) for x, layout in zip(wholes, layouts, strict=True)]
        met, ticket = batch_shuffle(mine, generator=_generator(seed), balance=balance)
        home = batch_unshuffle(met, ticket)
        for whole, sent, here, back in zip(wholes, mine, met, home, strict=True):
            assert (here.dtype, back.dtype) == (sent.dtype, sent.dtype)
            assert back.shape == sent.shape
            assert torch.equal(bits(back), bits(sent)), (sizes, kinds)
            assert torch.equal(bits(here), bits(whole[met[0]])), (sizes, kinds)
        layouts = {kind.layout == "channels_last" for kind in kinds if len(kind.row) > 2 and 0 not in kind.row}
        for x in (*met, *home) if len(layouts) == 1 else ():
            if x.ndim > 3 and x.numel():
                formats = (
                    (torch.channels_last, torch.channels_last_3d) if True in layouts else [torch.contiguous_format]
                )
                assert x.is_contiguous(memory_format=formats[(x.ndim - 4) % len(formats)]), kinds
    return True


_kinds = st.builds(_Kind, st.sampled_from(_DTYPES), st.sampled_from(_ROWS), st.sampled_from(_LAYOUTS))


@st.composite
def _trips(draw, world_size):
    sizes = draw(st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size))
    return tuple(sizes), draw(st.booleans()), tuple(draw(st.lists(_kinds, min_size=1, max_size=3)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@settings(max_examples=4, phases=[Phase.generate])  # a failure names its case, and ranks are slow to shrink with
@given(data=st.data())
def test_any_tensors_travel_bit_by_bit_and_keep_their_layout(world_size, data):
    cases = data.draw(st.lists(_trips(world_size), min_size=25, max_size=25))
    assert all(run_ranks(_travel, world_size, cases))


_ALL_KINDS = [
    _Kind(dtype, row, layout)
    for dtype, row, layout in itertools.product(_DTYPES, _ROWS, _LAYOUTS)
    if layout != "channels_last" or len(row) > 2
]


def test_every_dtype_shape_and_layout_travels_alone():
    cases = [((3, 0, 2), bool(number % 2), (kind,)) for number, kind in enumerate(_ALL_KINDS)]
    assert all(run_ranks(_travel, 3, cases))


@pytest.mark.parametrize("world_size", [1, 2])
def test_lazily_conjugated_and_negated_tensors_travel_as_what_they_show(world_size):
    assert all(run_ranks(_lazy, world_size))


def _lazy(rank, world_size):
    x = torch.randn(3, 2, dtype=torch.complex64, generator=_generator(rank))
    views = (x.conj(), torch._neg_view(x.real.contiguous()), x.conj().imag)
    assert views[0].is_conj()
    assert views[1].is_neg()
    for view in views:
        met, ticket = batch_shuffle(view, generator=_generator())
        assert torch.equal(batch_unshuffle(met, ticket), view)
    z = x.clone().requires_grad_(True)
    met, ticket = batch_shuffle(z, generator=_generator())
    batch_unshuffle(met, ticket).conj().imag.sum().backward()  # the gradient arrives conjugated
    assert torch.equal(z.grad, torch.full_like(x, -1j))
    return True


def _mixed_maps(rank, world_size):
    n = 3 * rank  # no rows on the first rank
    maps = torch.randn(n, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    pooled, vectors = torch.randn(n, 4, 1, 1), torch.randn(n, 4)  # these lie either way
    (maps, *_), ticket = batch_shuffle((maps, pooled, vectors), generator=_generator())
    return [x.is_contiguous(memory_format=torch.channels_last) for x in (maps, batch_unshuffle(maps, ticket))]


def test_maps_stay_channels_last_beside_tensors_without_a_layout():
    assert all(itertools.chain(*run_ranks(_mixed_maps, 2)))


def _in_place(rank, world_size):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3 + rank, 2, 3, 3, generator=_generator(rank)).requires_grad_(True)
        y = torch.randn(3 + rank, 2, generator=_generator(rank)).requires_grad_(True)
        (a, b), ticket = batch_shuffle((x.contiguous(memory_format=layout), y), generator=_generator())
        a.mul_(2)
        b.relu_()
        a, b = batch_unshuffle((a, b), ticket)
        (a.relu_().sum() + b.mul_(3).sum()).backward()
        assert torch.equal(x.grad, 2.0 * (x > 0))
        assert torch.equal(y.grad, 3.0 * (y > 0))
    return True


@pytest.mark.parametrize("world_size", [1, 2])
def test_shuffled_tensors_may_be_changed_in_place(world_size):
    assert all(run_ranks(_in_place, world_size))


def _by_default(rank, world_size):
    exchange._DEFAULT_GENERATOR.manual_seed(0)  # this process has served other tests
    x = torch.arange(20).split([5] * world_size)[rank]
    return [batch_shuffle(x)[0].tolist() for _ in range(2)]


def test_the_default_generator_is_in_step_on_all_ranks():
    first, second = (list(itertools.chain(*shares)) for shares in zip(*run_ranks(_by_default, 4), strict=True))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


# --- what goes over the wire ---


class _Boxes(NamedTuple):
    corners: Tensor
    flags: Tensor


def _wire_of_a_nest(rank, world_size, sizes, balance):
    n = sizes[rank]
    nest = {
        "maps": torch.randn(n, 2, 3, 3, requires_grad=True),
        "boxes": (_Boxes(torch.randn(n, 4, dtype=torch.float64, requires_grad=True), torch.ones(n, dtype=torch.bool)),),
        "names": [torch.arange(n), torch.randn(n, 3).half().requires_grad_(True), None, 3],
    }
    with recorded() as forward:
        met, ticket = batch_shuffle(nest, generator=_generator(), balance=balance)
    with recorded() as home:
        back = batch_unshuffle(met, ticket)
    with recorded() as backward:
        sum(tensor.float().sum() for _, tensor in tensors_of(back, "x") if tensor.requires_grad).backward()
    for (_, before), (_, after) in zip(tensors_of(nest, "x"), tensors_of(back, "x"), strict=True):
        assert torch.equal(before, after)
        assert before.grad is None or torch.equal(before.grad, torch.ones_like(before))
    assert type(back["boxes"][0]) is _Boxes
    assert back["names"][2:] == [None, 3]
    return [[call.name for call in calls] for calls in (forward, home, backward)], forward[0].bytes_to


@pytest.mark.parametrize("sizes", [[4, 4], [3, 0], [0, 0, 0], [0, 1, 0, 5]])
@pytest.mark.parametrize("balance", [True, False])
def test_a_nest_moves_in_one_exchange_each_way_on_all_ranks_alike(sizes, balance):
    for names, table in run_ranks(_wire_of_a_nest, len(sizes), sizes, balance):
        assert names == [
            ["all_gather_into_tensor", "all_to_all_single"],
            ["all_to_all_single"],
            ["all_to_all_single", "all_to_all_single"],
        ]
        assert max(table) <= 128  # the sizes and what must be agreed on, whatever the rows


def _leaving(rank, world_size, cases):
    """For each case: (rows that left, bytes to others forward, home, and in each backward)."""
    counted = []
    for seed, (sizes, balance, row, dtype) in enumerate(cases):
        numbers = torch.arange(sum(sizes)).split(sizes)[rank]
        shape = (sizes[rank], *row)
        x = torch.zeros(shape, dtype=dtype, requires_grad=dtype.is_floating_point)
        with recorded() as calls:
            met, ticket = batch_shuffle(x, generator=_generator(seed), balance=balance)
            home = batch_unshuffle(met, ticket)
            if x.requires_grad:
                home.sum().backward()
        exchanges = [call.bytes_to for call in calls if call.name == "all_to_all_single"]
        assert len(exchanges) == (4 if x.requires_grad else 2)
        owners = torch.tensor([owner for owner, n in enumerate(sizes) for _ in range(n)], dtype=torch.int64)
        where, _ = batch_shuffle(numbers, generator=_generator(seed), balance=balance)
        arrived = int((owners[where] != rank).sum())
        counted.append((arrived, [sum(to) - to[rank] for to in exchanges]))
    return counted


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_bytes_of_a_tensor_are_its_rows_that_change_rank(world_size):
    uneven = [tuple(5 * (rank + shift) % 7 for rank in range(world_size)) for shift in range(3)]
    kinds = [((3,), torch.uint8), ((), torch.float64), ((2, 3, 3), torch.bfloat16), ((0,), torch.float32)]
    cases = [(sizes, balance, *kind) for sizes in uneven for balance in (True, False) for kind in kinds]
    results = run_ranks(_leaving, world_size, cases)
    for number, (*_, row, dtype) in enumerate(cases):
        moved = sum(arrived for arrived, _ in (result[number] for result in results))
        directions = zip(*(sent for _, sent in (result[number] for result in results)), strict=True)
        for sent in directions:
            assert sum(sent) == moved * torch.Size(row).numel() * dtype.itemsize


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_direction_costs_the_share_of_rows_that_live_elsewhere(world_size):
    sizes = [(512,) * world_size, tuple(512 + 100 * (-1) ** rank for rank in range(world_size))]
    cases = [(each, balance, (3, 7), torch.float32) for each in sizes for balance in (True, False)]
    results = run_ranks(_leaving, world_size, cases)
    for number, (each, *_) in enumerate(cases):
        total = sum(each) * 21 * 4
        for sent in zip(*(result[number][1] for result in results), strict=True):
            assert sum(sent) == pytest.approx((world_size - 1) / world_size * total, rel=0.05)


def _nest_bytes(rank, world_size):
    nest = (torch.zeros(512, 4, 7, 7), torch.zeros(512, dtype=torch.int64), torch.zeros(512, 3, dtype=torch.bool))
    with recorded() as calls:
        batch_shuffle(nest, generator=_generator())
    to = calls[-1].bytes_to
    return sum(to) - to[rank], sum(tensor.numel() * tensor.element_size() for tensor in nest)


def test_tensors_that_travel_together_cost_the_sum_of_their_bytes():
    sent, sizes = zip(*run_ranks(_nest_bytes, 4), strict=True)
    assert sum(sent) == pytest.approx(3 / 4 * sum(sizes), rel=0.05)


# --- gradients ---


def _mixing(x: Tensor, balance: bool) -> Tensor:
    """Rows that meet on a rank depend on each other."""
    met, ticket = batch_shuffle(x, generator=_generator(), balance=balance)
    return batch_unshuffle((met - met.sum(0, keepdim=True) / 3).sin() * met, ticket)


def _lockstep(rank, world_size, cases):
    """The gradient of the sum over all ranks, against central differences: all ranks take each step together."""
    for sizes, balance in cases:
        x = torch.randn(sizes[rank], 2, dtype=torch.float64, generator=_generator(rank)).requires_grad_(True)
        weight = torch.randn(sizes[rank], 2, dtype=torch.float64, generator=_generator(10 + rank))
        (_mixing(x, balance) * weight).sum().backward()
        numeric = torch.zeros_like(x)
        for owner, n in enumerate(sizes):
            for entry in range(n * 2):
                sums = []
                for step in (1e-6, -1e-6):
                    moved = x.detach().clone()
                    if owner == rank:
                        moved.view(-1)[entry] += step
                    total = (_mixing(moved, balance) * weight).sum()
                    dist.all_reduce(total)
                    sums.append(total)
                if owner == rank:
                    numeric.view(-1)[entry] = (sums[0] - sums[1]) / 2e-6
        torch.testing.assert_close(x.grad, numeric, rtol=0, atol=1e-8)
        assert not len(x) or x.grad.abs().max() > 0.1
    return True


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_agree_with_differences_taken_on_all_ranks_in_lockstep(world_size):
    sizes = {2: [(2, 3), (0, 3)], 3: [(2, 0, 3)], 4: [(1, 0, 2, 2)]}[world_size]
    assert all(run_ranks(_lockstep, world_size, [(each, balance) for each in sizes for balance in (True, False)]))


class _Guarded(nn.Module):
    """A head as people write them: no rows, no computation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sin() if len(x) else x.new_zeros(0, 3)


def _head() -> _Guarded:
    torch.manual_seed(0)
    return _Guarded()


def _float_rows(sizes, rank):
    return torch.randn(sum(sizes), 3, dtype=torch.float64, generator=_generator(4)).split(sizes)[rank].clone()


def _check_against_here(x: Tensor, head: nn.Module, output: Tensor) -> None:
    """Rows apart from each other: the gradient of each rank's input is what it would be without a shuffle."""
    twin = x.detach().clone().requires_grad_(x.requires_grad)
    expected = head(twin)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=_generator(5))
    (output * weight).sum().backward()
    if not x.requires_grad:
        assert x.grad is None
        return
    if expected.requires_grad and len(x):
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-12)
    else:
        assert x.grad is not None  # of this rank without rows; the backward came by
        assert not x.grad.numel()


def _mixed_requirements(rank, world_size, which, sizes, balance):
    needed = {"all": range(world_size), "first": [0], "last": [world_size - 1], "none": []}[which]
    x = _float_rows(sizes, rank).requires_grad_(rank in needed)
    head = _head()
    met, ticket = batch_shuffle(x, generator=_generator(), balance=balance)
    home = batch_unshuffle(head(met), ticket)
    _check_against_here(x, head, home)
    # and a frozen head
    x = _float_rows(sizes, rank).requires_grad_(rank in needed)
    met, ticket = batch_shuffle(x, generator=_generator(), balance=balance)
    home = batch_unshuffle(met.sin(), ticket)
    if needed:
        home.square().sum().backward()
    if rank in needed:
        torch.testing.assert_close(x.grad, (2 * x.sin() * x.cos()).detach(), rtol=0, atol=1e-12)
    else:
        assert x.grad is None
    return True


_UNEVEN = [(2, 3), (1, 0), (0, 1), (0, 2, 0), (0, 0)]


@pytest.mark.parametrize("sizes", _UNEVEN, ids=str)
@pytest.mark.parametrize("which", ["all", "first", "last", "none"])
def test_ranks_that_need_no_gradient_or_have_no_rows_hold_up_nobody(which, sizes):
    for balance in (True, False):
        assert all(run_ranks(_mixed_requirements, len(sizes), which, sizes, balance, timeout=10))


def _nest_gradients(rank, world_size, sizes):
    n = sizes[rank]
    a, b = (torch.randn(n, 2, dtype=torch.float64, generator=_generator(10 * rank + k)) for k in range(2))
    a.requires_grad_(True)
    c = torch.arange(n)
    d = torch.randn(n, 2, dtype=torch.complex128, generator=_generator(rank)).requires_grad_(rank == 0)
    e = torch.randn(n, 1, generator=_generator(rank)).requires_grad_(True)  # never used

    met, ticket = batch_shuffle({"a": a, "b": b, "c": c, "d": d, "e": e}, generator=_generator())
    product = met["a"] * met["b"] * met["c"][:, None]
    home = batch_unshuffle({"used": product, "unused": met["a"].exp(), "number": met["c"], "z": met["d"] * 1j}, ticket)
    assert not home["number"].requires_grad
    (home["used"].sum() + (home["z"] * (2 - 1j)).real.sum()).backward()
    assert torch.equal(a.grad, b * c[:, None])
    assert b.grad is None
    assert torch.equal(e.grad, torch.zeros_like(e))
    if rank == 0:
        torch.testing.assert_close(d.grad, torch.full_like(d, (1j * (2 - 1j)).conjugate()))
    return True


@pytest.mark.parametrize("sizes", [[3, 2], [0, 3], [1, 0, 4]])
def test_only_what_needs_a_gradient_gets_one_and_unused_outputs_do_no_harm(sizes):
    assert all(run_ranks(_nest_gradients, len(sizes), sizes))


def _embedded(rank, world_size):
    """Integers need no gradient; the weights behind them do."""
    torch.manual_seed(0)
    table = nn.Embedding(9, 2, dtype=torch.float64)
    names = torch.arange(9).split([5, 4, 0])[rank]
    met, ticket = batch_shuffle(names, generator=_generator())
    home = batch_unshuffle(table(met), ticket)
    (home * (1 + names[:, None])).sum().backward()
    dist.all_reduce(table.weight.grad)
    return torch.equal(table.weight.grad, torch.arange(1.0, 10, dtype=torch.float64)[:, None].expand(-1, 2))


def test_gradients_reach_the_weights_behind_integer_inputs():
    assert all(run_ranks(_embedded, 3))


def _constant_on_one_rank(rank, world_size):
    x = _float_rows((3, 3), rank).requires_grad_(True)
    met, ticket = batch_shuffle(x, generator=_generator())
    home = batch_unshuffle(met.square() if rank else torch.ones_like(met), ticket)
    home.sum().backward()
    came_from_one = (home == 1).all(1)
    assert torch.equal(x.grad, torch.where(came_from_one[:, None], 0, 2 * x.detach()))
    return int(came_from_one.sum())


def test_a_rank_that_computes_a_constant_takes_part_in_the_backward():
    assert sum(run_ranks(_constant_on_one_rank, 2, timeout=10)) == 3


def _two_heads(rank, world_size):
    """Two shuffles in one graph, and a rank where one of them is cut off: the same exchanges in the same order."""
    x = _float_rows((1, 0), rank).requires_grad_(True)
    first, second = _head(), nn.Linear(3, 3).double()
    with recorded() as calls:
        met, ticket = batch_shuffle(x, generator=_generator())
        y = batch_unshuffle(first(met), ticket) + x
        met, ticket = batch_shuffle(y, generator=_generator(1))
        z = batch_unshuffle(second(met), ticket) + y
        met, ticket = batch_shuffle(x * 2, generator=_generator(2))
        (z.sum() + batch_unshuffle(first(met), ticket).sum()).backward()
    return [call.name for call in calls], x.grad is not None


def test_several_shuffles_in_a_graph_run_back_in_the_same_order():
    (names, first), (others, second) = run_ranks(_two_heads, 2, timeout=10)
    assert names == others
    assert names.count("all_to_all_single") == 12
    assert (first, second) == (True, True)


def _without_gradient(rank, world_size):
    x = torch.randn(3, 2, requires_grad=True)
    with torch.no_grad(), recorded() as calls:
        met, ticket = batch_shuffle(x, generator=_generator())
        home = batch_unshuffle(met, ticket)
    assert (met.requires_grad, home.requires_grad) == (False, False)
    met, ticket = batch_shuffle(x.detach(), generator=_generator())
    assert not met.requires_grad
    return len(calls)


def test_under_no_grad_nothing_requires_a_gradient():
    assert run_ranks(_without_gradient, 2) == [3, 3]


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((batch_shuffle(x)[0] ** 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused_rather_than_drawing_anew(reentrant):
    """The recomputed forward would shuffle otherwise than the first, and the gradient would be another batch's."""
    norm = build_norm("GhostBN", 2, group_size=3, dim=1)

    def part(x):
        met, ticket = batch_shuffle(x)
        return batch_unshuffle(norm(met), ticket)

    y = checkpoint(part, torch.randn(12, 2, requires_grad=True), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"batch_shuffle.*checkpoint"):
        y.square().sum().backward()


# --- mistakes, told on every rank ---


def _mistakes(rank, world_size):
    """What each rank is told; after each, a correct call still works: the ranks are in step."""
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    trips = {
        "row shapes": lambda: batch_shuffle(torch.zeros(2, 3 + rank), generator=_generator()),
        "row shapes, one rank empty": lambda: batch_shuffle(torch.zeros(2 * rank, 3 + rank), generator=_generator()),
        "dtypes": lambda: batch_shuffle(one.to((torch.float32, torch.int32)[rank]), generator=_generator()),
        "number of tensors": lambda: batch_shuffle((one,) * (1 + rank), generator=_generator()),
        "order of names": lambda: batch_shuffle(
            {"a": one, "b": other} if rank else {"b": other, "a": one}, generator=_generator()
        ),
        "names": lambda: batch_shuffle({"ab"[rank]: one}, generator=_generator()),
        "balance": lambda: batch_shuffle(one, generator=_generator(), balance=bool(rank)),
        "generators": lambda: batch_shuffle(one, generator=_generator(rank)),
        "not a tensor": lambda: batch_shuffle({"x": one, "bad": [{1}]}, generator=_generator()),
        "numbers of rows": lambda: batch_shuffle((one, torch.zeros(3, 3)), generator=_generator()),
        "no rows to tell": lambda: batch_shuffle((torch.tensor(1.0),), generator=_generator()),
        "nothing": lambda: batch_shuffle([None, 3], generator=_generator()),
        "other rows home": lambda: batch_unshuffle(
            {"a": (torch.zeros(3, 1),)}, batch_shuffle(one, generator=_generator())[1]
        ),
        "a number home": lambda: batch_unshuffle(torch.tensor(1.0), batch_shuffle(one, generator=_generator())[1]),
    }
    x = torch.arange(3) + rank
    return told_by(trips, lambda: torch.equal(batch_unshuffle(*batch_shuffle(x, generator=_generator())), x))


@pytest.fixture(scope="module")
def told():
    return run_ranks(_mistakes, 2, timeout=20)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("row shapes", r"ValueError: ranks shuffle .*; on this rank: .*\(2, [34]\)"),
        ("row shapes, one rank empty", "ValueError: ranks shuffle .*; on this rank: "),
        ("dtypes", "ValueError: ranks shuffle .*torch.(float|int)32"),
        ("number of tensors", "ValueError: ranks shuffle "),
        ("order of names", "ValueError: ranks shuffle "),
        ("names", "ValueError: ranks shuffle "),
        ("balance", "RuntimeError: ranks drew different shuffles"),
        ("generators", "RuntimeError: ranks drew different shuffles"),
        ("not a tensor", r"TypeError: cannot shuffle input\['bad'\]\[0\] of type set; use tensors"),
        ("numbers of rows", r"ValueError: .*same number of rows, got \{'input\[0\]': 2, 'input\[1\]': 3\}"),
        ("no rows to tell", "ValueError: .*same number of rows"),
        ("nothing", "ValueError: nothing to shuffle"),
        ("other rows home", r"ValueError: cannot unshuffle output\['a'\]\[0\] of shape \(3, 1\): .* returned 2 rows"),
        ("a number home", r"ValueError: cannot unshuffle output of shape \(\): "),
    ],
)
def test_mistakes_are_told_on_every_rank(told, mistake, words):
    for words_here in told:
        assert re.match(words, words_here[mistake], flags=re.DOTALL), words_here[mistake]


# --- some of the ranks ---


def _within_nodes(rank, world_size, nodes):
    os.environ["GROUP_RANK"] = str(nodes[rank])
    try:
        exchange._told.clear()
        x = torch.arange(6) + 100 * nodes[rank] + 10 * rank
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with recorded() as calls:
                met, ticket = batch_shuffle(x, generator=_generator(), group="node")
                assert torch.equal(batch_unshuffle(met, ticket), x)
            batch_shuffle(x, generator=_generator(), group="node")
    finally:
        del os.environ["GROUP_RANK"]
    told = [str(warning.message) for warning in heard if "over one rank" in str(warning.message)]
    return met.tolist(), told, [len(call.bytes_to) for call in calls if call.name == "all_to_all_single"]


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1], [5, 5, 5]], ids=str)
def test_rows_never_leave_their_node_and_a_node_of_one_rank_is_warned_once(nodes):
    results = run_ranks(_within_nodes, len(nodes), nodes)
    for node in set(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        met = [row for rank in ranks for row in results[rank][0]]
        home = [row + 100 * node + 10 * rank for rank in ranks for row in range(6)]
        assert sorted(met) == sorted(home)
        assert met != home
        # the same permutation as one process with these rows
        assert met == batch_shuffle(torch.tensor(home), generator=_generator())[0].tolist()
        for rank in ranks:
            _, told, exchanged_with = results[rank]
            assert len(told) == (1 if len(ranks) == 1 else 0)
            assert exchanged_with == ([] if len(ranks) == 1 else [len(ranks)] * 2)


def _within_a_group(rank, world_size):
    group = dist.new_group([0, 2])
    if rank == 1:
        return None
    x = torch.arange(4) + 10 * rank
    met, ticket = batch_shuffle(x, generator=_generator(), group=group)
    assert torch.equal(batch_unshuffle(met, ticket), x)
    return met.tolist()


def test_rows_may_stay_within_any_process_group():
    first, nobody, second = run_ranks(_within_a_group, 3)
    assert nobody is None
    assert sorted(first + second) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert sorted(first) != [0, 1, 2, 3]


@pytest.mark.filterwarnings("default")
def test_one_process_is_warned_exactly_once_and_at_the_users_line(monkeypatch):
    monkeypatch.setattr(exchange, "_told", set())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(3):
            batch_shuffle(torch.zeros(4, 1))
    assert [str(warning.message)[:27] for warning in heard] == ["batch_shuffle over one rank"]
    assert heard[0].filename == __file__


def test_the_ticket_says_who_sends_what_to_whom():
    sizes = (4, 0, 3)
    draws = [exchange.GroupDraw(sizes, rank, 3, 5, 0) for rank in range(3)]
    tickets = [exchange.make_ticket(draw, torch.device("cpu"), None) for draw in draws]
    sent = np.array([ticket.send for ticket in tickets])
    received = np.array([ticket.receive for ticket in tickets])
    assert (sent == received.T).all()
    assert sent.sum(1).tolist() == list(sizes)
    for ticket in tickets:
        here = torch.arange(ticket.num_rows)
        assert torch.equal(ticket.arrival_order[ticket.departure_order], here)
        assert torch.equal(ticket.home_order[ticket.send_order], torch.arange(len(ticket.send_order)))
        assert (ticket.groups.tolist(), ticket.num_groups) == ([0] * ticket.num_rows, 1)
