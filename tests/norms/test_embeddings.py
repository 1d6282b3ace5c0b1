"""BN embeddings against the equations written out in float64, the mixture in training, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leakfree.errors import LeakfreeError
from leakfree.norms import BatchNormEmbeddings, build_norm, domain

D, K = 3, 4


def norm(channels, **options):
    return build_norm("DomainBN", channels, dim=None, num_domains=D, domain_names=["photo", "art", "sketch"], **options)


def network(seed=0, **options) -> nn.Sequential:
    """conv, norm, relu, conv, norm, relu, pool, norm of (N, C), linear; statistics of each domain are trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), norm(5, **options), nn.ReLU(),
        nn.Conv2d(5, 6, 2), norm(6, **options), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(6, **options), nn.Linear(6, K),
    ).double()  # fmt: skip
    with torch.no_grad():
        for _ in range(5):
            model.train()
            with domain(torch.arange(12) % D):
                model(images(12, seed=1, spread=2.0))
    return model.eval()


def images(rows, seed=2, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    return (
        x * (1 + torch.arange(rows).double() % D).view(-1, 1, 1, 1) * spread + torch.arange(rows).view(-1, 1, 1, 1) % D
    )


def reference(model, x, *, root=False, scale="sum", single_values="skip", sources=range(D)):
    """(outputs, distances) by the equations, layer by layer."""
    outputs, distances = [], []
    for d in sources:
        h, total = x, torch.zeros(len(x), dtype=torch.float64)
        for layer in model:
            if isinstance(layer, type(model[1])):
                mean, std = layer.running_mean[d], (layer.running_var[d] + layer.eps).sqrt()
                flat = h.reshape(len(h), h.shape[1], -1)
                positions = flat.shape[2]
                if positions > 1 or single_values == "mean":
                    own = flat.sum(2) / positions
                    parts = (own - mean) ** 2
                    if positions > 1:
                        own_std = (((flat - own[..., None]) ** 2).sum(2) / positions + layer.eps) ** 0.5
                        parts = parts + (own_std - std) ** 2
                    w = parts.sum(1) if scale == "sum" else parts.sum(1) / parts.shape[1]
                    total = total + (w**0.5 if root else w)
                shape = (1, -1) + (1,) * (h.ndim - 2)
                h = (h - mean.view(shape)) / std.view(shape) * layer.weight.view(shape) + layer.bias.view(shape)
            else:
                h = layer(h)
        outputs.append(h)
        distances.append(total)
    return torch.stack(outputs), torch.stack(distances, 1)


def weights_of(distances):
    inverse = 1 / (distances + 1e-8)
    return inverse / inverse.sum(1, keepdim=True)


OPTIONS = [
    {},
    {"root": True},
    {"scale": "mean"},
    {"root": True, "scale": "mean", "single_values": "mean"},
    {"single_values": "mean"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_the_mixture_is_that_of_the_equations(options, mix):
    model, x = network(), images(7)
    found = BatchNormEmbeddings(model, mix=mix, **options).eval().mixture(x)
    outputs, distances = reference(model, x, **options)
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.distances, distances, rtol=1e-10, atol=1e-10)
    weights = weights_of(distances)
    torch.testing.assert_close(found.weights, weights, rtol=1e-10, atol=1e-12)
    if mix == "logits":
        expected = torch.einsum("nd,dnk->nk", weights, outputs)
    else:
        expected = torch.einsum("nd,dnk->nk", weights, outputs.exp() / outputs.exp().sum(2, keepdim=True)).log()
    torch.testing.assert_close(found.prediction, expected, rtol=1e-9, atol=1e-9)
    assert found.own is None


def test_a_sample_with_the_statistics_of_a_domain_belongs_to_it():
    model = nn.Sequential(norm(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, K)).double().eval()
    x = images(1)
    var, mean = torch.var_mean(x.flatten(2)[0], 1, correction=0)
    model[0].running_mean[1], model[0].running_var[1] = mean, var
    found = BatchNormEmbeddings(model).eval().mixture(x)
    assert found.distances[0, 1].item() == pytest.approx(0, abs=1e-12)
    assert found.weights[0, 1].item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found.prediction.exp(), found.outputs[1].softmax(1), rtol=1e-5, atol=1e-5)


@given(st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_samples_are_predicted_alone_and_weights_add_up_to_one(rows, seed):
    mixed = BatchNormEmbeddings(network()).eval()
    x = images(rows, seed=seed)
    found = mixed.mixture(x)
    assert found.prediction.shape == (rows, K)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(rows, dtype=torch.float64))
    torch.testing.assert_close(found.prediction.exp().sum(1), torch.ones(rows, dtype=torch.float64))
    for row in range(rows):
        torch.testing.assert_close(mixed(x[row : row + 1])[0], found.prediction[row], rtol=1e-9, atol=1e-9)


def test_some_of_the_domains_can_be_mixed():
    model, x = network(), images(5)
    mixed = BatchNormEmbeddings(model, domains=["sketch", 0]).eval()
    assert mixed.domains == (2, 0)
    outputs, distances = reference(model, x, sources=(2, 0))
    found = mixed.mixture(x)
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.weights, weights_of(distances), rtol=1e-10, atol=1e-12)


# --- training


def test_training_updates_each_domain_once_and_mixes_own_predictions_of_the_batch_in():
    model, x = network(), images(9)
    ids = torch.tensor([0, 1, 2, 0, 1, 2, 2, 2, 0])
    plain = copy.deepcopy(model).train()
    with domain(ids):
        own = plain(x)
    mixed = BatchNormEmbeddings(model).train()
    found = mixed.mixture(x, ids)
    torch.testing.assert_close(found.own, own, rtol=0, atol=0)
    for left, right in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(left, right)
    outputs, distances = reference(model, x)  # with the updated statistics
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-10, atol=1e-10)
    weights = weights_of(distances)
    torch.testing.assert_close(found.weights, weights, rtol=1e-10, atol=1e-12)
    outputs[ids, torch.arange(9)] = own
    expected = torch.einsum("nd,dnk->nk", weights, outputs.softmax(2)).log()
    torch.testing.assert_close(found.prediction, expected, rtol=1e-9, atol=1e-9)
    assert all(module.training for module in mixed.modules())
    assert not any(module._forward_pre_hooks for module in mixed.modules())


@pytest.mark.parametrize("root", [False, True])
def test_gradients_go_through_predictions_and_weights(root):
    model = network()
    mixed = BatchNormEmbeddings(model, root=root).eval()
    x = images(2).requires_grad_(True)
    assert torch.autograd.gradcheck(mixed, (x,), atol=1e-5, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: mixed.mixture(x).weights, (x,), atol=1e-5, fast_mode=True)


def test_a_channel_that_is_constant_has_finite_gradients():
    model = network()
    with torch.no_grad():
        model[0].weight.zero_()
        for layer in (model[1], model[4]):
            layer.running_mean.zero_()
    mixed = BatchNormEmbeddings(model, root=True).train()
    F.cross_entropy(mixed(images(6), torch.arange(6) % D), torch.arange(6) % K).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())


def test_a_few_steps_of_training_lower_the_loss():
    model, x = network(), images(24, seed=5)
    ids, labels = torch.arange(24) % D, torch.arange(24) % K
    mixed = BatchNormEmbeddings(model).train()
    optimizer = torch.optim.Adam(mixed.parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        found = mixed.mixture(x, ids)
        loss = F.cross_entropy(found.prediction, labels) + F.cross_entropy(found.own, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_batch_norms_without_domains_are_updated_once_and_frozen_layers_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), norm(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, K)).double()
    model[1].frozen = True
    before = copy.deepcopy(model[1].state_dict())
    mixed = BatchNormEmbeddings(model).train()
    mixed(images(4), torch.arange(4) % D)
    assert int(model[0].num_batches_tracked) == 1
    assert all(torch.equal(before[name], value) for name, value in model[1].state_dict().items())


# --- dtypes, compilers, mistakes


def test_half_precision_and_autocast_measure_distances_in_float32():
    model = network().float()
    mixed, x = BatchNormEmbeddings(model).eval(), images(5).float()
    exact = mixed.mixture(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixed.mixture(x)
    assert rough.distances.dtype == torch.float32
    torch.testing.assert_close(rough.weights, exact.weights, rtol=0.05, atol=0.02)
    halved = BatchNormEmbeddings(copy.deepcopy(model).bfloat16()).eval().mixture(x.bfloat16())
    assert (halved.distances.dtype, halved.prediction.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(halved.weights, exact.weights, rtol=0.1, atol=0.05)


def test_channels_last_gives_the_same():
    mixed, x = BatchNormEmbeddings(network()).eval(), images(5)
    last = mixed.mixture(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.prediction, mixed(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_models_give_the_same(inside):
    model, x = network(), images(5)
    expected = BatchNormEmbeddings(model).eval()(x)
    if inside:
        compiled = torch.compile(model, backend="eager")
        with domain(0):
            compiled(x)
        mixed = BatchNormEmbeddings(compiled).eval()
    else:
        mixed = torch.compile(BatchNormEmbeddings(model).eval(), backend="eager")
    torch.testing.assert_close(mixed(x), expected, rtol=0, atol=0)


def test_state_is_that_of_the_model():
    model = network()
    mixed, other = BatchNormEmbeddings(model).eval(), BatchNormEmbeddings(network(seed=9)).eval()
    assert list(mixed.state_dict()) == [f"model.{name}" for name in model.state_dict()]
    other.load_state_dict(mixed.state_dict())
    assert torch.equal(other(images(3)), mixed(images(3)))


def two_sizes():
    return nn.Sequential(build_norm("DomainBN", 2, num_domains=2), build_norm("DomainBN", 2, num_domains=3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchNormEmbeddings(nn.Sequential(nn.BatchNorm2d(2))), "no DomainBN with running statistics of each"),
        (lambda: BatchNormEmbeddings(network(running_statistics="shared")), "no DomainBN with running statistics"),
        (lambda: BatchNormEmbeddings(two_sizes()), r"different numbers of domains: \[2, 3\]"),
        (lambda: BatchNormEmbeddings(network(), domains=[]), "one or more different ones"),
        (lambda: BatchNormEmbeddings(network(), domains=["art", 1]), "one or more different ones"),
        (lambda: BatchNormEmbeddings(network(), domains=["arts"]), "no domain 'arts'"),
        (lambda: BatchNormEmbeddings(network(), mix="votes"), "mix must be 'probabilities' or 'logits', got 'votes'"),
        (lambda: BatchNormEmbeddings(network(), scale="max"), "scale must be"),
        (lambda: BatchNormEmbeddings(network(), single_values="drop"), "single_values must be"),
        (lambda: BatchNormEmbeddings(network()).train()(images(3)), "training needs `domains`"),
        (
            lambda: BatchNormEmbeddings(network(), domains=[0, 1]).train()(images(3), torch.tensor([0, 1, 2])),
            r"samples of domain 2, not one of \(0, 1\)",
        ),
        (
            lambda: BatchNormEmbeddings(network()[:6]).eval()(images(3)),
            r"must return logits \(N, K\), got \(3, 6, 3, 3\)",
        ),
        (
            lambda: BatchNormEmbeddings(nn.Sequential(norm(6).double(), nn.Linear(6, 2).double())).eval()(
                torch.randn(2, 6, dtype=torch.float64)
            ),
            "no DomainBN layer ran on maps of more than one value",
        ),
    ],
)
def test_mistakes_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_failing_forward_leaves_hooks_and_modes_as_they_were():
    class Fails(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("boom")

    model = Fails(*network()).train()
    mixed = BatchNormEmbeddings(model).eval()
    model.train()
    with pytest.raises(RuntimeError, match="boom"):
        mixed.mixture(images(2))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_levels_have_no_distance():
    model = nn.Sequential(norm(2).double())
    with pytest.raises(LeakfreeError, match="takes levels"):
        BatchNormEmbeddings(model).eval()({0: images(2), 1: images(2)})
