"""How much of an output lies on other samples, for every norm: what docs/norms.md says is what is measured."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from leakfree.leakage import cross_sample_influence
from leakfree.norms import NORMS, build_norm, domain
from leakfree.norms.attachment import attach_convolutions

OPTIONS = {
    "GhostBN": {"group_size": 4},
    "ShuffleBN": {"num_groups": 2},
    "GN": {"num_groups": 4},
    "BGN": {"num_groups": 4},
    "DomainBN": {"num_domains": 2},
    "BatchRenorm": {"ramp": None},
    "CBN": {"window": 4, "burn_in": 0},
}
DOCUMENT = Path(__file__).parents[2] / "docs" / "norms.md"


def _influence(name):
    """The page's setting: batches of 8 noise images of 6 x 6 through convolution, norm, ReLU, mean and linear map."""
    torch.manual_seed(0)
    norm = build_norm(name, 16, **OPTIONS.get(name, {}))
    activation = nn.Identity() if name == "ProxyNorm" else nn.ReLU()
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), norm, activation, *head).double()
    if name == "CBN":
        attach_convolutions(model)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(21, 8, 8, 6, 6, generator=generator, dtype=torch.float64)
    with domain(torch.arange(8) % 2) if name == "DomainBN" else contextlib.nullcontext():
        for batch in batches[1:]:  # so that moving averages and memories hold something
            model(batch)
        return cross_sample_influence(model, batches[0], num_probes=8).total


def _documented():
    rows = re.findall(r"^\| ([A-Za-z]+) \|.*\| ([\d.]+) \|[^|]*\|$", DOCUMENT.read_text(), flags=re.MULTILINE)
    return {name: value for name, value in rows if name in NORMS}


@pytest.mark.filterwarnings("ignore:ShuffleBN")
@pytest.mark.parametrize("name", [name for name, _ in NORMS])
def test_the_documented_influence_is_the_measured_one(name):
    documented = _documented()[name]
    measured = _influence(name)
    if documented == "0":
        assert measured == 0.0
    else:
        assert f"{measured:.3f}" == documented
        assert measured > 0.001
