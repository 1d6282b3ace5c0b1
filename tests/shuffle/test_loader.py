import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from leakfree.errors import DataError
from leakfree.norms import build_norm, normalization_scope
from leakfree.shuffle import Shuffled, batch_unshuffle
from leakfree.shuffle.loader import KeyShuffleBatchSampler, PairedIndex, PairedViews
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:KeyShuffleBatchSampler. in one process")


def _sampler(num_samples, batch_size, rank=0, world_size=1, **options):
    options = {"seed": 3, "max_steps": 4, **options}
    return KeyShuffleBatchSampler(num_samples, batch_size, rank=rank, world_size=world_size, **options)


def _ids(batch, field):
    return [getattr(index, field) for index in batch]


# --- which samples: arithmetic on one process ---


@st.composite
def _shapes(draw):
    batch_size, world_size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    num_samples = batch_size * world_size + draw(st.integers(0, 40))
    return num_samples, batch_size, world_size


steps = st.integers(0, 10**6)
seeds = st.integers(0, 2**63 - 1)


@given(_shapes(), seeds, steps)
def test_the_ranks_keys_are_the_queries_of_the_step_and_positions_find_them(shape, seed, step):
    num_samples, batch_size, world_size = shape
    samplers = [_sampler(num_samples, batch_size, rank, world_size, seed=seed) for rank in range(world_size)]
    batches = [sampler.batch(step) for sampler in samplers]
    assert all(len(batch) == batch_size for batch in batches)
    assert {index.draw for batch in batches for index in batch} == {step}
    keys = [key for batch in batches for key in _ids(batch, "key")]
    queries = [query for batch in batches for query in _ids(batch, "query")]
    assert len(set(queries)) == batch_size * world_size  # none twice
    assert set(queries) <= set(range(num_samples))
    assert sorted(keys) == sorted(queries)
    everyone = torch.tensor(keys)
    for sampler, batch in zip(samplers, batches, strict=True):
        assert everyone[sampler.positions(step, device="cpu")].tolist() == _ids(batch, "query")


@given(_shapes(), st.integers(1, 3), seeds, steps)
def test_one_process_reads_what_the_ranks_read_for_any_number_of_groups(shape, per_rank, seed, step):
    num_samples, batch_size, world_size = shape
    num_samples, batch_size = num_samples * per_rank, batch_size * per_rank
    alone = _sampler(num_samples, batch_size * world_size, seed=seed, num_groups=per_rank * world_size)
    ranks = [_sampler(num_samples, batch_size, rank, world_size, seed=seed) for rank in range(world_size)]
    assert alone.batch(step) == [index for sampler in ranks for index in sampler.batch(step)]


@given(_shapes(), seeds, st.integers(0, 9))
def test_an_epoch_shows_no_sample_twice(shape, seed, epoch):
    num_samples, batch_size, world_size = shape
    rows = batch_size * world_size
    per_epoch = num_samples // rows
    sampler = _sampler(num_samples, rows, seed=seed)
    seen = [q for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for q in _ids(sampler.batch(step), "query")]
    assert len(set(seen)) == len(seen) == per_epoch * rows


@given(_shapes(), seeds, st.integers(0, 9))
def test_a_resumed_sampler_goes_on_as_if_never_stopped(shape, seed, start):
    num_samples, batch_size, world_size = shape
    through = _sampler(num_samples, batch_size, world_size - 1, world_size, seed=seed, max_steps=8)
    resumed = _sampler(num_samples, batch_size, world_size - 1, world_size, seed=seed, max_steps=8, start_step=start)
    assert list(resumed) == list(through)[start:]
    assert len(resumed) == len(through) == 8


def test_each_step_and_each_seed_has_its_own_order_and_groups():
    sampler, other = _sampler(40, 20), _sampler(40, 20, seed=4)  # two steps to an epoch
    drawn = [(sampler, step) for step in range(4)] + [(other, 0)]
    assert len({tuple(_ids(source.batch(step), "query")) for source, step in drawn}) == 5
    assert len({tuple(source.positions(step, device="cpu").tolist()) for source, step in drawn}) == 5


def test_samples_and_their_keys_meet_as_often_as_chance():
    """Where each step is an epoch: one permutation used for both order and groups would show here."""
    size, draws, rows = 4, 600, 12
    met = {"query": np.zeros((rows, rows)), "key": np.zeros((rows, rows))}
    again = np.zeros((rows, rows))  # companions as queries and as keys in the same step
    samplers = [_sampler(rows, size, rank, 3, seed=0) for rank in range(3)]
    for step in range(draws):
        together = {}
        for field in met:
            group = np.zeros(rows, dtype=int)
            for rank, sampler in enumerate(samplers):
                group[_ids(sampler.batch(step), field)] = rank
            together[field] = group[:, None] == group[None, :]
            met[field] += together[field]
        again += together["query"] & together["key"]
    chance = (size - 1) / (rows - 1)
    pairs = ~np.eye(rows, dtype=bool)
    for counts, share in ((met["query"], chance), (met["key"], chance), (again, chance**2)):
        # binomial standard deviation; six of them
        assert abs(counts[pairs] / draws - share).max() < 6 * np.sqrt(share * (1 - share) / draws)


# --- the way home: real ranks ---


class _Coded(Dataset):
    """An image says its own number."""

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index))


def _minus(image):
    return -image


def _home(rank, world_size):
    sampler = _sampler(31, 5, rank, world_size, max_steps=3)
    crossed, queries_of_rank = 0, []
    for queries, keys, draws in DataLoader(PairedViews(_Coded(), nn.Identity(), _minus), batch_sampler=sampler):
        own = queries[:, 0, 0, 0]
        crossed += int((~torch.isin(-keys[:, 0, 0, 0], own)).sum())
        home = batch_unshuffle(keys.mean((2, 3)), sampler.ticket(draws, device=keys.device))
        assert torch.equal(home[:, 0], -own)
        queries_of_rank.append(own)
    return crossed, queries_of_rank


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_keys_come_home_to_their_queries(world_size):
    results = run_ranks(_home, world_size)
    assert all((crossed > 0) == (world_size > 1) for crossed, _ in results)
    for step in range(3):
        assert len(set(torch.cat([queries[step] for _, queries in results]).tolist())) == 5 * world_size


_SEED, _ROWS = 11, 12


def _encoder(norm, **options):
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        layers += [nn.Conv2d(3, 3, 3, padding=1), build_norm(norm, 3, **options), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 5)).double()


def _images():
    return torch.randn(40, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _keys(rank, world_size, transport, num_groups=2):
    """The keys of this rank's queries, of two steps, by one of the transports."""
    batch_size = _ROWS // world_size
    options = {"seed": _SEED, "max_steps": 2, "num_groups": num_groups}
    sampler = _sampler(40, batch_size, rank, world_size, **options)
    if transport == "statistics":
        encoder = _encoder("ShuffleBN", num_groups=num_groups, seed=_SEED)
    elif transport == "features":
        encoder = Shuffled(_encoder("BN"), num_groups, seed=_SEED)
    elif num_groups == world_size:
        encoder = _encoder("BN")
    else:
        encoder = _encoder("GhostBN", group_size=_ROWS // num_groups)
    out = []
    for queries, keys, draws in DataLoader(PairedViews(TensorDataset(_images()), _only), batch_sampler=sampler):
        with normalization_scope():
            if transport == "loader":
                out.append(batch_unshuffle(encoder(keys), sampler.ticket(draws, device=keys.device)))
            elif transport == "gathered":
                everyone = [torch.empty(batch_size, 5, dtype=torch.float64) for _ in range(world_size)]
                torch.distributed.all_gather(everyone, encoder(keys).detach())
                out.append(torch.cat(everyone)[sampler.positions(draws, device=keys.device)])
            else:
                out.append(encoder(queries))
    return torch.cat(out).detach()


def _only(item):
    (image,) = item
    return image


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_groups", [2, 4])
def test_all_transports_give_the_same_keys(num_groups):
    transports = ["statistics", "features", "loader", "gathered"]
    keys = {name: run_ranks(_keys, 2, name, num_groups) for name in transports}
    for name in transports[1:]:
        for a, b in zip(keys["statistics"], keys[name], strict=True):
            _close(a, b)
    # one process with as many virtual groups: the same, with the ranks' rows of each step one after the other
    for name in transports[:3]:
        alone = _keys(0, 1, name, num_groups).view(2, _ROWS, 5)
        for rank, half in enumerate(alone.split(_ROWS // 2, dim=1)):
            _close(half.reshape(-1, 5), keys["statistics"][rank])


def test_in_one_process_a_whole_batch_norm_does_not_notice():
    plain = _keys(0, 1, "loader", 1)
    images = torch.cat([_images()[_ids(_sampler(40, _ROWS, seed=_SEED).batch(step), "query")] for step in range(2)])
    _close(plain, torch.cat([_encoder("BN")(half) for half in images.split(_ROWS)]).detach())
    assert (plain - _keys(0, 1, "loader", 2)).abs().max() > 1e-3  # virtual groups do


# --- loaders ---


def _batches(num_workers, rank, world_size):
    sampler = _sampler(31, 5, rank, world_size, max_steps=3)
    loader = DataLoader(PairedViews(_Coded(), nn.Identity(), _minus), batch_sampler=sampler, num_workers=num_workers)
    return list(loader)


def test_loader_processes_change_nothing():
    for two, none in zip(_batches(2, 1, 3), _batches(0, 1, 3), strict=True):
        for a, b in zip(two, none, strict=True):
            assert torch.equal(a, b)
        assert two[2].dtype == torch.int64


def test_keys_from_loader_processes_come_home():
    sampler = _sampler(31, 5)
    for queries, keys, draws in _batches(2, 0, 1):
        assert torch.equal(batch_unshuffle(-keys, sampler.ticket(draws, device="cpu")), queries)


def test_the_key_view_is_made_like_the_query_view_unless_told_otherwise():
    index = PairedIndex(2, 5, 7)
    query, key, draw = PairedViews(_Coded(), _minus)[index]
    assert (query[0, 0, 0].item(), key[0, 0, 0].item(), draw) == (-2, -5, 7)


# --- errors ---


@pytest.mark.parametrize("index", [3, (3, 4, 0)])
def test_views_need_pairs(index):
    with pytest.raises(TypeError, match="batch_sampler=KeyShuffleBatchSampler"):
        PairedViews(_Coded(), nn.Identity())[index]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "0 samples per rank"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1 of 2"),
        ({"world_size": 0}, "rank 0 of 0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"start_step": -1}, "start_step -1"),
        ({"max_steps": -1}, "max_steps -1"),
        ({"num_groups": 0}, "got 0"),
        ({"num_groups": 3}, "multiple of the 2 ranks"),
        ({"num_groups": 8}, "divide the 12 rows"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    arguments = {"num_samples": 12, "batch_size": 6, "rank": 0, "world_size": 2, "seed": 0, "max_steps": 1}
    KeyShuffleBatchSampler(**arguments)
    with pytest.raises(ValueError, match=message):
        KeyShuffleBatchSampler(**{**arguments, **change})


@pytest.mark.parametrize("num_samples", [0, 11])
def test_a_step_needs_as_many_samples(num_samples):
    with pytest.raises(DataError, match=f"{num_samples} samples, but a step takes 6 on each of 2 ranks"):
        _sampler(num_samples, 6, 0, 2)


@pytest.mark.filterwarnings("error")
def test_a_single_group_warns():
    for num_groups in (None, 1):
        with pytest.warns(UserWarning, match="no effect"):
            _sampler(12, 6, num_groups=num_groups)
    _sampler(12, 6, num_groups=2)
    _sampler(12, 6, 0, 2)


def test_a_batch_of_several_draws_is_refused():
    sampler = _sampler(12, 6)
    for draws, told in ((torch.tensor([1, 1, 2]), r"\[1, 2\]"), (torch.zeros(0, dtype=torch.int64), r"\[\]")):
        with pytest.raises(ValueError, match=f"must be of one draw, got the draws {told}"):
            sampler.ticket(draws, device="cpu")
        with pytest.raises(ValueError, match="must be of one draw"):
            sampler.positions(draws, device="cpu")


def test_a_sampler_of_another_rank_gives_no_ticket():
    with pytest.raises(ValueError, match="made for rank 1 of 2, this process is rank 0 of 1"):
        _sampler(12, 6, 1, 2).ticket(0, device="cpu")


def _apart(rank, world_size, change):
    arguments = {"seed": 0, "step": 0, "num_samples": 40, "batch_size": 4}
    if rank == 1:
        arguments |= change
    step = arguments.pop("step")
    sampler = _sampler(**arguments, rank=rank, world_size=world_size)
    with pytest.raises(RuntimeError, match="ranks drew different batches"):
        sampler.ticket(step, device="cpu")
    return True


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"num_samples": 41}, {"batch_size": 5}])
def test_ranks_that_are_apart_are_all_told(change):
    assert run_ranks(_apart, 2, change, timeout=20) == [True, True]
