"""Features: each sample once, in its order, on every rank; in memory and mapped."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.errors import DataError
from leakfree.evaluation import extract_features
from tests.evaluation.blobs import blobs
from tests.ranks import run_ranks


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x) * 2


def _batches(x, y, numbers, size=4):
    return [(x[part], y[part], part) for part in torch.as_tensor(numbers).split(size)]


def _extract_on_ranks(rank, world_size, folder):
    x, y = blobs(11, width=3)
    padded = torch.arange(12) % 11  # what samplers do to give every rank as many
    model = _Model()
    found = extract_features(model, _batches(x, y, padded[rank::world_size]), folder=folder)
    assert model.training
    assert model.norm.training
    assert isinstance(found.x, torch.Tensor)
    return found.x.tolist(), found.y.tolist()


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_features_of_ranks_count_each_sample_once(ranks, mapped, tmp_path):
    x, y = blobs(11, width=3)
    expected = _Model().eval()(x)
    for features, classes in run_ranks(_extract_on_ranks, ranks, tmp_path if mapped else None):
        torch.testing.assert_close(torch.tensor(features), expected)
        assert classes == y.tolist()


def test_mapped_features_of_before_stay_what_they_are(tmp_path):
    (train_x, train_y), (val_x, val_y) = blobs(64, width=3), blobs(4, width=3, seed=1)
    train = extract_features(nn.Flatten(), _batches(train_x, train_y, range(64)), folder=tmp_path)
    val = extract_features(nn.Flatten(), _batches(val_x, val_y, range(4)), folder=tmp_path)
    assert torch.equal(train.x, train_x)
    assert torch.equal(val.x, val_x)


def test_gaps_and_contradictions_are_told(tmp_path):
    x, y = blobs(6, width=3)
    with pytest.raises(DataError, match="3 is missing"):
        extract_features(_Model(), _batches(x, y, [0, 1, 2, 4, 5]))
    with pytest.raises(DataError, match="two different classes"):
        extract_features(_Model(), [*_batches(x, y, range(6)), (x[:1], y[:1] + 1, torch.tensor([0]))])
    with pytest.raises(DataError, match="no samples"):
        extract_features(_Model(), [])
    with pytest.raises(DataError, match="a batch of 3 images has 2 classes and 3 sample numbers"):
        extract_features(_Model(), [(x[:3], y[:2], torch.arange(3))])
    for folder in (None, tmp_path):
        with pytest.raises(DataError, match=r"sample numbers must be 0 to N-1.* got -1"):
            extract_features(_Model(), _batches(x, y, [-1, 0, 1, 2]), folder=folder)
        with pytest.raises(DataError, match="6 images should give 6 rows, got \\(18,\\)"):
            extract_features(torch.flatten, _batches(x, y, range(6), size=6), folder=folder)
        with pytest.raises(DataError, match="features 2 wide after features 4 wide"):  # as many as images
            extract_features(lambda rows: rows[:, :1].expand(-1, len(rows)), _batches(x, y, range(6)), folder=folder)
    assert not list(tmp_path.iterdir())  # a failure leaves no file


def _uneven_on_ranks(rank, world_size, cuts, folder):
    x, y = blobs(cuts[-1], width=3)
    order = torch.randperm(cuts[-1], generator=torch.Generator().manual_seed(0))
    found = extract_features(nn.Flatten(), _batches(x, y, order[cuts[rank] : cuts[rank + 1]]), folder=folder)
    assert torch.equal(found.x, x)
    assert torch.equal(found.y, y)
    return len(found)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("cuts", [[0, 7, 8, 17], [0, 0, 0, 13], [0, 13, 13, 13], [0, 0, 1, 1]])
def test_shares_may_be_uneven_and_empty(cuts, mapped, tmp_path):
    assert run_ranks(_uneven_on_ranks, 3, cuts, tmp_path if mapped else None) == [cuts[-1]] * 3
    files = list(tmp_path.iterdir())
    assert len(files) == mapped
    for file in files:
        expected = blobs(cuts[-1], width=3)[0].numpy()
        assert np.array_equal(np.fromfile(file, np.float32).reshape(-1, 3), expected)


def _widths_on_ranks(rank, world_size, folder):
    x, y = blobs(6, width=3)
    with pytest.raises(DataError, match=r"different widths on different ranks: \[2, 3\]"):
        extract_features(lambda rows: rows[:, : 2 + rank], _batches(x, y, range(rank * 3, rank * 3 + 3)), folder=folder)


@pytest.mark.parametrize("mapped", [False, True])
def test_all_ranks_are_told_of_different_widths(mapped, tmp_path):
    run_ranks(_widths_on_ranks, 2, tmp_path if mapped else None)
    assert not list(tmp_path.iterdir())


def _folders_on_ranks(rank, world_size, root):
    x, y = blobs(6, width=3)
    if rank == 1:  # as on another machine
        Path.is_file, original = (lambda _: False), Path.is_file
    try:
        with pytest.raises(DataError, match="is not shared by all ranks"):
            extract_features(nn.Flatten(), _batches(x, y, range(6)), folder=root / str(rank))
    finally:
        if rank == 1:
            Path.is_file = original


def test_a_folder_of_one_rank_alone_is_told(tmp_path):
    run_ranks(_folders_on_ranks, 2, tmp_path)
    assert not list((tmp_path / "0").iterdir())


MEMORY = """
import resource, sys, torch
from pathlib import Path
from leakfree.evaluation import extract_features
width, count = 4096, 40
batches = ((torch.zeros(256, 1), torch.zeros(256).long(), torch.arange(256) + 256 * i) for i in range(count))
model = lambda images: torch.rand(1, width).expand(len(images), -1) + images
model(torch.zeros(256, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = extract_features(model, batches, folder=Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, found.x.numel() * 4 // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is KiB on Linux")
def test_mapped_features_are_never_held(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    grown, size = map(int, run.stdout.split())
    assert size == 163840
    assert grown < 0.3 * size
