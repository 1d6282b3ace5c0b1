"""PreciseBN against the statistics of the concatenated data, over ranks, and against fvcore's known faults."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.distributed import get_rank
from leakfree.errors import LeakfreeError
from leakfree.norms import convert_norms
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.ranks import run_ranks

SIZES = (5, 1, 8, 3)  # rows of the batches: unequal on purpose


def batches(sizes=SIZES, seed=0):
    """Batches with a mean of their own each: averaging batch variances would be far off."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64)
        + 3 * torch.randn(3, 1, 1, generator=generator)
        for n in sizes
    ]


def small_model(norm: str | None = None) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)
    ).double()
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    return (convert_norms(model, norm) if norm else model).eval()


def snapshot(model):
    return (
        {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()},
        [(module.training, getattr(module, "momentum", 0)) for module in model.modules()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    )


def assert_bit_identical(model, before):
    tensors, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert tensors.keys() == before[0].keys()
    for key, (identity, value) in before[0].items():
        assert tensors[key][0] == identity, f"{key}: the object was replaced"
        assert torch.equal(tensors[key][1], value), key


def assert_statistics_of(layer, values, tolerance=1e-12):
    """``values``: (N, C, *), everything that entered the layer."""
    flat = values.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(layer.running_mean.double(), flat.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.running_var.double(), flat.var(1, correction=1), rtol=tolerance, atol=tolerance)


# --- the definition


@pytest.mark.parametrize("norm", [None, "BN", "SyncBN"])
def test_first_layer_gets_the_unbiased_statistics_of_the_concatenated_data(norm):
    model, data = small_model(norm), batches()
    result = precise_bn(model, data)
    assert_statistics_of(model[1], model[0](torch.cat(data)).detach())
    assert result.num_samples == sum(SIZES)
    assert list(result.layers) == ["1", "5"]
    assert result.untouched == ()


def test_later_layers_get_the_pooled_statistics_of_their_batch_normalized_inputs():
    model, data = small_model(), batches()
    entered = []
    for x in data:
        h = model[0](x)
        h = torch.nn.functional.batch_norm(h, None, None, model[1].weight, model[1].bias, training=True)
        entered.append(model[4](h.relu()).detach())  # dropout is off: the model is in eval mode
    precise_bn(model, data)
    assert_statistics_of(model[5], torch.cat(entered))


def test_a_large_mean_cancels_nothing():
    layer = nn.BatchNorm1d(2)
    data = [torch.randn(1000, 2, generator=torch.Generator().manual_seed(s)) * 0.1 + 3000 for s in range(5)]
    precise_bn(layer, data)
    assert_statistics_of(layer, torch.cat(data), tolerance=1e-6)  # float32 buffers


def test_chunking_of_large_inputs_changes_nothing(monkeypatch):
    whole, chunked = small_model(), small_model()
    precise_bn(whole, batches())
    monkeypatch.setattr("leakfree.population._CHUNK", 200)
    precise_bn(chunked, batches())
    torch.testing.assert_close(chunked.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)


def test_reported_shift_is_in_units_of_the_old_statistics():
    layer = nn.BatchNorm1d(1, eps=1e-12).double()
    layer.running_mean.fill_(1.0)
    layer.running_var.fill_(4.0)
    data = [torch.tensor([[2.0], [8.0]], dtype=torch.float64)]  # mean 5, unbiased variance 18
    shift = precise_bn(layer, data).layers["BatchNorm1d"]
    assert shift.mean == pytest.approx((5 - 1) / 2)
    assert shift.var == pytest.approx((18 - 4) / 4)
    again = precise_bn(layer, data).layers["BatchNorm1d"]
    assert (again.mean, again.var) == (0.0, 0.0)


def test_half_precision_activations_are_counted_in_float64():
    layer = nn.BatchNorm2d(3)
    data = [x.to(torch.bfloat16) for x in batches()]
    precise_bn(layer, data)
    assert_statistics_of(layer, torch.cat(data), tolerance=1e-5)


# --- what it leaves alone


def test_only_means_and_variances_change_and_in_place():
    model = small_model()
    model[3].train()  # as the caller left it
    before = snapshot(model)
    momentum = model[1].momentum = 0.3
    precise_bn(model, batches())
    assert model[1].momentum == momentum
    model[1].momentum = 0.1
    changed = {key for key, (_, value) in before[0].items() if not torch.equal(value, model.state_dict()[key])}
    assert changed == {f"{layer}.{name}" for layer in (1, 5) for name in ("running_mean", "running_var")}
    with torch.no_grad():
        for key in changed:
            model.state_dict()[key].copy_(before[0][key][1])
    assert_bit_identical(model, before)


def test_random_states_continue_as_if_nothing_had_happened():
    model = small_model().train()  # dropout draws
    loader = torch.utils.data.DataLoader(torch.cat(batches()), batch_size=4, shuffle=True)  # and so does the loader

    def noisy(model, batch):
        random.random()
        np.random.rand()
        model(batch)

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = (torch.rand(3).tolist(), random.random(), np.random.rand())
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    precise_bn(model, loader, forward=noisy)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected


def test_frozen_layers_are_left_alone():
    for norm in (None, "BN"):
        model = small_model(norm)
        FreezeBN(at=0, where="^1$").step(model, 1, 2)
        first = model[1].running_mean.clone()
        result = precise_bn(model, batches())
        assert list(result.layers) == ["5"]
        assert torch.equal(first, model[1].running_mean)
        FreezeBN(at=0).step(model, 1, 2)
        with pytest.raises(LeakfreeError, match="no batch norm with running statistics that is not frozen"):
            precise_bn(model, batches())


def test_exception_in_the_middle_leaves_the_model_bit_identical():
    for norm in (None, "BN", "ShuffleBN"):
        model = small_model(norm)
        before = snapshot(model)
        calls = []

        def failing(model, batch, calls=calls):
            model(batch)
            calls.append(batch)
            if len(calls) == 3:
                raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            precise_bn(model, batches(), forward=failing)
        assert_bit_identical(model, before)


def test_interrupted_by_the_user_leaves_the_model_bit_identical():
    model = small_model()
    before = snapshot(model)

    def loader():
        yield batches()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precise_bn(model, loader())
    assert_bit_identical(model, before)


def test_non_finite_activations_are_refused_and_nothing_is_written():
    model = small_model()
    before = snapshot(model)
    data = batches()
    data[2][0, 0, 0, 0] = float("inf")
    with pytest.raises(LeakfreeError, match="the inputs of 1 are not finite"):
        precise_bn(model, data)
    assert_bit_identical(model, before)


def test_forward_that_replaces_a_buffer_object_is_undone():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.norm(x)

    model = Counting()
    calls = model.calls
    precise_bn(model, batches())
    assert model.calls is calls
    assert float(calls) == 0


# --- fvcore's faults


def test_short_loader_is_used_and_reported():
    model = small_model()
    assert precise_bn(model, batches(), num_samples=10_000).num_samples == sum(SIZES)
    assert_statistics_of(model[1], model[0](torch.cat(batches())).detach())


def test_num_samples_stops_after_the_batch_that_reaches_it():
    model = small_model()
    assert precise_bn(model, iter(batches()), num_samples=6).num_samples == 6
    assert_statistics_of(model[1], model[0](torch.cat(batches()[:2])).detach())
    assert precise_bn(model, batches(), num_samples=7).num_samples == 14


def test_empty_batch_counts_as_nothing():
    model, data = small_model(), batches()
    empty = data[0][:0]
    assert precise_bn(model, [empty, *data, empty]).num_samples == sum(SIZES)
    assert_statistics_of(model[1], model[0](torch.cat(data)).detach())


def test_layer_used_twice_accumulates_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3).double()

        def forward(self, x):
            return self.norm(x) + self.norm(input=2 * x - 1)

    model, data = Twice(), batches()
    precise_bn(model, data)
    assert_statistics_of(model.norm, torch.cat([torch.cat([x, 2 * x - 1]) for x in data]))


def test_layer_never_called_keeps_its_statistics():
    class Unused(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Unused(nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double())
    model[1].running_var.fill_(7.0)
    before = copy.deepcopy(model[1].state_dict())
    result = precise_bn(model, batches())
    assert result.untouched == ("1",)
    assert list(result.layers) == ["0"]
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_does_not_hide_its_layers(training):
    model = nn.Sequential(nn.BatchNorm2d(3)).double().train(training)
    precise_bn(model, batches())
    assert_statistics_of(model[0], torch.cat(batches()))
    assert model.training is model[0].training is training


def test_cumulative_momentum_survives():
    layer = nn.BatchNorm2d(3, momentum=None).double()
    precise_bn(layer, batches())
    assert layer.momentum is None
    assert_statistics_of(layer, torch.cat(batches()))


# --- batches of any form


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3).double()

    def forward(self, image, other=None):
        images = torch.cat(image) if isinstance(image, list) else image
        return self.norm(images if other is None else images + other)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, ["target"] * len(x)],
        lambda x: {"image": x, "other": torch.zeros(())},
        lambda x: ([row[None] for row in x], [{"boxes": None}] * len(x)),
    ],
    ids=["tuple", "list", "dict", "list of images"],
)
def test_default_forward_takes_tensors_tuples_and_dicts(wrap):
    model, data = TwoInputs(), batches()
    assert precise_bn(model, [wrap(x) for x in data]).num_samples == sum(SIZES)
    assert_statistics_of(model.norm, torch.cat(data))


def test_list_of_dicts_counts_its_length_under_an_own_forward():
    model, data = TwoInputs(), batches()
    loader = [[{"image": row} for row in x] for x in data]
    result = precise_bn(model, loader, forward=lambda m, batch: m(torch.stack([item["image"] for item in batch])))
    assert result.num_samples == sum(SIZES)
    assert_statistics_of(model.norm, torch.cat(data))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: precise_bn(nn.GroupNorm(1, 3), batches()), "no batch norm with running statistics"),
        (lambda: precise_bn(small_model(), []), "the loader gave no samples"),
        (lambda: precise_bn(small_model(), batches(), 0), "num_samples must be at least 1, got 0"),
        (lambda: precise_bn(small_model(), ["text"]), "how many samples a batch of type str"),
        (lambda: precise_bn(small_model(), batches(), forward=lambda m, b: None), "ran no batch norm"),
    ],
)
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises(LeakfreeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_compiled_models_are_measured_too():
    plain, compiled = (nn.Sequential(small_model()[0:2], nn.ReLU()).train() for _ in range(2))
    for model in (plain, compiled):
        model[0][1].momentum = 0.0  # as during the estimate: no guard of the compiled code would notice a difference
    compiled[0].compile(backend="eager")
    wrapped = torch.compile(compiled, backend="eager")
    with torch.no_grad():
        wrapped(batches()[0])
        compiled[0](batches()[0])
    precise_bn(plain, batches())
    assert list(precise_bn(wrapped, batches()).layers) == ["0.1"]
    torch.testing.assert_close(compiled[0][1].running_mean, plain[0][1].running_mean, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_moved_to_the_device_of_the_model():
    here, there = small_model(), small_model().cuda()
    precise_bn(here, batches())
    precise_bn(there, batches())
    torch.testing.assert_close(there.cpu().state_dict(), here.state_dict(), rtol=1e-9, atol=1e-9)


# --- ranks

SHARDS = {2: ([5, 1, 8], [3]), 3: ([5, 1], [], [8, 3])}


def statistics_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def _shard_rank(rank, world_size):
    torch.rand(rank)  # ranks with random states of their own
    every = iter(batches())
    mine = [[next(every) for _ in sizes] for sizes in SHARDS[world_size]][rank]
    model = small_model("BN")
    result = precise_bn(model, mine)
    return result, statistics_of(model)


@pytest.mark.parametrize("world_size", [2, 3])
def test_uneven_and_empty_ranks_equal_one_process_and_agree_bitwise(world_size):
    alone = small_model("BN")
    expected = precise_bn(alone, batches())
    answers = run_ranks(_shard_rank, world_size)
    for result, state in answers:
        assert result.num_samples == expected.num_samples
        assert result == answers[0][0]
        torch.testing.assert_close(state, statistics_of(alone), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, answers[0][1], rtol=0, atol=0)


def _sync_rank(rank, world_size, norm):
    mine = [x[[0, 1, 2]] if rank == 0 else x[[3]] for x in batches((4, 4))]
    model = small_model()
    convert_norms(model, norm, **({"num_groups": 1} if norm == "ShuffleBN" else {}))
    return precise_bn(model, mine).num_samples, statistics_of(model)


@pytest.mark.parametrize("norm", ["SyncBN", "ShuffleBN"])
@pytest.mark.filterwarnings("ignore:ShuffleBN")
def test_synchronized_norms_count_globally(norm):
    alone = small_model("BN")
    precise_bn(alone, batches((4, 4)))
    for samples, state in run_ranks(_sync_rank, 2, norm):
        assert samples == 8
        torch.testing.assert_close(state, statistics_of(alone), rtol=1e-12, atol=1e-12)


def _share_rank(rank, world_size):
    model = small_model("BN")
    result = precise_bn(model, batches((2, 2, 2, 2), seed=rank), num_samples=5)  # a share of 3: two batches
    return result.num_samples, model[1].running_mean


def test_num_samples_is_shared_by_the_ranks():
    expected = small_model("BN")
    precise_bn(expected, [x for seed in range(2) for x in batches((2, 2, 2, 2), seed=seed)[:2]])
    for samples, mean in run_ranks(_share_rank, 2):
        assert samples == 8
        torch.testing.assert_close(mean, expected[1].running_mean, rtol=1e-12, atol=1e-12)


def _failing_rank(rank, world_size, norm, fault):
    """What each rank is told, and whether its model stayed as it was."""
    model = small_model(norm)
    before = snapshot(model)

    def loader():
        data = batches((4, 4))
        yield data[0]
        if fault == "loader" and rank == 1:
            raise OSError("disk gone")
        if fault == "uneven" and rank == 1:
            return
        yield data[1]

    def forward(model, batch):
        model(batch)
        if fault == "forward" and get_rank() == 1:
            raise OSError("disk gone")

    try:
        precise_bn(model, loader(), forward=forward)
    except Exception as error:
        assert_bit_identical(model, before)
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("norm", "fault"), [("BN", "loader"), ("BN", "forward"), ("SyncBN", "loader"), ("SyncBN", "forward")]
)
def test_failure_on_one_rank_is_raised_on_all(norm, fault):
    other, own = run_ranks(_failing_rank, 2, norm, fault)
    assert own == "OSError: disk gone"
    assert other == "RuntimeError: precise_bn: rank 1 failed: OSError: disk gone"


def test_synchronized_norms_refuse_unequal_numbers_of_batches_on_every_rank():
    messages = run_ranks(_failing_rank, 2, "SyncBN", "uneven")
    assert messages[0] == messages[1]
    assert "rank 1 ran out before rank 0" in messages[0]
    assert run_ranks(_failing_rank, 2, "BN", "uneven") == ["no error", "no error"]


def _nothing_rank(rank, world_size):
    with pytest.raises(LeakfreeError, match="no samples on any rank"):
        precise_bn(small_model("BN"), [])


def test_no_samples_on_any_rank_is_an_error_on_all():
    run_ranks(_nothing_rank, 2)


def _ddp_rank(rank, world_size):
    model = nn.parallel.DistributedDataParallel(small_model())
    return list(precise_bn(model, batches()[: 2 * rank]).layers), model.module[1].running_mean


def test_ddp_is_looked_through_and_does_not_synchronize_buffers():
    answers = run_ranks(_ddp_rank, 2)
    for layers, mean in answers:
        assert layers == ["1", "5"]
        assert torch.equal(mean, answers[0][1])
