"""The benchmarks run from the command line, count what they say they count, and refuse bad arguments in one line.

Nothing here looks at a time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from leakfree.norms import build_norm
from tests.ranks import run_ranks
from tools.benchmarks import peers
from tools.benchmarks.measure import Rounds, WireCounter

pytestmark = pytest.mark.alone

FOLDER = Path(__file__).parent.parent / "tools" / "benchmarks"
CHANNELS = 8


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def _results(script: str, folder: Path, *arguments: str) -> dict:
    path = folder / "results.json"
    run = _run(script, "--ranks", "1,2", "--repeats", "2", "--json", str(path), *arguments)
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def shuffle(tmp_path_factory):
    return _results("shuffle.py", tmp_path_factory.mktemp("shuffle"), "--shape", f"64,{CHANNELS},3,3", "--draws", "64")


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return _results("norms.py", tmp_path_factory.mktemp("norms"), "--shape", f"16,{CHANNELS},4,4", "--threads", "1")


@pytest.fixture(scope="module")
def knn(tmp_path_factory):
    path = tmp_path_factory.mktemp("knn") / "results.json"
    sizes = ["--bank", "2000", "--queries", "300", "--width", "16", "--neighbours", "20", "--threads", "1"]
    run = _run("knn.py", *sizes, "--repeats", "2", "--json", str(path))
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text())


def _row(results, section, ranks, variant):
    (row,) = [
        row
        for row in results["timings"]
        if (row["section"], row["setting"]["ranks"], row["variant"]) == (section, ranks, variant)
    ]
    return row


@pytest.mark.slow
@pytest.mark.parametrize("script", ["shuffle", "norms", "knn"])
def test_a_run_says_where_and_how_it_measured(script, request):
    results = request.getfixturevalue(script)
    assert results["benchmark"] == script
    assert {"cpu", "cores", "torch", "threads", "gpu"} <= set(results["machine"])
    assert results["settings"]["repeats"] == 2
    for row in results["timings"]:
        assert row["rounds"] == 2
        assert {"threads", "device", "dtype", "shape", "layout"} <= set(row["setting"])
        assert row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"]
        assert (row["wire"] is None) == (row["setting"]["ranks"] == 1)
    for skipped in results["skipped"]:
        assert skipped["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["batch_shuffle + batch_unshuffle", "Shuffled(BN)"])
def test_rows_cross_the_wire_once_a_direction(shuffle, variant):
    row = _row(shuffle, "roi", 2, variant)
    assert row["row_bytes"] == 64 * CHANNELS * 9 * 4
    assert row["wire"]["sent"] / row["row_bytes"] == pytest.approx(4 * (2 - 1) / 2, rel=0.05)
    assert row["wire"]["permutation"] == 0
    assert all(bar["met"] for bar in row["bars"])


@pytest.mark.slow
def test_unequal_rows_and_images_keep_to_the_formula(shuffle):
    unequal = _row(shuffle, "unequal", 2, "batch_shuffle + batch_unshuffle")
    assert unequal["row_bytes"] == 32 * CHANNELS * 9 * 4  # ranks of 0 and 64 rows
    assert unequal["wire"]["sent"] / unequal["row_bytes"] == pytest.approx(2, rel=0.05)
    images = _row(shuffle, "images", 2, "batch_shuffle")
    assert images["wire"]["sent"] / images["row_bytes"] == pytest.approx(1 / 2, rel=0.05)


@pytest.mark.slow
def test_statistics_travel_instead_of_rows(shuffle, norms):
    for row in (_row(shuffle, "roi", 2, "ShuffleBN"), _row(norms, "ranks", 2, "ShuffleBN")):
        assert row["wire"]["numbers"] == 2 * (4 * CHANNELS + 1)
        assert row["wire"]["sent"] == row["wire"]["permutation"] == 0
    assert _row(norms, "ranks", 2, "SyncBN")["wire"]["numbers"] == 4 * CHANNELS + 1


@pytest.mark.slow
def test_the_all_gather_sends_what_is_known_of_it(shuffle):
    row = _row(shuffle, "roi", 2, "all-gather exchange (plain)")
    assert row["wire"]["sent"] == 2 * row["row_bytes"]  # 2 (W-1) S forward
    assert row["wire"]["numbers"] == 2 * 2 * 64 * CHANNELS * 9  # the backward all-reduces W S, twice
    assert row["wire"]["permutation"] == 2 * 64 * 8 / 2  # rank 0 broadcasts int64; the mean of two ranks
    assert row["wire"]["total"] == 6 * row["row_bytes"] + row["wire"]["control"]


@pytest.mark.slow
def test_neighbours_are_compared_with_lightlys(knn):
    assert not knn["skipped"]
    variants = {row["variant"]: row for row in knn["timings"] if row["section"] == "knn"}
    assert set(variants) == {"knn_predict (lightly)", "faiss", "torch", "products alone"}
    for name in ("faiss", "torch"):
        assert variants[name]["reference"] == "knn_predict (lightly)"
        assert [bar["what"] for bar in variants[name]["bars"]] == ["unlike knn_predict (lightly)"]
    assert all(bar["met"] for row in knn["timings"] for bar in row["bars"])
    for row in knn["timings"]:
        # Of the inputs' few hundred KB: no library is counted, and what the process held already may be enough.
        assert 0 <= row["peak"] * row["row_bytes"] < 100e6
    assert any(row["peak"] > 0 for row in knn["timings"])
    assert {(row["section"], row["variant"]) for row in knn["timings"] if row["section"] != "knn"} == {
        (section, backend) for section in ("recall", "map") for backend in ("faiss", "torch")
    }


@pytest.mark.slow
def test_every_layer_has_its_memory_and_a_partition_its_accuracy(norms):
    for layout in ("contiguous", "channels_last"):
        peaks = {
            row["variant"]: row["peak"]
            for row in norms["timings"]
            if row["section"] == "layers" and row["setting"]["layout"] == layout
        }
        assert {"nn.BatchNorm2d", "GhostBN", "ShuffleBN", "FrozenBN", "GN"} <= set(peaks)
        assert peaks["FrozenBN"] == pytest.approx(2, abs=0.1)  # its output and the gradient of its input
    errors = {(row["setting"]["ranks"], row["variant"]): row["values"] for row in norms["figures"]}
    assert errors[2, "SyncBN, contiguous"]["1000"] < 1e-6
    assert errors[2, "naive SyncBN (plain), contiguous"]["1000"] > 1e-3


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("norms.py", ["--only", "ShufleBN"], "no section or variant 'ShufleBN'; choose from"),
        ("knn.py", ["--bank", "100"], "--neighbours 200 is more than --bank 100"),
        ("knn.py", ["--ranks", "2"], "unrecognized arguments: --ranks 2"),
        ("shuffle.py", ["--shape", "64,8"], "expected N,C,H,W"),
        ("shuffle.py", ["--json", "no/such/folder/x.json"], "no folder no/such/folder"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(script, arguments, message):
    run = _run(script, *arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert len(run.stderr.splitlines()) == 1


def _collectives(rank, world_size):
    """Send something known by each collective; bytes are (rows, integers), then numbers reduced."""
    counts = []

    def count(work):
        with WireCounter(rows=10) as counter:
            work()
        wire = counter.wire
        counts.append((wire.sent, wire.numbers, wire.control, wire.permutation, wire.total))

    rows = torch.zeros(5, 2)
    shares = [[1, 4], [3, 2]][rank]  # to ranks 0 and 1
    arrivals = [[1, 3], [4, 2]][rank]
    received = torch.zeros(sum(arrivals), 2)
    count(lambda: dist.all_to_all_single(received, rows, arrivals, shares))
    raw = torch.zeros(5, dtype=torch.uint8)
    count(lambda: dist.all_to_all_single(torch.zeros_like(received[:, 0], dtype=torch.uint8), raw, arrivals, shares))
    count(lambda: dist.all_gather([torch.zeros(5, 2) for _ in range(2)], rows))
    count(lambda: dist.all_gather_into_tensor(torch.zeros(10, 2), rows))
    count(lambda: dist.all_reduce(rows))
    count(lambda: dist.broadcast(torch.zeros(10, dtype=torch.int64), src=0))
    count(lambda: dist.all_reduce(torch.zeros(9, dtype=torch.int64)))
    count(lambda: dist.all_gather_object([None, None], "words"))
    return counts


def test_the_counter_knows_what_each_collective_sends():
    first, second = run_ranks(_collectives, 2)
    assert first[0] == (4 * 8, 0, 0, 0, 4 * 8)
    assert second[0] == (3 * 8, 0, 0, 0, 3 * 8)
    assert (first[1][0], second[1][0]) == (4, 3)  # rows sent as bytes are rows
    for ours in (first, second):
        assert ours[2] == ours[3] == (5 * 8, 0, 0, 0, 5 * 8)
        assert ours[4] == (0, 10, 0, 0, 10 * 4)  # a ring: 2 (W-1)/W of the bytes
        assert ours[6] == (0, 0, 9 * 8, 0, 9 * 8)  # nine integers for ten rows: no permutation
        assert ours[7][0] == ours[7][3] == 0  # a pickle is neither row nor permutation
        assert ours[7][2] > 0
    assert first[5] == (0, 0, 80, 80, 80)
    assert second[5] == (0, 0, 0, 0, 0)


def _naive_and_sync(rank, world_size):
    x = torch.randn(6, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(rank))
    outcomes = []
    for layer in (peers.NaiveSyncBatchNorm(CHANNELS), build_norm("SyncBN", CHANNELS)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * x.flip(0)).sum().backward()
        outcomes.append((y.detach(), leaf.grad))
    return outcomes


def test_the_plain_peers_compute_what_ours_do():
    for (y, gradient), (our_y, our_gradient) in run_ranks(_naive_and_sync, 2):
        torch.testing.assert_close(y, our_y, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, our_gradient, atol=1e-5, rtol=1e-4)
    x = torch.randn(8, CHANNELS, 3, 3)
    split, ghost = peers.SplitBatchNorm(CHANNELS, 4), build_norm("GhostBN", CHANNELS, group_size=2)
    torch.testing.assert_close(split(x), ghost(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(peers.FrozenBatchNorm(CHANNELS)(x), build_norm("FrozenBN", CHANNELS)(x))


def test_pressured_rounds_are_left_out_when_enough_are_quiet():
    seconds = {"a": [1.0, 9.0, 2.0, 3.0], "b": [2.0, 1.0, 4.0, 6.0]}
    quiet = Rounds(seconds, [0.0, 0.9, 0.01, None], max_pressure=0.03)
    assert quiet.pressured == 1
    assert quiet.used == [0, 2, 3]
    assert quiet.ratio("a", "b").median == 0.5
    crowded = Rounds(seconds, [0.9, 0.9, 0.01, 0.0], max_pressure=0.03)
    assert crowded.used == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------ contrastive


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    arguments = ("--shape", "16,3,8,8", "--only", "moco", "--ranks", "2")
    return _results("contrastive.py", tmp_path_factory.mktemp("contrastive"), *arguments)


def test_contrastive_times_every_word_against_plain_batch_norms_and_mocos_gather(contrastive):
    rows = {(row["setting"]["ranks"], row["variant"]) for row in contrastive["timings"]}
    words = {"bn", "shuffle_bn", "loader_shuffle", "sync_bn", "eman"}
    assert {name for ranks, name in rows if ranks == 2} >= {*words, "MoCo all-gather (plain)"}
    assert all(row["time"]["median"] > 0 for row in contrastive["timings"])


def test_mocos_gather_computes_what_our_words_compute():
    for ours, theirs in run_ranks(_keys_of_each, 2):
        assert ours == pytest.approx(theirs, abs=1e-5)


def _keys_of_each(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Per-image norms of keys do not tell; so compare keys under a norm that shares nothing: order must come home."""
    sys.path.insert(0, str(FOLDER))  # as when it is run
    import contrastive as script

    torch.manual_seed(rank)
    images = torch.randn(8, 3, 8, 8)
    found = []
    for name in ("eman", script.MOCO):
        method = script.make_method("moco", name, 8)
        method.key.eval()
        found.append(method.encode_keys(images, 0).flatten().tolist())
    return found[0], found[1]
