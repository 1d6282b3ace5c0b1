import numpy as np
import pytest
import torch
from torch import fx, nn

from leakfree.errors import ConfigError
from leakfree.norms import NORMS, build_norm, norm_layer
from leakfree.norms.options import accepted_options

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


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("GN", {"num_groups": "a"}, "num_groups must be a whole number, got 'a'"),
        ("GN", {"num_groups": 2.0}, r"num_groups must be a whole number, got 2\.0 \(write 2\)"),
        ("GN", {"num_groups": True}, "num_groups must be a whole number, got True"),
        ("GhostBN", {"group_size": None}, "group_size must be a whole number, got None"),
        ("ShuffleBN", {"num_groups": "2"}, "num_groups must be a whole number or null, got '2'"),
        ("BN", {"momentum": "0.1"}, "momentum must be a number or null, got '0.1'"),
        ("BN", {"eps": None}, "eps must be a number, got None"),
        ("FrozenBN", {"affine_trainable": 1}, "affine_trainable must be true or false, got 1"),
        ("BatchRenorm", {"r_max": "big"}, "r_max must be a number, got 'big'"),
        ("BatchRenorm", {"ramp": 5}, "ramp must be a list \\(each element a whole number\\) or null, got 5"),
        ("BatchRenorm", {"ramp": [1, 2, "c"]}, r"ramp must be a list \(each element a whole number\) or null"),
        ("CBN", {"window": "4"}, "window must be a whole number"),
        ("CBN", {"guard": 1}, "guard must be text, got 1"),
        ("MBN", {"memory": 2.5}, r"memory must be a whole number, got 2\.5"),
        ("BGN", {"num_groups": []}, "num_groups must be a whole number"),
        ("DomainBN", {"num_domains": 2, "affine": 3}, "affine must be true or false or text, got 3"),
        (
            "DomainBN",
            {"num_domains": 2, "domain_names": "ab"},
            "domain_names must be a list \\(each element text\\) or null",
        ),
        ("SyncBN", {"process_group": "all"}, "process_group must be ProcessGroup or 'node' or null, got 'all'"),
        ("LN", {"per_position": "yes"}, "per_position must be true or false"),
        ("ProxyNorm", {"activation": 3}, "activation must be text, got 3"),
    ],
)
def test_an_option_of_another_type_is_one_line_that_names_it(name, options, words):
    with pytest.raises(ConfigError, match=f"^norm {name}: {words}"):
        build_norm(name, 6, **options)
    with pytest.raises(
        ConfigError, match=rf"^model\.norm_options\.{words.partition(' ')[0]}: must be .* \(norm {name}\)$"
    ):
        norm_layer(name, options, "model")


@pytest.mark.parametrize("name", [name for name, _ in NORMS])
def test_every_option_of_every_norm_refuses_a_wrong_type(name):
    """No option of ours is without a type: an object of no kind is refused by name, not by an operation deep inside."""
    needed = {"num_domains": 2} if name == "DomainBN" else OPTIONS.get(name, {})
    for option in accepted_options(NORMS.get(name)):
        with pytest.raises(ConfigError, match=f"^norm {name}: {option} must be .*, got <object"):
            build_norm(name, 6, **needed | {option: object()})


def test_numbers_of_numpy_and_whole_numbers_for_others_are_taken():
    assert build_norm("GN", 6, num_groups=np.int64(3)).num_groups == 3
    assert build_norm("BN", 6, eps=np.float32(0.5), momentum=1).momentum == 1


def test_options_of_a_users_norm_are_of_the_types_it_names():
    def gained(num_features, *, dim, gain: float = 1.0, anything=None):
        return nn.Identity()

    NORMS._do_register("TestNorm", gained)
    try:
        assert isinstance(build_norm("TestNorm", 3, gain=2, anything="x"), nn.Identity)
        with pytest.raises(ConfigError, match="norm TestNorm: gain must be a number, got 'x'"):
            build_norm("TestNorm", 3, gain="x")
    finally:
        NORMS._obj_map.pop("TestNorm")


@pytest.mark.parametrize("option", ["name", "num_features", "dim"])
def test_what_the_model_says_to_each_norm_is_no_option(option):
    with pytest.raises(ConfigError, match=rf"^model\.norm_options\.{option}: is no option"):
        norm_layer("BN", {option: 3}, "model")
