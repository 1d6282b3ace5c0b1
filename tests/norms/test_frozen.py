"""What is special about FrozenBN; that it is a batch norm in eval is checked in test_rules.py."""

import torch

from leakfree.norms import build_norm


def test_a_fresh_layer_is_the_identity():
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(build_norm("FrozenBN", 3)(x), x, rtol=1e-6, atol=1e-6)


def test_its_affine_map_trains_on_request():
    assert not any(parameter.requires_grad for parameter in build_norm("FrozenBN", 3).parameters())
    assert all(parameter.requires_grad for parameter in build_norm("FrozenBN", 3, affine_trainable=True).parameters())
