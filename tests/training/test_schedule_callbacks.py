"""The schedules and Double-Forward as callbacks of a real Lightning trainer: in a run, across a resume, refused."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from leakfree.errors import ConfigError, LeakfreeError
from leakfree.norms import build_norm, double_forward
from leakfree.population import precise_bn
from leakfree.schedules import BurnInSchedule, Epochs, FreezeBN, RenormSchedule
from leakfree.training.callbacks import DoubleForwardCallback, FreezeBNCallback, ScheduleCallback

STEPS, PER_EPOCH = 12, 4


class Net(L.LightningModule):
    def __init__(self, norm="BN", **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 2), build_norm(norm, 3, **options), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
        )
        self.seen = []  # what test cases note of each step

    def forward(self, x):
        return self.layers(x)

    @property
    def norm(self):
        return self.layers[1]

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append((self.norm.training, getattr(self.norm, "frozen", None), getattr(self.norm, "ramp", None)))
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data():
    """An epoch of equal batches: where in an epoch a resume starts, which is Lightning's choice, does not matter."""
    x = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(1)).repeat(PER_EPOCH, 1, 1, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch_size=4)


def trainer(*callbacks, **options):
    settings = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return L.Trainer(callbacks=list(callbacks), **settings)


def fit(model, *callbacks, **options):
    trainer(*callbacks, **options).fit(model, data())
    return model


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("warnings.showwarning", lambda *args, **kwargs: None)  # Lightning: few workers, short epochs


# --- freezing


@pytest.mark.parametrize("at", [0.5, 6, Epochs(1.5)])
def test_batch_norms_freeze_at_a_share_a_step_or_an_epoch(at):
    model = fit(Net(), FreezeBNCallback(FreezeBN(at=at)))
    assert [frozen for _, frozen, _ in model.seen] == [False] * 6 + [True] * 6
    assert int(model.norm.num_batches_tracked) == 6


def test_the_length_of_the_run_is_the_trainers():
    model = fit(Net(), FreezeBNCallback(FreezeBN(at=0.75)), max_steps=-1, max_epochs=2)
    assert [frozen for _, frozen, _ in model.seen] == [False] * 6 + [True] * 2


def test_steps_are_updates_where_gradients_are_accumulated():
    callback = FreezeBNCallback(FreezeBN(at=Epochs(1)))
    model = fit(Net(), callback, max_steps=4, accumulate_grad_batches=2)
    assert [frozen for _, frozen, _ in model.seen] == [False] * 4 + [True] * 4
    assert callback.freeze.frozen_at == 2


def test_precise_statistics_are_what_is_frozen():
    loader = list(data())
    callback = FreezeBNCallback(FreezeBN(at=0.5), before=lambda module: precise_bn(module, loader, progress=False))
    model = fit(Net(), callback)
    expected = fit(Net(), max_steps=6)
    precise_bn(expected, loader, progress=False)
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)
    assert torch.equal(model.norm.running_var, expected.norm.running_var)


class StopAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def run_in_two(make_model, make_callbacks, tmp_path, stop_at):
    """The model and callbacks of a run that is thrown away at ``stop_at`` steps, but for its checkpoint."""
    path = tmp_path / "stopped.ckpt"
    trainer(*make_callbacks(), StopAt(stop_at, path)).fit(make_model(), data())
    model, callbacks = make_model(), make_callbacks()
    trainer(*callbacks).fit(model, data(), ckpt_path=str(path), weights_only=True)
    assert len(model.seen) == STEPS - stop_at
    return model, callbacks


def same_state(left, right):
    states = left.state_dict(), right.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("stop_at", [3, 6, 9])
def test_a_run_resumed_before_at_or_after_the_freeze_is_the_uninterrupted_one(stop_at, tmp_path):
    def callbacks():
        return [FreezeBNCallback(FreezeBN(at=0.5))]

    model, (callback,) = run_in_two(Net, callbacks, tmp_path, stop_at)
    assert same_state(model, fit(Net(), *callbacks()))
    assert callback.freeze.frozen_at == 6
    assert int(model.norm.num_batches_tracked) == 6
    assert model.norm.frozen


# --- ramps


def test_ramps_are_scaled_to_the_run_and_survive_a_resume(tmp_path):
    def model():
        net = Net("BatchRenorm")
        net.norm.num_batches_tracked.fill_(500)  # a trained model
        return net

    def callbacks():
        return [ScheduleCallback(RenormSchedule(original_steps=60_000))]  # 12 steps: ramp 1, 5, 8

    whole = fit(model(), *callbacks())
    assert {ramp for *_, ramp in whole.seen} == {(501, 505, 508)}
    net, (callback,) = run_in_two(model, callbacks, tmp_path, 5)
    assert {ramp for *_, ramp in net.seen} == {(501, 505, 508)}
    assert callback.schedule.state_dict() == {"starts": {"layers.1": 500}}
    assert same_state(net, whole)


def test_the_burn_in_is_scaled_to_the_run():
    model = fit(Net("CBN", rho=0.0), ScheduleCallback(BurnInSchedule(at=Epochs(2))))
    assert model.norm.burn_in == 8


def test_several_schedules_keep_states_of_their_own(tmp_path):
    callbacks = [
        FreezeBNCallback(FreezeBN(at=0.9, where="layers")),
        FreezeBNCallback(FreezeBN(at=0.9, where="1")),
        ScheduleCallback(RenormSchedule()),
    ]
    first = trainer(*callbacks)
    first.fit(Net("BatchRenorm"), data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert len({callback.state_key for callback in callbacks} & states.keys()) == 3


def test_a_run_without_end_is_refused():
    with pytest.raises(ConfigError, match="FreezeBNCallback: the trainer needs max_steps or max_epochs"):
        fit(Net(), FreezeBNCallback(FreezeBN(at=0.5)), max_steps=-1, max_epochs=-1)


def test_a_model_without_the_layer_is_refused():
    with pytest.raises(LeakfreeError, match="no BatchRenorm"):
        fit(Net(), ScheduleCallback(RenormSchedule()))


# --- Double-Forward


def by_hand(model, steps):
    optimizer = model.configure_optimizers()
    model.train()
    x, y = next(iter(data()))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with double_forward(model):
            model(x)
    return model


def test_double_forward_refreshes_each_memory_as_the_plain_loop_does(tmp_path):
    def model():
        return Net("MBN", memory=3)

    expected = by_hand(model(), STEPS)
    found = fit(model(), DoubleForwardCallback())
    assert same_state(found, expected)
    assert not same_state(fit(model()), expected)
    again, _ = run_in_two(model, lambda: [DoubleForwardCallback()], tmp_path, 5)
    assert same_state(again, expected)


def test_double_forward_takes_a_forward_of_yours_and_ends_with_the_freeze():
    calls = []

    def forward(module, batch):
        calls.append(len(batch[0]))
        module(batch[0])

    model = fit(Net("MBN"), FreezeBNCallback(FreezeBN(at=0.5)), DoubleForwardCallback(forward))
    assert calls == [4] * 6
    assert model.norm.frozen


def test_double_forward_runs_in_the_trainers_precision():
    kinds = []

    class Watching(Net):
        def forward(self, x):
            y = super().forward(x)
            kinds.append(y.dtype)
            return y

    fit(Watching("MBN"), DoubleForwardCallback(), precision="bf16-mixed", max_steps=2)
    assert kinds == [torch.bfloat16] * 4


def test_double_forward_refuses_accumulated_gradients_and_models_without_memory():
    with pytest.raises(ConfigError, match="accumulate_grad_batches is 2"):
        fit(Net("MBN"), DoubleForwardCallback(), accumulate_grad_batches=2)
    with pytest.raises(LeakfreeError, match="no MBN layer"):
        fit(Net(), DoubleForwardCallback())
