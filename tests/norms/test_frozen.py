import copy

import torch
from torch import nn

from leakfree.norms import build_norm


def _norm(**options):
    norm = build_norm("FrozenBN", 3, **options).double()
    norm.load_state_dict(
        {
            "weight": torch.tensor([1.0, 2.0, -1.0]),
            "bias": torch.tensor([0.0, 1.0, 2.0]),
            "running_mean": torch.tensor([1.0, -1.0, 0.5]),
            "running_var": torch.tensor([1.0, 4.0, 0.25]),
            "num_batches_tracked": torch.tensor(7),
        }
    )
    return norm


def test_it_is_eval_mode_batch_norm_in_both_modes_and_never_changes():
    norm, twin = _norm(), nn.BatchNorm2d(3).double().eval()
    twin.load_state_dict(norm.state_dict())
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    for mode in (True, False):
        torch.testing.assert_close(norm.train(mode)(x), twin(x))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_a_fresh_layer_is_the_identity():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(build_norm("FrozenBN", 3)(x), x, rtol=1e-6, atol=1e-6)


def test_samples_do_not_see_each_other():
    norm, x = _norm(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(norm(x)[:1], norm(x[:1]))


def test_gradients_and_the_trainable_affine():
    norm = _norm(affine_trainable=True)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, w, b: torch.func.functional_call(norm, {"weight": w, "bias": b}, (a,)), (x, norm.weight, norm.bias)
    )
    assert not any(p.requires_grad for p in _norm().parameters())


def test_half_precision_and_channels_last():
    x = torch.randn(2, 3, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    y = _norm().float()(x)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
