"""PreciseBN against the statistics of the concatenated data, over ranks, and against fvcore's known faults."""

from __future__ import annotations

import copy
import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.distributed import get_rank
from leakfree.errors import LeakfreeError
from leakfree.norms import attach_convolutions, build_norm, convert_norms, domain
from leakfree.population import precise_bn, recompute_statistics
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


@pytest.mark.parametrize("shift", [0.0, 3000.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_float32_moments_are_exact_whether_read_or_counted(layout, shift):
    """A plain batch norm leaves its moments in its buffers; SyncBN, channels last and a large mean need a pass."""
    data = [(x.float() + shift).contiguous(memory_format=layout) for x in batches()]
    for layer in (nn.BatchNorm2d(3), build_norm("BN", 3), build_norm("SyncBN", 3)):
        precise_bn(layer, data)
        assert_statistics_of(layer, torch.cat(data), tolerance=1e-6)


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


# --- layer by layer


def deep_model() -> nn.Sequential:
    """Three batch norms, in another order of definition than of execution."""

    class Deep(nn.Sequential):
        def forward(self, x):
            for position in (1, 2, 3, 4, 0, 3, 5):
                x = self[position](x)
            return x

    torch.manual_seed(2)
    model = Deep(
        nn.BatchNorm2d(5), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 2), nn.BatchNorm2d(5)
    ).double()
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 6, 6, dtype=torch.float64))
        for position in (0, 2, 5):
            model[position].weight.uniform_(0.5, 2)
            model[position].bias.uniform_(-1, 1)
    return model.eval()


def entering(model, data, layers):
    """What enters each layer in one forward of all the data in eval mode."""
    entered, handles = {}, []
    for path in layers:

        def keep(module, args, path=path):
            entered.setdefault(path, []).append(args[0])

        handles.append(model.get_submodule(path).register_forward_pre_hook(keep))
    with torch.no_grad():
        model.eval()(data)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(values) for path, values in entered.items()}


@pytest.mark.parametrize("norm", [None, "BN", "SyncBN", "BatchRenorm", "BGN"])
def test_layerwise_statistics_are_those_of_an_eval_forward_at_every_layer(norm):
    model = deep_model()
    if norm is not None:
        convert_norms(model, norm)
    model.train()  # what mode the model is left in does not matter to its batch norms
    result = precise_bn(model, batches(), layerwise=True)
    assert all(module.training for module in model.modules())
    assert (result.num_samples, set(result.layers)) == (sum(SIZES), {"0", "2", "5"})
    for path, values in entering(model, torch.cat(batches()), result.layers).items():
        assert_statistics_of(model.get_submodule(path), values, tolerance=1e-11)


def test_layerwise_statistics_of_a_batch_group_norm_are_pooled():
    model = nn.Sequential(build_norm("BGN", 4, num_groups=2)).double()
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)  # a single value of each channel
    precise_bn(model, [x], layerwise=True)
    grouped = x.view(2, 2)
    torch.testing.assert_close(model[0].running_mean, grouped.mean(1).repeat_interleave(2))
    torch.testing.assert_close(model[0].running_var, grouped.var(1).repeat_interleave(2))


def test_layerwise_statistics_depend_neither_on_the_batches_nor_on_what_was_stored():
    whole, single = deep_model(), deep_model()
    with torch.no_grad():
        for position in (0, 2, 5):
            single[position].running_mean.fill_(3.0)
            single[position].running_var.fill_(0.1)
    precise_bn(whole, [torch.cat(batches())], layerwise=True)
    precise_bn(single, [row[None] for row in torch.cat(batches())], layerwise=True)
    torch.testing.assert_close(single.state_dict(), whole.state_dict(), rtol=1e-11, atol=1e-11)


def test_layerwise_takes_one_pass_for_each_layer_over_the_same_batches():
    seen = []

    class Loader:
        def __iter__(self):
            seen.append(0)
            for x in batches():
                seen[-1] += 1
                yield x + torch.rand(1)  # augmentation

    model = deep_model()
    torch.manual_seed(4)
    augmented = torch.cat([x + torch.rand(1) for x in batches()])
    torch.manual_seed(4)
    precise_bn(model, Loader(), layerwise=True)
    assert seen == [len(SIZES)] * 3
    for path, values in entering(model, augmented, ["0", "2", "5"]).items():
        assert_statistics_of(model.get_submodule(path), values, tolerance=1e-11)


def test_layerwise_passes_of_a_shuffling_loader_see_the_same_samples():
    data = torch.utils.data.TensorDataset(torch.cat(batches()))

    def loader():
        generator = torch.Generator().manual_seed(7)
        return torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, generator=generator)

    model = deep_model()
    precise_bn(model, loader(), 6, layerwise=True)  # two of six batches
    chosen = torch.cat([x for (x,) in islice(loader(), 2)])
    for path, values in entering(model, chosen, ["0", "2", "5"]).items():
        assert_statistics_of(model.get_submodule(path), values, tolerance=1e-11)


class GivesLess:
    """The second pass lacks a batch."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(batches()[self.passes > 1 :])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: iter(batches()), "3 passes over the data need a loader that can be iterated again .* list_iterator"),
        (lambda: (x for x in batches()), "generator, which can be iterated once"),
        (GivesLess, "gave 12 samples in a later pass but 17 in the first"),
    ],
)
def test_layerwise_refuses_loaders_that_do_not_give_the_same_again(loader, message):
    model = deep_model()
    before = snapshot(model)
    with pytest.raises(LeakfreeError, match=message):
        precise_bn(model, loader(), layerwise=True)
    assert_bit_identical(model, before)


@pytest.mark.parametrize("fails_at", [2, 5, 9])
def test_layerwise_failure_in_any_pass_leaves_the_model_bit_identical(fails_at):
    model = deep_model()
    model[3].train()
    before = snapshot(model)
    calls = []

    def failing(model, batch):
        model(batch)
        calls.append(batch)
        if len(calls) == fails_at:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        precise_bn(model, batches(), layerwise=True, forward=failing)
    assert_bit_identical(model, before)


def test_layerwise_changes_only_means_and_variances_and_reports_the_whole_shift():
    model = deep_model()
    before = snapshot(model)
    result = precise_bn(model, batches(), layerwise=True)
    changed = {key for key, (_, value) in before[0].items() if not torch.equal(value, model.state_dict()[key])}
    assert changed == {f"{layer}.{name}" for layer in (0, 2, 5) for name in ("running_mean", "running_var")}
    old_mean, old_var = (before[0][f"5.{name}"][1] for name in ("running_mean", "running_var"))
    distance = (model[5].running_mean - old_mean).abs() / (old_var + model[5].eps).sqrt()
    assert result.layers["5"].mean == pytest.approx(distance.mean().item())
    with torch.no_grad():
        for key in changed:
            model.state_dict()[key].copy_(before[0][key][1])
    assert_bit_identical(model, before)


def test_layerwise_fills_each_domain():
    model = nn.Sequential(
        build_norm("DomainBN", 3, num_domains=2), nn.ReLU(), build_norm("DomainBN", 3, num_domains=2)
    ).double()

    def in_domain(model, batch):
        with domain(batch[1]):
            model(batch[0])

    data = [(x, k % 2) for k, x in enumerate(batches())]
    result = precise_bn(model, data, layerwise=True, forward=in_domain)
    assert list(result.layers) == ["0[0]", "0[1]", "2[0]", "2[1]"]
    for index in range(2):
        with domain(index):
            entered = entering(model, torch.cat([x for x, k in data if k == index]), ["0", "2"])
        for path, values in entered.items():
            assert_statistics_of(OneDomain(model.get_submodule(path), index), values, tolerance=1e-11)


class OneDomain:
    def __init__(self, layer, index):
        self.running_mean, self.running_var = layer.running_mean[index], layer.running_var[index]


def _layerwise_rank(rank, world_size, norm):
    every = iter(batches())
    mine = [[next(every) for _ in sizes] for sizes in SHARDS[world_size]][rank]
    model = deep_model()
    if norm is not None:
        convert_norms(model, norm)
    result = precise_bn(model, mine, layerwise=True)
    return result, statistics_of(model)


@pytest.mark.parametrize(("world_size", "norm"), [(2, None), (2, "SyncBN"), (3, "BN")])
def test_layerwise_over_uneven_ranks_is_exact_and_bitwise_the_same(world_size, norm):
    answers = run_ranks(_layerwise_rank, world_size, norm)
    model = deep_model()
    for result, state in answers:
        assert result == answers[0][0]
        torch.testing.assert_close(state, answers[0][1], rtol=0, atol=0)
    model.load_state_dict(answers[0][1])
    for path, values in entering(model, torch.cat(batches()), ["0", "2", "5"]).items():
        assert_statistics_of(model.get_submodule(path), values, tolerance=1e-11)


def _layerwise_failing_rank(rank, world_size):
    model = deep_model()
    before = snapshot(model)
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(rank)
            if rank == 1 and len(passes) == 2:
                raise OSError("disk gone")
            return iter(batches())

    try:
        precise_bn(model, Loader(), layerwise=True)
    except Exception as error:
        assert_bit_identical(model, before)
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_layerwise_failure_on_one_rank_in_a_later_pass_is_raised_on_all():
    other, own = run_ranks(_layerwise_failing_rank, 2)
    assert own == "OSError: disk gone"
    assert other == "RuntimeError: precise_bn: rank 1 failed: OSError: disk gone"


# --- layers that keep more than running statistics


@pytest.mark.parametrize("name", ["MBN", "CBN", "BatchRenorm", "GhostBN", "ShuffleBN"])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.filterwarnings("ignore:ShuffleBN")
def test_memories_windows_and_draws_are_put_back(name, layerwise):
    options = {"CBN": {"burn_in": 0}, "GhostBN": {"group_size": 2}}.get(name, {})
    model = convert_norms(small_model(), name, **options).train()
    if name == "CBN":
        attach_convolutions(model)
    with torch.no_grad():
        for x in batches(seed=3):
            model(x)
    before, groups = snapshot(model), model[1].last_groups
    precise_bn(model, batches(), layerwise=layerwise)
    changed = {key for key, (_, value) in before[0].items() if not torch.equal(value, model.state_dict()[key])}
    assert changed == {f"{layer}.{kind}" for layer in (1, 5) for kind in ("running_mean", "running_var")}
    assert model[1].last_groups is groups
    assert_statistics_of(model[1], model[0](torch.cat(batches())).detach())


class Counting(nn.Module):
    """Keeps extra state that each forward changes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3).double()
        self.window = []

    def get_extra_state(self):
        return {"window": self.window}

    def set_extra_state(self, state):
        self.window = state["window"]

    def forward(self, x):
        self.window.append(len(x))
        return self.norm(x)


def test_extra_state_is_put_back():
    model = Counting()
    precise_bn(model, batches())
    assert model.window == []


class Grouped(nn.Module):
    """A norm that is no batch norm: pairs of channels share statistics, and it splits its input by itself."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("running_mean", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(2, dtype=torch.float64))

    def by_statistics(self, x):
        yield 0, x.view(len(x), 2, -1)

    def forward(self, x):
        return x


def test_norms_with_other_shapes_of_statistics_say_what_they_are_about():
    model = Grouped()
    data = [torch.randn(3, 4, 2, 2, dtype=torch.float64) + k for k in range(3)]
    assert list(precise_bn(model, data).layers) == ["Grouped"]
    assert_statistics_of(model, torch.cat(data).view(9, 2, -1))


# --- another domain


def test_adabn_is_the_pooled_estimate_of_the_target_data():
    one, other = small_model(), small_model()
    result = recompute_statistics(one, batches(seed=5))
    assert result == precise_bn(other, batches(seed=5))
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("norm", [None, "BN"])
def test_source_statistics_count_as_that_many_samples(norm, layerwise):
    model = small_model(norm)
    source = copy.deepcopy(model)
    recompute_statistics(model, batches(), source_samples=51, layerwise=layerwise)
    x = model[0](torch.cat(batches())).detach()
    flat = x.transpose(0, 1).flatten(1)
    share = 17 / (51 + 17)  # 17 samples of the target
    mean = (1 - share) * source[1].running_mean + share * flat.mean(1)
    var = (1 - share) * source[1].running_var + share * flat.var(1, correction=1)
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, var, rtol=1e-12, atol=1e-12)
    if layerwise:  # the second layer saw what the blended first one makes
        entered = entering(model, torch.cat(batches()), ["5"])["5"].transpose(0, 1).flatten(1)
        mean = (1 - share) * source[5].running_mean + share * entered.mean(1)
        torch.testing.assert_close(model[5].running_mean, mean, rtol=1e-12, atol=1e-12)


def test_the_source_counts_the_more_the_more_samples_it_is_worth():
    distances = []
    for worth in (0, 10, 1000, 1e9):
        model = small_model()
        recompute_statistics(model, batches(), source_samples=worth)
        distances.append((model[1].running_mean - small_model()[1].running_mean).norm().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6 < distances[0]


def domain_model():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        build_norm("DomainBN", 5, num_domains=3, domain_names=["photo", "art", "sketch"]),
        nn.Conv2d(5, 4, 2),
        nn.BatchNorm2d(4),
    ).double()
    with torch.no_grad():
        for index in range(2):
            with domain(index):
                model.train()(torch.randn(4, 3, 6, 6, dtype=torch.float64) + index)
    return model.eval()


def test_only_the_statistics_of_the_domain_are_filled():
    model = domain_model()
    before = snapshot(model)
    result = recompute_statistics(model, batches(), "sketch")
    assert list(result.layers) == ["1[sketch]"]
    assert_statistics_of(OneDomain(model[1], 2), model[0](torch.cat(batches())).detach())
    for row in range(2):
        assert torch.equal(model[1].running_mean[row], before[0]["1.running_mean"][1][row])
    assert torch.equal(model[3].running_mean, before[0]["3.running_mean"][1])
    with torch.no_grad():
        for name in ("running_mean", "running_var"):
            getattr(model[1], name).copy_(before[0][f"1.{name}"][1])
    assert_bit_identical(model, before)


def test_another_domain_can_be_the_source():
    model = domain_model()
    art = model[1].running_mean[1].clone(), model[1].running_var[1].clone()
    recompute_statistics(model, batches(), 2, source_samples=17, source_domain="art")
    flat = model[0](torch.cat(batches())).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean[2], (art[0] + flat.mean(1)) / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var[2], (art[1] + flat.var(1)) / 2, rtol=1e-12, atol=1e-12)
    assert torch.equal(model[1].running_mean[1], art[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_samples": -1}, "source_samples must be finite and at least 0, got -1"),
        ({"source_samples": float("inf")}, "source_samples must be finite"),
        ({"source_domain": "art"}, "source_domain needs a domain"),
        ({"domain": 7}, "domain 7 is out of range"),
        ({"domain": "arts"}, "no domain 'arts'; choose from art"),
    ],
)
def test_mistakes_about_the_target_are_told_and_change_nothing(options, message):
    model = domain_model()
    before = snapshot(model)
    with pytest.raises(LeakfreeError, match=message):
        recompute_statistics(model, batches(), **options)
    assert_bit_identical(model, before)


def test_a_domain_needs_layers_that_have_some():
    with pytest.raises(LeakfreeError, match="no DomainBN with statistics of each domain"):
        recompute_statistics(small_model(), batches(), 0)


@pytest.mark.parametrize("layerwise", [False, True])
def test_failed_adaptation_leaves_the_model_bit_identical(layerwise):
    model = domain_model()
    before = snapshot(model)
    data = batches()
    data[2][0, 0, 0, 0] = float("nan")
    with pytest.raises(LeakfreeError, match=r"recompute_statistics: the inputs of 1\[sketch\] are not finite"):
        recompute_statistics(model, data, 2, layerwise=layerwise)
    assert_bit_identical(model, before)


def _blend_rank(rank, world_size):
    every = iter(batches())
    mine = [[next(every) for _ in sizes] for sizes in SHARDS[world_size]][rank]
    model = small_model()
    if rank:
        model[1].running_mean.add_(1.0)  # local batch norm: ranks have moving averages of their own
    result = recompute_statistics(model, mine, source_samples=8)
    return result.num_samples, statistics_of(model)


def test_blended_statistics_are_bitwise_the_same_on_all_ranks():
    alone = small_model()
    recompute_statistics(alone, batches(), source_samples=8)
    for samples, state in run_ranks(_blend_rank, 3):
        assert samples == sum(SIZES)
        torch.testing.assert_close(state, statistics_of(alone), rtol=1e-12, atol=1e-12)
