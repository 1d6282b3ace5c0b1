"""Checkpoint files under a full disk, kills and damage, and what is written while training goes on."""

import enum
import os
import random
import resource
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leakfree.config import load_config
from leakfree.config.schema import OptimizerConfig, TrainerConfig
from leakfree.errors import CheckpointError, RunError
from leakfree.sealed import damage, disk_is_full, read_checkpoint, write_checkpoint
from leakfree.state import load_weights
from leakfree.training import saving, train, work
from leakfree.training.callbacks import Moments
from leakfree.training.checkpoints import FINAL, Shelf, checkpoint_name, list_checkpoints, newest_valid
from leakfree.training.journal import Journal
from leakfree.training.module import build_optimizer
from leakfree.training.saving import BackgroundCheckpoints, Staging
from tests.classification.conftest import CONFIG as CLASSIFICATION
from tests.contrastive.conftest import CONFIG as CONTRASTIVE
from tests.ranks import run_ranks
from tests.runs import weights_of


def content(value, size=50_000):
    return {"leakfree": {"step": value}, "weights": torch.full((size,), float(value))}


def test_what_is_written_is_read_and_newest_comes_first(tmp_path):
    for step in (9_999_999, 10_000_000, 5):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    (tmp_path / "checkpoint_best.pt").write_text("somebody else's")
    names = ["checkpoint_10000000.pt", "checkpoint_9999999.pt", "checkpoint_0000005.pt"]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    write_checkpoint(content(7), tmp_path / FINAL)
    assert list_checkpoints(tmp_path)[0].name == FINAL
    assert read_checkpoint(tmp_path / FINAL)["weights"][0] == 7.0
    assert os.stat(tmp_path / FINAL).st_mode & 0o777 == 0o644
    Shelf(tmp_path, 1).put(tmp_path / FINAL)
    assert [path.name for path in list_checkpoints(tmp_path)] == [FINAL, names[0]]
    assert (tmp_path / "last_checkpoint").read_text() == f"{FINAL}\n"


@pytest.mark.parametrize("fault", ["truncated", "bit", "empty", "text"])
def test_a_damaged_file_is_passed_over_with_a_line(tmp_path, fault):
    for step in (1, 2):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    newest = tmp_path / checkpoint_name(2)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    spoiled = {"truncated": bytes(data[:1000]), "bit": bytes(data), "empty": b"", "text": b"<html>"}[fault]
    newest.write_bytes(spoiled)
    assert damage(newest)
    path, (notice,) = newest_valid(tmp_path)
    assert path == tmp_path / checkpoint_name(1)
    assert str(newest) in notice
    assert "damaged" in notice
    path.write_bytes(spoiled)
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged \(checkpoint_0000002.pt, checkpoint_0000001"
    ):
        newest_valid(tmp_path)


def test_no_checkpoint_is_no_fault(tmp_path):
    assert newest_valid(tmp_path) == (None, [])


class _Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/leakfree-bomb",)


def test_nothing_in_a_file_runs(tmp_path):
    torch.save({"leakfree": _Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(tmp_path / "bomb.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint: it holds a list"):
        read_checkpoint(tmp_path / "list.pt")


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path):
    path = tmp_path / checkpoint_name(1)
    write_checkpoint(content(1), path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # writes beyond it fail as on a full disk
    try:
        with pytest.raises(RunError, match=r"checkpoint_0000001\.pt: the checkpoint could not be written") as caught:
            write_checkpoint(content(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "earlier ones are intact" in str(caught.value)
    assert disk_is_full(caught.value) is not None
    assert disk_is_full(ValueError("else")) is None
    assert read_checkpoint(path)["leakfree"]["step"] == 1
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def _save_for_ever(folder, told):
    """What a training does, at every step; ``told`` is written once a checkpoint is said to be on disk."""
    start, _ = newest_valid(folder)
    first = 1 if start is None else read_checkpoint(start)["leakfree"]["step"] + 1

    def saved(step, seconds):
        os.pwrite(told, f"{step:9d}".encode(), 0)

    with BackgroundCheckpoints(Shelf(folder, 2), saved) as checkpoints:
        for step in range(first, 10**6):
            state = {**content(step, 400_000), "leakfree": {"step": step, "seconds": 0.0}}
            checkpoints.save_checkpoint(state, folder / checkpoint_name(step))


def test_twenty_kills_during_a_save_lose_nothing_that_was_said_to_be_saved(tmp_path):
    moments, torn = random.Random(0), 0
    folder = tmp_path / "run"
    folder.mkdir()
    told = os.open(tmp_path / "told", os.O_RDWR | os.O_CREAT)
    for kill in range(20):
        child = os.fork()
        if child == 0:
            try:
                _save_for_ever(folder, told)
            finally:
                os._exit(1)
        while not os.pread(told, 9, 0):  # the first is not disturbed
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.08))
        os.kill(child, 9)
        assert os.waitpid(child, 0)[1] == 9
        torn += any(folder.glob(".*.tmp"))
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()
        newest, notices = newest_valid(folder)
        assert notices == [], kill
        state = read_checkpoint(newest)
        assert state["leakfree"]["step"] >= int(os.pread(told, 9, 0))
        assert (state["weights"] == state["leakfree"]["step"]).all()
        assert damage(folder / (folder / "last_checkpoint").read_text().strip()) == ""
    os.close(told)
    Shelf(folder, 2).put(newest)  # what is done next puts the folder in order
    assert len(list_checkpoints(folder)) == 2
    assert torn  # kills did hit writes; how many depends on how busy the machine is


def _spoiled(whole, chance):
    """``whole`` with one bit changed, or cut off; a third of the changes are in what a zip file says of itself."""
    data, kind = bytearray(whole), chance.random()
    if kind < 0.3:
        return bytes(data[: chance.randrange(len(data))])
    place = chance.randrange(len(data)) if kind < 0.7 else len(data) - 1 - chance.randrange(200)
    data[place] ^= 1 << chance.randrange(8)
    return bytes(data)


def test_two_hundred_truncations_and_bit_flips_are_seen_and_the_one_before_is_used(tmp_path):
    for step in (1, 2):
        write_checkpoint(content(step, 500), tmp_path / checkpoint_name(step))
    newest, chance = tmp_path / checkpoint_name(2), random.Random(0)
    whole = newest.read_bytes()
    for _ in range(200):
        newest.write_bytes(_spoiled(whole, chance))
        path, (notice,) = newest_valid(tmp_path)
        assert path == tmp_path / checkpoint_name(1)
        assert notice.startswith(f"{newest} is damaged (")
        with pytest.raises(CheckpointError, match=r"checkpoint_0000002\.pt(: cannot be read| is damaged)"):
            read_checkpoint(newest)


def test_every_byte_of_a_file_is_under_its_seal(tmp_path):
    path = tmp_path / "a.pt"
    write_checkpoint(content(1, 10), path)
    whole = path.read_bytes()
    with path.open("rb+", buffering=0) as file:
        for place in range(len(whole)):
            os.pwrite(file.fileno(), bytes([whole[place] ^ (1 << place % 8)]), place)
            assert damage(path), place
            os.pwrite(file.fileno(), whole[place : place + 1], place)
        assert damage(path) == ""
        for length in reversed(range(len(whole))):
            os.ftruncate(file.fileno(), length)
            assert damage(path), length


def test_a_sealed_file_is_an_ordinary_zip_file_of_torch(tmp_path):
    write_checkpoint(content(3), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.comment.startswith(b"leakfree sha256:")
        assert archive.testzip() is None
    for mmap in (False, True):
        assert torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)["leakfree"] == {"step": 3}


def test_a_file_without_a_seal_is_checked_by_its_sums(tmp_path):
    path = tmp_path / "before.pt"
    torch.save(content(1), path)
    assert damage(path) == ""
    assert read_checkpoint(path)["leakfree"]["step"] == 1
    whole = path.read_bytes()
    for spoiled in (whole[:-1], whole[:-30], whole + b"\0", whole[:1000] + b"x" + whole[1001:]):
        path.write_bytes(spoiled)
        assert damage(path)
        with pytest.raises(CheckpointError, match=r"before\.pt is damaged"):
            read_checkpoint(path)
    torch.save(content(2), path, _use_new_zipfile_serialization=False)  # torch's format of before, which has none
    assert read_checkpoint(path)["leakfree"]["step"] == 2


# ----------------------------------------------------------------------------------------- plain data


class _Level(enum.IntEnum):
    HIGH = 1


class _Tensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.float64(1), "numpy.float64"),
        (_Level.HIGH, "_Level"),
        (Path("x"), "PosixPath"),
        (len, "builtin_function_or_method"),
        (torch.ones(2).as_subclass(_Tensor), "_Tensor"),
        (torch.ones(2).to_sparse(), "sparse"),
    ],
)
def test_what_could_not_be_read_back_safely_is_not_written(tmp_path, value, words):
    for inside in ({"a": [0, value]}, {"a": (0, value)}):
        for write in (write_checkpoint, lambda inside, path: Staging().copy(inside)):
            with pytest.raises(CheckpointError, match=rf"^checkpoint\['a'\]\[1\]: a .*{words}.* cannot be saved"):
                write(inside, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_plain_data_comes_back_as_it_was(tmp_path):
    plain = {
        "atoms": [None, True, 3, -(2**70), 0.5, float("inf"), 2j, "text", b"bytes"],
        7: (1, (2,)),
        "ordered": OrderedDict(b=1, a=2),
        "counted": Counter("aab"),
        "set": {1, 2},
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cpu")],
    }
    tied, wide = torch.randn(300, 4), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = [tied, tied, wide, torch.randn(300, 4)[:, ::2], torch.tensor(1.0), torch.empty(0, 2)]
    tensors += [
        torch.ones(3, dtype=torch.bool),
        torch.ones(3).bfloat16(),
        nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]),
    ]
    staging = Staging()
    for number, copy in enumerate((lambda content: content, staging.copy)):
        path = tmp_path / f"{number}.pt"
        write_checkpoint(copy({**plain, "tensors": tensors}), path)
        found = read_checkpoint(path)
        for one, two in zip(tensors, found.pop("tensors"), strict=True):
            assert torch.equal(one, two)
            assert one.dtype == two.dtype
        assert found == plain
        assert [type(item) for item in found.values()] == [type(item) for item in plain.values()]
    assert (tmp_path / "1.pt").stat().st_size <= (tmp_path / "0.pt").stat().st_size  # the tied ones once


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_the_state_of_every_optimizer_is_plain(tmp_path, name):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)  # as in 16-mixed
    for _ in range(2):
        scaler.scale(model(torch.randn(5, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    states = [item.state_dict() for item in (optimizer, scheduler, scaler)]
    write_checkpoint({"states": states}, tmp_path / "a.pt")
    assert str(read_checkpoint(tmp_path / "a.pt")["states"]) == str(states)


# ----------------------------------------------------------------------------------------- the folder


def test_damaged_checkpoints_are_not_counted_among_those_kept(tmp_path):
    shelf = Shelf(tmp_path, 1)
    for step in (1, 2):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    shelf.put(tmp_path / checkpoint_name(2))
    assert list_checkpoints(tmp_path) == [tmp_path / checkpoint_name(2)]
    for step in (3, 4):
        write_checkpoint(content(step), tmp_path / checkpoint_name(step))
    (tmp_path / checkpoint_name(4)).write_bytes(b"PK")  # not by this training, newer than what it wrote
    shelf.put(tmp_path / checkpoint_name(3))
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(4), checkpoint_name(3)]
    newest = tmp_path / checkpoint_name(3)
    newest.write_bytes(newest.read_bytes()[:-1])  # damaged since it was entered
    write_checkpoint(content(2), tmp_path / checkpoint_name(2))
    shelf.put(tmp_path / checkpoint_name(2))
    assert newest_valid(tmp_path)[0] == tmp_path / checkpoint_name(2)
    assert (tmp_path / "last_checkpoint").read_text() == checkpoint_name(2) + "\n"


def test_a_file_of_another_kind_is_refused_without_advice_to_run_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: contrastive\n")
    for read in (read_checkpoint, lambda path: load_weights(torch.nn.Linear(1, 1), str(path))):
        with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: .") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)


# --------------------------------------------------------------------------- while training goes on


def test_memory_for_copies_is_used_again(tmp_path):
    staging, live = Staging(), [torch.randn(100, 3), torch.randn(7), torch.randn(7)]
    staging.prepare(live)
    places = []
    for number in range(3):
        copies = staging.copy(live)
        assert all(torch.equal(copy, item) for copy, item in zip(copies, live, strict=True))
        places.append({copy.data_ptr() for copy in copies})
        live[0].fill_(number)
        assert not torch.equal(copies[0], live[0])
        with pytest.raises(CheckpointError):
            Staging().copy([live, object()])
        staging.release()
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 3


@pytest.fixture
def configs(tmp_path):
    """``configs(text, name, *overrides)``: a config of the tiny runs that writes to ``tmp_path / name``."""

    def make(text, name, *overrides):
        (tmp_path / "config.yaml").write_text(text)
        brief = ["leakage.enabled=false", "evaluation.statistics=[population]"]
        return load_config(tmp_path / "config.yaml", [f"output_dir={tmp_path / name}", *brief, *overrides])

    return make


def _alike(one, two, where=""):
    """Assert that two checkpoints hold the same, bit for bit; but for the time they took."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            if key not in ("seconds", "step_times", "wait_times", "output_dir"):
                _alike(one[key], two[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, items in enumerate(zip(one, two, strict=True)):
            _alike(*items, f"{where}[{index}]")
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, where


@pytest.mark.parametrize(
    ("text", "optimizer"), [(CLASSIFICATION, "adamw"), (CONTRASTIVE, "lars"), (CLASSIFICATION, "sgd")]
)
def test_a_checkpoint_holds_its_step_though_training_goes_on(configs, tmp_path, monkeypatch, text, optimizer):
    """A slow writer, against one that training waits for."""
    done, during = [0], []
    stepped, write, save = Journal.stepped, saving.write_checkpoint, BackgroundCheckpoints.save_checkpoint

    def counted(self, *args):
        done[0] += 1
        stepped(self, *args)

    def slow(content, path):
        before = done[0]
        limit = time.monotonic() + 20
        while done[0] < min(before + 2, 6) and time.monotonic() < limit:
            time.sleep(0.001)
        during.append(done[0] - before)
        write(content, path)

    def waiting(self, *args, **options):
        save(self, *args, **options)
        self.saved_to_disk()

    overrides = [f"optimizer.name={optimizer}", "trainer.checkpoint_period=3"]
    monkeypatch.setattr(Journal, "stepped", counted)
    monkeypatch.setattr(saving, "write_checkpoint", slow)
    train(configs(text, "slow", *overrides))
    assert during[0] >= 2  # more steps were done before the first was written
    assert during[1:] == [0]
    monkeypatch.setattr(saving, "write_checkpoint", write)
    monkeypatch.setattr(BackgroundCheckpoints, "save_checkpoint", waiting)
    train(configs(text, "waiting", *overrides))
    for name in (checkpoint_name(3), FINAL):
        _alike(read_checkpoint(tmp_path / "slow" / name), read_checkpoint(tmp_path / "waiting" / name))


def test_the_final_weights_are_on_disk_before_the_evaluation(configs, tmp_path, monkeypatch):
    write, evaluate, seen = saving.write_checkpoint, work._Session.evaluate, []

    def slow(content, path):
        time.sleep(0.3)
        write(content, path)

    def looking(self, task):
        seen.append(((tmp_path / "run" / "last_checkpoint").read_text(), self.record.timing["steps"]))
        evaluate(self, task)

    monkeypatch.setattr(saving, "write_checkpoint", slow)
    monkeypatch.setattr(work._Session, "evaluate", looking)
    train(configs(CLASSIFICATION, "run"))
    assert seen == [(f"{FINAL}\n", 6)]
    assert weights_of(tmp_path / "run")


def test_a_writer_that_fails_ends_the_training_at_the_next_step(configs, tmp_path, monkeypatch):
    def failing(content, path):
        raise RunError(f"{path}: no room")

    monkeypatch.setattr(saving, "write_checkpoint", failing)
    with pytest.raises(RunError, match=r"checkpoint_0000002\.pt: no room"):
        train(configs(CLASSIFICATION, "run", "schedule.max_steps=100000", "trainer.log_period=1"))
    assert len((tmp_path / "run" / "metrics.json").read_text().splitlines()) < 200
    with pytest.raises(RunError, match=r"model_final\.pt: no room"):
        train(configs(CLASSIFICATION, "other", "trainer.checkpoint_period=100"))


def test_an_exception_in_the_training_leaves_what_was_being_written_whole(configs, tmp_path, monkeypatch):
    write, stepped = saving.write_checkpoint, Journal.stepped

    def slow(content, path):
        time.sleep(0.3)
        write(content, path)

    def failing(self, step, *args):
        stepped(self, step, *args)
        if step == 3:
            raise KeyError("a bug")

    monkeypatch.setattr(saving, "write_checkpoint", slow)
    monkeypatch.setattr(Journal, "stepped", failing)
    with pytest.raises(KeyError, match="a bug"):
        train(configs(CLASSIFICATION, "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [checkpoint_name(2)]
    assert damage(tmp_path / "run" / checkpoint_name(2)) == ""
    assert not list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.undo()
    assert train(configs(CLASSIFICATION, "run"), resume=True).status == "finished"


def _wait_on_ranks(rank, world_size, folder):
    def failing(steps, seconds):
        raise RunError("no room")

    with BackgroundCheckpoints(Shelf(folder, 1), failing) as checkpoints:
        moments = Moments(Path(folder), TrainerConfig(), None, None, None, checkpoints, validate_first=False)
        moments.saved_to_disk()  # nothing is being written
        if rank == 0:
            checkpoints.save_checkpoint({"leakfree": {"step": 1, "seconds": 0.0}}, Path(folder) / checkpoint_name(1))
        try:
            moments.saved_to_disk()
        except RunError as error:
            return str(error)
    return ""


def test_every_rank_learns_that_a_checkpoint_is_not_on_disk(tmp_path):
    assert run_ranks(_wait_on_ranks, 2, str(tmp_path)) == ["no room", "no room"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
def test_what_is_no_file_is_a_damaged_checkpoint_and_stays(tmp_path, kind):
    write_checkpoint(content(1), tmp_path / checkpoint_name(1))
    odd = tmp_path / checkpoint_name(2)
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(odd.name if kind == "link to itself" else "nothing")
    path, (notice,) = newest_valid(tmp_path)
    assert path == tmp_path / checkpoint_name(1)
    assert f"{odd} is damaged (no regular file)" in notice
    Shelf(tmp_path, 1).put(path)
    assert path.is_file()
    assert os.path.lexists(odd)
    path.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):  # and no start from the beginning
        newest_valid(tmp_path)
