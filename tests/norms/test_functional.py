"""Every norm of the registry inside of torch.func: as outside, or one error that names the norm."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from leakfree.errors import LeakfreeError
from leakfree.norms import NORMS, build_norm, domain, fused

OPTIONS = {
    "GhostBN": {"group_size": 2},
    "GN": {"num_groups": 3},
    "CBN": {"rho": 0.0, "burn_in": 0},
    "DomainBN": {"num_domains": 2},
}
NAMES = sorted(name for name, _ in NORMS)
ALONE = {"FrozenBN", "GN", "LN", "IN", "PN", "ProxyNorm"}
X = torch.randn(4, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(name, training):
    torch.manual_seed(0)
    norm = build_norm(name, 6, **OPTIONS.get(name, {})).double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return norm.train(training)


def loss(norm, parameters, x):
    return (functional_call(norm, parameters, (x,)) * V[: len(x)]).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_transforms_give_what_autograd_gives_or_say_why_not(name, training):
    norm = made(name, training)
    parameters = dict(norm.named_parameters())
    detached = {key: value.detach() for key, value in parameters.items()}

    def per_sample(x):
        return vmap(grad(lambda p, one: loss(norm, p, one[None])), in_dims=(None, 0))(detached, x)

    with domain(0):
        if training and name not in ALONE:
            for run in (
                lambda: grad(lambda x: loss(norm, detached, x))(X),
                lambda: per_sample(X),
                lambda: vmap(norm)(torch.stack([X, V])),
            ):
                with pytest.raises(LeakfreeError, match=rf"^{type(norm).__name__}: torch\.func .* call eval\(\)"):
                    run()
            return
        x = X.clone().requires_grad_()
        expected = torch.autograd.grad(loss(norm, parameters, x), x)[0]
        torch.testing.assert_close(grad(lambda x: loss(norm, detached, x))(X), expected)
        torch.testing.assert_close(vmap(norm)(torch.stack([X, V])), torch.stack([norm(X), norm(V)]))
        value, slope = jvp(lambda x: loss(norm, detached, x), (X,), (V,))
        torch.testing.assert_close(value, loss(norm, detached, X))
        torch.testing.assert_close(slope, (expected * V).sum())
        found = per_sample(X)
        for index, one in enumerate(X):
            of_one = {key: value for key, value in parameters.items() if value.requires_grad}
            if not of_one:
                break
            gradients = torch.autograd.grad(loss(norm, parameters, one[None]), list(of_one.values()))
            for key, gradient in zip(of_one, gradients, strict=True):
                torch.testing.assert_close(found[key][index], gradient)


def test_a_plain_batch_norm_without_running_statistics_passes_in_training_too():
    norm = build_norm("BN", 6, track_running_stats=False).double().train()
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad((norm(x) * V).sum(), x)[0]
    torch.testing.assert_close(grad(lambda x: (norm(x) * V).sum())(X), expected)


def test_a_norm_with_a_fused_activation_says_so_too():
    norm = fused.fuse_activation(build_norm("ShuffleBN", 6, num_groups=2), nn.Identity(), nn.ReLU()).double().train()
    with pytest.raises(LeakfreeError, match=r"torch\.func .* call eval\(\)"):
        grad(lambda x: norm(x).sum())(X)
    assert grad(lambda x: norm.eval()(x).sum())(X).shape == X.shape
