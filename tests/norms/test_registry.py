import pytest
import torch
from torch import fx, nn

from leakfree.errors import ConfigError
from leakfree.norms import NORMS, build_norm

NAMES = ["BN", "SyncBN", "GhostBN", "ShuffleBN", "FrozenBN", "BatchStatBN", "BatchRenorm", "BGN", "IEBN", "MBN", "GN"]
NAMES += ["LN", "IN", "PN", "ProxyNorm", "CBN"]
OPTIONS = {"GhostBN": {"group_size": 2}, "GN": {"num_groups": 3}, "CBN": {"rho": 0.0}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_every_norm_builds_in_every_dimension(name, dim):
    x = torch.randn(4, 6, *[3] * dim)
    norm = build_norm(name, 6, dim=dim, **OPTIONS.get(name, {}))
    assert norm(x).shape == x.shape
    assert norm.eval()(x).shape == x.shape


def test_unknown_names_and_options_list_the_valid_ones_nearest_first():
    with pytest.raises(ConfigError, match="unknown norm 'SynchBN'; choose from SyncBN"):
        build_norm("SynchBN", 3)
    with pytest.raises(ConfigError, match="norm GhostBN has no option 'groupsize'; it takes group_size"):
        build_norm("GhostBN", 3, groupsize=2)
    with pytest.raises(ConfigError, match=r"GhostBN.*group_size"):
        build_norm("GhostBN", 3)
    with pytest.raises(ConfigError, match="does not divide 6 channels; use one of 1, 2, 3, 6"):
        build_norm("GN", 6, num_groups=4)


def test_user_norms_register():
    NORMS._do_register("TestNorm", lambda num_features, *, dim, gain=1.0: nn.Identity())
    try:
        assert isinstance(build_norm("TestNorm", 3), nn.Identity)
    finally:
        NORMS._obj_map.pop("TestNorm")


@pytest.mark.parametrize("name", NAMES)
def test_a_symbolic_trace_takes_every_norm_as_one_call(name):
    """Else `torchvision.models.feature_extraction.create_feature_extractor` fails on a converted model."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), build_norm(name, 6, **OPTIONS.get(name, {})), nn.ReLU()).eval()
    traced = fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_refused_instead_of_rounded(name):
    norm = build_norm(name, 6, **OPTIONS.get(name, {}))
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"floating point|Float|not implemented for"):
            norm.train(mode)(torch.randint(0, 255, (4, 6, 5, 5), dtype=torch.uint8))


@pytest.mark.parametrize("name", ["BN", "IEBN"])
def test_the_variance_of_one_value_is_refused_as_torch_does(name):
    norm = build_norm(name, 6)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6, 1, 1))
    assert norm.eval()(torch.randn(1, 6, 1, 1)).shape == (1, 6, 1, 1)


def test_a_forward_in_inference_mode_leaves_later_gradients_alone():
    for name in NAMES:
        model = nn.Sequential(nn.Conv2d(3, 6, 3), build_norm(name, 6, **OPTIONS.get(name, {}))).eval()
        x = torch.randn(2, 3, 6, 6)
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
        assert model[0].weight.grad is not None
