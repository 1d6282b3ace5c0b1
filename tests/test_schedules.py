"""The schedules: learning-rate factors by hand, and batch norms that freeze and stay frozen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from leakfree.errors import CheckpointError, ConfigError, LeakfreeError
from leakfree.norms import BatchRenorm, CrossIterationBatchNorm, build_norm, convert_norms, domain
from leakfree.population import precise_bn
from leakfree.schedules import (
    BurnInSchedule,
    Epochs,
    FreezeBN,
    RenormSchedule,
    burn_in_steps,
    freeze_step,
    lr_factor,
    renorm_ramp,
)

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def small_model(norm: str = "torch") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4), nn.BatchNorm1d(4),
    )  # fmt: skip
    if norm != "torch":
        convert_norms(model, norm, **({"group_size": 4} if norm == "GhostBN" else {}))
    return model.double()


def batch(step: int, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 2 + 1


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model.train()
    optimizer.zero_grad(set_to_none=False)  # a gradient left at zero would still be decayed
    model(batch(step)).square().mul(torch.arange(1.0, 5.0)).mean().backward()
    optimizer.step()


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if key.rsplit(".")[-1] in BUFFERS}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# --- learning rate


def test_warm_up_is_a_line_from_the_factor_to_one():
    factors = [lr_factor(s, max_steps=100, warmup_steps=4, warmup_factor=0.2, decay="constant") for s in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], abs=1e-15)
    assert lr_factor(0, max_steps=10, warmup_steps=0, warmup_factor=0.001, decay="constant") == 1.0


def test_step_decay_multiplies_gamma_at_each_milestone():
    def at(step):
        return lr_factor(step, max_steps=90000, warmup_steps=1000, decay="step", milestones=[2 / 3, 8 / 9], gamma=0.1)

    assert at(59999) == 1.0
    assert at(60000) == pytest.approx(0.1, rel=1e-15)
    assert at(79999) == pytest.approx(0.1, rel=1e-15)
    assert at(80000) == pytest.approx(0.01, rel=1e-14)


def test_cosine_decay_is_half_at_half_time_and_multiplies_the_warm_up():
    def cosine(step, **options):
        return lr_factor(step, max_steps=200, decay="cosine", **options)

    assert cosine(100) == pytest.approx(0.5)
    assert cosine(200) == pytest.approx(0.0, abs=1e-15)
    assert cosine(250) == pytest.approx(0.0, abs=1e-15)  # steps past the end do not come up again
    assert cosine(10, warmup_steps=20, warmup_factor=0.0) == pytest.approx(0.25 * (1 + math.cos(math.pi / 20)))


def test_unknown_decay_names_the_choices():
    with pytest.raises(ConfigError, match="'cosin'; choose from cosine, constant, step"):
        lr_factor(0, max_steps=10, decay="cosin")


# --- when to freeze


@pytest.mark.parametrize(
    ("at", "max_steps", "step"),
    [
        *[(0.75, 400, 300), (0.75, 10, 8), (0.1, 30, 3), (0.0, 10, 0), (1.0, 10, None)],
        *[(7, 10, 7), (1, 10, 1), (0, 10, 0), (10, 10, None)],
    ],
)
def test_freeze_step_takes_shares_and_steps(at, max_steps, step):
    assert freeze_step(at, max_steps) == step


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "max_steps", "step"),
    [(80, 5, 500, 400), (1.5, 3, 9, 4), (0, 7, 9, 0), (3, 3, 9, None), (90, 10, 500, None)],
)
def test_freeze_step_takes_epochs(epochs, steps_per_epoch, max_steps, step):
    assert freeze_step(Epochs(epochs), max_steps, steps_per_epoch) == step


def test_epochs_of_unknown_length_are_refused():
    with pytest.raises(ConfigError, match=r"freeze at: 2 epochs are how many steps\? Give steps_per_epoch"):
        freeze_step(Epochs(2), 10)


@pytest.mark.parametrize("at", [1.5, -0.1, -3, True, "0.5", None, Epochs(-1), float("nan"), Epochs(float("inf"))])
def test_impossible_freeze_points_are_refused_at_construction(at):
    with pytest.raises(ConfigError, match="freeze at"):
        FreezeBN(at=at)


# --- freezing


@pytest.mark.parametrize("norm", ["torch", "BN", "GhostBN", "SyncBN", "ShuffleBN"])
@pytest.mark.filterwarnings("ignore:ShuffleBN")
def test_frozen_statistics_survive_100_train_calls_and_forwards(norm):
    model = small_model(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        train_step(model, optimizer, step)
    assert FreezeBN(at=3).step(model, 3, 10)
    before = statistics(model)
    for step in range(100):
        train_step(model, optimizer, step)
    assert same(statistics(model), before)
    x = batch(500)
    model.train()
    trained = model(x)
    torch.testing.assert_close(trained, model.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(trained[:1], model.train()(x[:1]), rtol=1e-12, atol=1e-12)  # no sample sees another


def test_a_compiled_model_freezes_too():
    for norm in ("torch", "BN"):
        model = small_model(norm)
        compiled = torch.compile(model, backend="eager")
        compiled(batch(0))
        FreezeBN(at=1).step(model, 1, 10)
        before = statistics(model)
        for step in range(3):
            compiled.train()
            compiled(batch(step))
        assert same(statistics(model), before)


def test_before_the_freeze_point_nothing_changes_and_after_it_nothing_happens_twice():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    freeze, calls = FreezeBN(at=0.5), []
    froze = []
    for step in range(6):
        froze.append(freeze.step(model, step, 6, before=calls.append))
        train_step(model, optimizer, step)
    assert froze == [False, False, False, True, False, False]
    assert calls == [model]
    assert freeze.frozen_at == 3
    assert [len(model[position]._forward_pre_hooks) for position in (1, 6)] == [1, 1]
    assert int(model[1].num_batches_tracked) == 3


def test_a_share_of_one_never_freezes():
    model, freeze = small_model(), FreezeBN(at=1.0)
    assert not any(freeze.step(model, step, 5) for step in range(6))


@pytest.mark.parametrize("norm", ["torch", "BN"])
def test_statistics_still_at_their_initial_values_are_refused(norm):
    model, freeze = small_model(norm), FreezeBN(at=0)
    with pytest.raises(LeakfreeError, match=r"statistics of 1 \(and 1 more\) are still at their initial"):
        freeze.step(model, 0, 10)
    assert not freeze.frozen
    model.train()(batch(0))  # nothing was frozen: the statistics move
    assert int(model[1].num_batches_tracked) == 1


def test_precise_statistics_just_before_the_freeze_are_what_is_frozen():
    model = small_model("BN")
    data = [batch(s) for s in range(4)]
    reference = copy.deepcopy(model)
    precise_bn(reference, data)
    FreezeBN(at=0).step(model, 0, 10, before=lambda m: precise_bn(m, data))
    assert same(statistics(model), statistics(reference))


def test_where_chooses_layers_and_must_match():
    model = small_model()
    model.train()(batch(0))
    FreezeBN(at=0, where="^1$").step(model, 1, 10)
    before = statistics(model)
    model.train()(batch(1))
    after = statistics(model)
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert not torch.equal(before["6.running_mean"], after["6.running_mean"])
    with pytest.raises(LeakfreeError, match="no batch norm whose path matches 'head'"):
        FreezeBN(at=0, where="head").step(model, 1, 10)


def test_layers_without_running_statistics_are_named():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(LeakfreeError, match="0 keeps no running statistics"):
        FreezeBN(at=0).step(model, 1, 10)


def test_affine_is_trained_unless_asked_otherwise():
    for trainable in (True, False):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        train_step(model, optimizer, 0)
        FreezeBN(at=1, affine_trainable=trainable).step(model, 1, 10)
        weight = model[1].weight.detach().clone()
        train_step(model, optimizer, 1)
        assert torch.equal(weight, model[1].weight) is not trainable


# --- resuming


def run(steps, resume_at=None, norm="torch", at=0.5):
    """Train ``steps`` steps; with ``resume_at``, throw everything away there but a checkpoint."""
    data = [batch(s) for s in range(90, 93)]

    def fresh():
        model = small_model(norm)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), FreezeBN(at=at)

    model, optimizer, freeze = fresh()
    for step in range(steps):
        if step == resume_at:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), freeze.state_dict()))
            model, optimizer, freeze = fresh()
            for item, state in zip((model, optimizer, freeze), saved, strict=True):
                item.load_state_dict(state)
        freeze.step(model, step, steps, before=lambda m: precise_bn(m, data))
        train_step(model, optimizer, step)
    return model.state_dict()


@pytest.mark.parametrize("norm", ["torch", "BN"])
@pytest.mark.parametrize("resume_at", [2, 4, 5, 7])
def test_resuming_across_the_switch_equals_the_uninterrupted_run(norm, resume_at):
    assert same_state(run(8, norm=norm), run(8, resume_at, norm))


def same_state(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_frozen_state_is_plain_and_survives_safe_loading(tmp_path):
    model, freeze = small_model(), FreezeBN(at=1)
    model.train()(batch(0))
    freeze.step(model, 1, 4)
    torch.save(freeze.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state == {"frozen_at": 1, "layers": ["1", "6"]}


def test_a_checkpoint_of_another_model_is_refused():
    freeze = FreezeBN(at=1)
    freeze.load_state_dict({"frozen_at": 1, "layers": ["head.norm"]})
    with pytest.raises(CheckpointError, match=r"head\.norm"):
        freeze.step(small_model(), 2, 4)


def test_a_layer_with_a_domain_that_was_never_seen_is_not_frozen():
    model, freeze = nn.Sequential(build_norm("DomainBN", 3, num_domains=2)), FreezeBN(at=0)
    for key in (0, 1):
        with pytest.raises(LeakfreeError):
            freeze.step(model, 0, 10)
        with domain(key):
            model(torch.randn(4, 3, 2, 2))
    assert freeze.step(model, 0, 10)
    assert model[0].frozen


def test_freezing_after_epochs_happens_at_their_end():
    model, freeze = small_model(), FreezeBN(at=Epochs(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    froze = []
    for step in range(9):
        froze.append(freeze.step(model, step, 9, steps_per_epoch=3))
        train_step(model, optimizer, step)
    assert froze.index(True) == 6
    assert froze.count(True) == 1


# --- ramps


def test_the_papers_ramp_is_scaled_to_the_run():
    assert renorm_ramp(160_000) == (5_000, 25_000, 40_000)
    assert renorm_ramp(1_600) == (50, 250, 400)
    assert renorm_ramp(320_000) == (10_000, 50_000, 80_000)
    assert renorm_ramp(1_000, original_steps=40_000) == (125, 625, 1_000)
    assert renorm_ramp(1) == (0, 1, 1)  # ends after their start, however short the run


@pytest.mark.parametrize("steps", range(1, 400, 7))
def test_every_ramp_is_one_that_the_layer_takes(steps):
    assert build_norm("BatchRenorm", 2, ramp=renorm_ramp(steps)).ramp == renorm_ramp(steps)


def test_the_burn_in_is_a_share_of_the_run():
    assert burn_in_steps(87_960) == 58_640  # 8 of 12 epochs
    assert burn_in_steps(300, 0.5) == 150
    assert burn_in_steps(300, 20) == 20
    assert burn_in_steps(300, Epochs(2), 40) == 80
    assert burn_in_steps(300, 1.0) == 300


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: renorm_ramp(0), "at least 1, got 0"),
        (lambda: renorm_ramp(10, original_steps=0), "at least 1"),
        (lambda: burn_in_steps(10, 1.5), r"burn-in: a share of the run must be in \[0, 1\], got 1.5"),
        (lambda: burn_in_steps(10, Epochs(1)), "burn-in: 1 epochs are how many steps"),
        (lambda: RenormSchedule(original_steps=0), "at least 1"),
        (lambda: RenormSchedule(forwards_per_step=0), "forwards_per_step must be at least 1, got 0"),
        (lambda: BurnInSchedule(at=-1), "burn-in"),
        (lambda: RenormSchedule().step(small_model(), 0, 10), "no BatchRenorm, so there is nothing to set"),
        (lambda: BurnInSchedule(where="7").step(ramps(), 0, 10), "no CBN whose path matches '7'"),
    ],
)
def test_impossible_ramps_are_refused(call, message):
    with pytest.raises(LeakfreeError, match=message):
        call()


def ramps() -> nn.Sequential:
    return nn.Sequential(
        build_norm("BatchRenorm", 3), build_norm("CBN", 3, rho=0.0, ramp="linear"), build_norm("BatchRenorm", 3)
    )


def test_each_schedule_sets_its_own_layers():
    model = ramps()
    RenormSchedule().step(model, 0, 1600)
    BurnInSchedule(at=0.5).step(model, 0, 1600)
    assert isinstance(model[0], BatchRenorm)
    assert isinstance(model[1], CrossIterationBatchNorm)
    assert model[0].ramp == model[2].ramp == (50, 250, 400)
    assert (model[1].burn_in, model[1].ramp) == (800, "linear")
    RenormSchedule(where="^2$", original_steps=80_000).step(model, 0, 1600)
    assert (model[0].ramp, model[2].ramp) == ((50, 250, 400), (100, 500, 800))


def renorm_limits(run_steps, resume_at=None, pretrained=0, forwards=1):
    """(r_max, d_max) before each step of a run of 64,000 / 1,000 steps, in which the ramp is (2, 10, 16)."""
    model, schedule = nn.Sequential(build_norm("BatchRenorm", 3)), RenormSchedule(forwards_per_step=forwards)
    model[0].num_batches_tracked.fill_(pretrained)
    limits = []
    for step in range(run_steps):
        if step == resume_at:
            saved = copy.deepcopy((model.state_dict(), schedule.state_dict()))
            model, schedule = nn.Sequential(build_norm("BatchRenorm", 3)), RenormSchedule(forwards_per_step=forwards)
            model.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        schedule.step(model, step, 64)
        limits.append(tuple(float(limit) for limit in model[0].limits()))
        for _ in range(forwards):
            model.train()(torch.randn(4, 3, 2, 2))
    return limits


def test_limits_follow_the_ramp_of_the_run():
    limits = renorm_limits(20)
    assert limits[:3] == [(1.0, 0.0)] * 3
    assert limits[10] == (pytest.approx(1 + 2 * 8 / 14), 5.0)
    assert limits[16:] == [(3.0, 5.0)] * 4


@pytest.mark.parametrize(("pretrained", "forwards"), [(1000, 1), (0, 2), (1000, 3)])
def test_the_ramp_counts_the_steps_of_this_run(pretrained, forwards):
    limits = renorm_limits(20, pretrained=pretrained, forwards=forwards)
    torch.testing.assert_close(torch.tensor(limits), torch.tensor(renorm_limits(20)))


@pytest.mark.parametrize("resume_at", [1, 5, 18])
@pytest.mark.parametrize(("pretrained", "forwards"), [(0, 1), (1000, 2)])
def test_a_resumed_ramp_goes_on(resume_at, pretrained, forwards):
    assert renorm_limits(20, resume_at, pretrained, forwards) == renorm_limits(20, None, pretrained, forwards)


def test_a_ramp_without_its_state_finds_its_start_by_the_count():
    model = nn.Sequential(build_norm("BatchRenorm", 3))
    model[0].num_batches_tracked.fill_(1000 + 30)
    RenormSchedule().step(model, 30, 1600)
    assert model[0].ramp == (1050, 1250, 1400)


def test_the_state_of_a_ramp_is_plain(tmp_path):
    schedule = BurnInSchedule()
    schedule.step(ramps(), 0, 10)
    torch.save(schedule.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"starts": {"1": 0}}


def test_the_burn_in_ends_when_the_schedule_says():
    torch.manual_seed(0)
    model, plain = nn.Sequential(build_norm("CBN", 3, rho=0.0)), nn.Sequential(build_norm("BN", 3))
    schedule, same_as_plain = BurnInSchedule(at=0.5), []
    for step in range(8):
        x = torch.randn(4, 3, 2, 2) + step
        schedule.step(model, step, 8)
        same_as_plain.append(torch.allclose(model.train()(x), plain.train()(x), atol=1e-5))
    assert all(same_as_plain[:4])
    assert not any(same_as_plain[5:])  # in the first forward after it, the window may still be empty
