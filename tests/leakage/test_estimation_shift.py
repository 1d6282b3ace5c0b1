"""The estimation shift against norms written out by hand, what it counts, and that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from leakfree.errors import LeakfreeError
from leakfree.leakage import estimation_shift
from leakfree.norms import build_norm, convert_norms, domain
from leakfree.population import precise_bn
from leakfree.schedules import FreezeBN
from tests.ranks import run_ranks

SIZES = (5, 1, 8)


def batches(shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) + n + shift for n in SIZES]


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(5, 4, 2), nn.BatchNorm2d(4)
    ).double()
    with torch.no_grad():
        for x in batches():
            model.train()(x)
    return model


def moments(values):
    flat = values.detach().transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=1).sqrt()


def expected(layer, values):
    mean, std = moments(values)
    of_mean = (layer.running_mean - mean).square().sum().sqrt()
    of_std = (layer.running_var.sqrt() - std).square().sum().sqrt()
    scale = std.square().sum().sqrt() + layer.eps
    return [of_mean.item(), of_std.item(), (of_mean / scale).item(), (of_std / scale).item()]


def numbers(shift):
    return [shift.mean, shift.std, shift.relative_mean, shift.relative_std]


def test_distances_are_those_to_the_moments_of_an_eval_forward_of_all_the_data():
    model = small_model()
    result = estimation_shift(model, batches(shift=2.0))
    assert result.num_samples == sum(SIZES)
    assert (list(result.layers), result.unknown) == (["1", "5"], ())
    model.eval()
    hidden = model[0](torch.cat(batches(shift=2.0)))
    assert numbers(result.layers["1"]) == pytest.approx(expected(model[1], hidden), rel=1e-10)
    entering = model[4](model[1](hidden).relu())  # the first layer uses what it has stored
    assert numbers(result.layers["5"]) == pytest.approx(expected(model[5], entering), rel=1e-10)


def test_exact_population_statistics_have_no_shift_and_those_of_other_data_have_one():
    model = small_model()
    precise_bn(model.eval(), batches(), layerwise=True)
    for shift in estimation_shift(model, batches()).layers.values():
        assert numbers(shift) == pytest.approx([0] * 4, abs=1e-10)
    for shift in estimation_shift(model, batches(seed=3, shift=1.0)).layers.values():
        assert shift.mean > 0.01


def test_the_shift_does_not_depend_on_the_batches():
    model = small_model()
    whole = estimation_shift(model, [torch.cat(batches())])
    single = estimation_shift(model, [row[None] for row in torch.cat(batches())])
    for path, shift in whole.layers.items():
        assert numbers(single.layers[path]) == pytest.approx(numbers(shift), rel=1e-9)


def test_the_model_is_left_as_it_was():
    model = small_model()
    model[4].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"):
        estimation_shift(model, batches(), forward=_boom)
    estimation_shift(model, batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def _boom(model, batch):
    model(batch)
    raise RuntimeError("boom")


def test_frozen_layers_of_any_kind_are_measured():
    model = small_model()
    plain = estimation_shift(model, batches(shift=1.0))
    FreezeBN(at=0).step(model, 1, 2)
    assert estimation_shift(model, batches(shift=1.0)) == plain
    frozen = FrozenBatchNorm2d(3).double()
    shift = estimation_shift(frozen, batches()).layers["FrozenBatchNorm2d"]
    assert numbers(shift) == pytest.approx(expected(frozen, torch.cat(batches())))
    converted = convert_norms(small_model(), "FrozenBN")
    assert estimation_shift(converted, batches(shift=1.0)).layers.keys() == plain.layers.keys()


def test_layers_come_in_the_order_of_execution_and_those_that_never_run_are_named():
    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[2](x))

    model = Backwards(*(nn.BatchNorm2d(3).double() for _ in range(3)))
    result = estimation_shift(model, batches())
    assert list(result.layers) == ["2", "0"]
    assert result.unknown == ("1",)


def test_each_domain_has_a_shift_of_its_own():
    model = nn.Sequential(build_norm("DomainBN", 3, num_domains=2, domain_names=["day", "night"])).double()

    def in_domain(model, batch):
        with domain(batch[1]):
            model(batch[0])

    data = [(x, k % 2) for k, x in enumerate(batches())]
    precise_bn(model, data, forward=in_domain)
    model[0].running_mean[1] += torch.tensor([3.0, 0.0, 4.0])
    result = estimation_shift(model, data, forward=in_domain)
    assert result.layers["0[day]"].mean == pytest.approx(0, abs=1e-10)
    assert result.layers["0[night]"].mean == pytest.approx(5)


def test_groups_of_channels_are_compared_as_groups():
    torch.manual_seed(0)
    model = nn.Sequential(build_norm("BGN", 4, num_groups=2, momentum=1.0)).double()
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64) + torch.arange(4.0).view(1, 4, 1, 1)
    model.train()(x)  # now it has stored the statistics of this batch
    shift = estimation_shift(model, [x]).layers["0"]
    assert numbers(shift) == pytest.approx([0] * 4, abs=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimation_shift(nn.Linear(3, 3), batches()), "no layer with running statistics"),
        (lambda: estimation_shift(nn.InstanceNorm2d(3, track_running_stats=True), batches()), "no layer with running"),
        (lambda: estimation_shift(small_model(), []), "estimation_shift: the loader gave no samples"),
        (lambda: estimation_shift(small_model(), [batches()[0] / 0]), "the inputs of 1 are not finite"),
        (lambda: estimation_shift(small_model(), batches(), 0), "num_samples must be at least 1"),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(LeakfreeError, match=message):
        call()


def _on_rank(rank, world_size):
    mine = [batches(shift=2.0)[:2], [], batches(shift=2.0)[2:]][rank]
    model = small_model()
    return estimation_shift(convert_norms(model, "SyncBN"), mine)


def test_uneven_and_empty_ranks_find_what_one_process_finds():
    alone = estimation_shift(small_model(), batches(shift=2.0))
    answers = run_ranks(_on_rank, 3)
    for answer in answers:
        assert answer == answers[0]
        assert answer.num_samples == alone.num_samples
        for path, shift in alone.layers.items():
            assert numbers(answer.layers[path]) == pytest.approx(numbers(shift), rel=1e-9)
