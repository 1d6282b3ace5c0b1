"""The composition gap against error rates computed by hand, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from leakfree.errors import LeakfreeError
from leakfree.leakage import CompositionGap, composition_gap, error_rates
from leakfree.norms import build_norm
from tests.ranks import run_ranks


class Classifier(nn.Module):
    """A norm whose outputs are the answer; dropout tells whether the model is in training mode."""

    def __init__(self, norm="BN", **options):
        super().__init__()
        self.norm = build_norm(norm, 3, dim=1, **options).double()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(x))


def data(count, seed=0):
    """Labels of 3 classes, and features that name them up to noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = nn.functional.one_hot(y, 3) + torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, y


def batches(x, y, size, same_class=False):
    order = torch.argsort(y, stable=True) if same_class else torch.arange(len(y))
    return [(x[rows], y[rows]) for rows in order.split(size)]


def reference(parts, mean=None, var=None):
    wrong = seen = 0
    for x, y in parts:
        m = x.mean(0) if mean is None else mean
        v = ((x - m) ** 2).mean(0) if var is None else var
        wrong += int((((x - m) / torch.sqrt(v + 1e-5)).argmax(1) != y).sum())
        seen += len(y)
    return wrong / seen


def stored_model():
    model = Classifier().eval()
    with torch.no_grad():
        model.norm.running_mean.copy_(torch.tensor([0.2, 0.5, 0.3]))
        model.norm.running_var.copy_(torch.tensor([1.5, 0.7, 1.0]))
    return model


def test_each_curve_is_the_error_under_its_own_statistics():
    model, (x, y) = stored_model(), data(90)
    random, structured = batches(x, y, 15), batches(x, y, 15, same_class=True)
    gap = composition_gap(model, random=random, same_class=structured)
    assert gap.random == pytest.approx(reference(random))
    assert gap.same_class == pytest.approx(reference(structured))
    assert gap.population == pytest.approx(reference(random, model.norm.running_mean, model.norm.running_var))
    assert gap.train is None
    assert gap.generalization is None
    assert len({gap.random, gap.same_class, gap.population}) == 3
    assert gap.leak == pytest.approx(gap.population - gap.same_class)
    assert gap.inconsistency == pytest.approx(gap.population - gap.random)
    assert gap.leak < -0.2  # batches of one class take the class away


def test_training_batches_run_in_training_mode_by_the_norm_s_own_rule():
    x, y = data(60)
    model = Classifier("GhostBN", group_size=20)
    model.drop.p = 0.0
    gap = composition_gap(model, random=batches(x, y, 20), train=batches(x, y, 60))
    assert gap.train == pytest.approx(reference(batches(x, y, 20)))  # chunks of 20 rows
    assert gap.generalization == gap.random - gap.train
    model.drop.p = 1.0  # in training mode alone: every output is 0, and the answer class 0
    assert composition_gap(model, random=batches(x, y, 20), train=batches(x, y, 60)).train == pytest.approx(2 / 3)
    assert error_rates(model, batches(x, y, 20), ("batch",))["batch"] == gap.random


def test_nothing_of_the_model_changes():
    x, y = data(60)
    model = Classifier("ShuffleBN", num_groups=2)
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    composition_gap(model, random=batches(x, y, 20), same_class=batches(x, y, 20, True), train=batches(x, y, 20))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model.training, model.norm.training, model.drop.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_independent_model_has_no_gap_whatever_the_composition():
    x, y = data(60)
    model = Classifier("FrozenBN")
    gap = composition_gap(model, random=batches(x, y, 7), same_class=batches(x, y, 20, same_class=True))
    assert gap.leak == gap.inconsistency == 0.0


def test_a_forward_of_ones_own_gets_the_whole_batch():
    model, (x, y) = stored_model(), data(30)
    items = [(x.float(), y, "shift")]

    def forward(model, batch):
        assert batch[2] == "shift"
        return model(batch[0].double())

    plain = error_rates(model, [(x.float().double(), y)])
    assert error_rates(model, items, forward=forward) == plain


def test_no_samples_are_no_number():
    assert composition_gap(stored_model(), random=[]) == CompositionGap(None, None, None, None)


def test_torch_s_own_batch_norm_is_refused_by_its_path():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(LeakfreeError, match=r'1: a torch BatchNorm1d .*convert_norms\(model, "BN"\)'):
        composition_gap(model, random=[data(6)])
    assert error_rates(model.double(), [data(6)])["stored"] is not None


def _on_rank(rank, world_size):
    x, y = data(90)
    mine = batches(x, y, 15)[rank::world_size][: 1 if rank else None]  # uneven
    structured = batches(x, y, 15, same_class=True) if rank == 0 else []
    return composition_gap(stored_model(), random=mine, same_class=structured)


def test_ranks_with_uneven_and_no_batches_agree_on_the_sum():
    x, y = data(90)
    used = [*batches(x, y, 15)[0::2], batches(x, y, 15)[1]]
    alone = composition_gap(stored_model(), random=used, same_class=batches(x, y, 15, same_class=True))
    assert run_ranks(_on_rank, 2) == [alone, alone]


def test_labels_that_are_not_one_for_each_output_are_told():
    x, _ = data(6)
    with pytest.raises(LeakfreeError, match=r"labels \(N,\), got \(6, 3\) and \(1,\)"):
        error_rates(Classifier(), [(x, torch.zeros(1, dtype=torch.int64))], ["stored"])
