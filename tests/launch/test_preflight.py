"""The preflight of ranks that are there, missing, blind or mistaken; on two nodes of Slurm in test_on_slurm.py."""

import dataclasses
import os
import shutil
import socket
import threading

import pytest

from leakfree.launch import preflight as room
from leakfree.launch.preflight import Place, PreflightError, address_of, place_in_slurm, port_of, preflight


def free_port():
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", one.getsockname()[1] + 1))
        return one.getsockname()[1]


@pytest.fixture
def config(tmp_path):
    from leakfree.config import ClassificationRunConfig

    return ClassificationRunConfig(output_dir=str(tmp_path / "run"))


def place(rank=0, world_size=1, hosts=("a",), cpus=None, port=None):
    return Place(rank, 0, world_size, rank, hosts, "127.0.0.1", port or free_port(), cpus)


def two(config):
    config.trainer.num_machines = 2
    return config


def test_one_rank_alone_passes_and_leaves_nothing(config, tmp_path):
    found = preflight(config, place())
    assert found.one_machine
    assert found.lines[0].startswith("preflight: 1 ranks on 1 machines (a), ")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (place(world_size=3, hosts=("a", "b", "c")), ["3 tasks on 3 machines", "launched for 2 on 2"]),
        (place(world_size=2, hosts=("a",)), ["2 tasks on 1 machines", "launched for 2 on 2"]),
    ],
)
def test_another_number_of_ranks_than_launched(config, where, words):
    with pytest.raises(PreflightError) as error:
        preflight(two(config), where)
    assert all(word in str(error.value) for word in words)


def test_cpus_that_srun_did_not_pass_on(config):
    with pytest.raises(
        PreflightError, match=r"rank 0 on a was asked to have 2 CPUs and was given no number.*SRUN_CPUS"
    ):
        preflight(config, place(), cpus_per_task=2)


def test_gpus_that_are_not_there(config):
    config.trainer.num_gpus = 64
    with pytest.raises(PreflightError, match=r"sees \d+ GPUs, and needs to see the 64"):
        preflight(config, place(world_size=64, hosts=("a",)), seconds=1)  # no other rank is needed to know


def test_a_rank_that_does_not_come_is_named(config):
    with pytest.raises(PreflightError, match=r"rank 1 \(on b\) did not arrive within 1 s"):
        preflight(two(config), place(world_size=2, hosts=("a", "b")), seconds=1)


def test_rank_0_that_does_not_come_is_told_by_the_others(config):
    with pytest.raises(PreflightError, match=r"rank 1 on b could not reach rank 0 at 127.0.0.1:\d+ within 1 s"):
        preflight(two(config), place(rank=1, world_size=2, hosts=("a", "b")), seconds=1)


def test_a_port_that_is_taken(config):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        taken = place(world_size=2, hosts=("a", "b"), port=other.getsockname()[1] - 1)
        with pytest.raises(PreflightError, match=r"rank 0 cannot listen.*another process has the port"):
            preflight(two(config), taken, seconds=1)


def test_a_disk_without_room(config, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(PreflightError, match="has 1 MiB left: make room"):
        preflight(config, place())


def test_an_output_folder_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("")
    config.output_dir = str(tmp_path / "file" / "run")
    with pytest.raises(PreflightError, match=r"rank 0 on a cannot write to .*: choose another output_dir"):
        preflight(config, place())


def test_a_file_that_others_do_not_see_is_waited_for_and_given_up(tmp_path):
    threading.Timer(0.3, lambda: (tmp_path / "late").write_text("word")).start()
    assert room._reads(tmp_path / "late", "word", 5)
    assert not room._reads(tmp_path / "late", "another", 0.2)


SLURM = {"SLURM_JOB_ID": "20007", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NODEID": "1"}


def test_a_task_of_slurm_becomes_a_rank():
    found = place_in_slurm({**SLURM, "SLURM_CPUS_PER_TASK": "2"}, ("localhost", "b"))
    assert found == Place(3, 1, 4, 1, ("localhost", "b"), "localhost", 10014, 2)
    assert found.environment() == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "10014",
    }  # fmt: skip
    assert [found.host_of(rank) for rank in range(4)] == ["localhost", "localhost", "b", "b"]


def test_a_process_that_srun_did_not_start():
    environ = {name: value for name, value in SLURM.items() if name != "SLURM_PROCID"}
    with pytest.raises(PreflightError, match="SLURM_PROCID not set: each rank must be a task of srun"):
        place_in_slurm(environ, ("localhost",))


def test_ports_of_jobs_side_by_side_differ_and_leave_those_of_clients():
    ports = [port for job in range(123456, 123456 + 10000) for port in (port_of(job), port_of(job) + 1)]
    assert len(set(ports)) == 20000
    assert (min(ports), max(ports)) == (10000, 29999)


def test_a_machine_whose_name_does_not_resolve_is_reached_by_what_srun_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol to ask
    assert address_of("localhost", {}) == "localhost"
    assert address_of("nowhere.invalid", {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"}) == "10.0.0.7"
    assert address_of("nowhere.invalid", {}) == "nowhere.invalid"


def test_gloo_is_sent_to_the_interface_of_the_other_machines(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(room.socket, "gethostbyname", lambda _: "127.0.1.1")  # as Debian sets it up
    there = dataclasses.replace(place(rank=1, world_size=2, hosts=("a", "b")), address="127.0.0.1")
    room._choose_interface(there, one_machine=False)
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "lo"  # the way to 127.0.0.1
    monkeypatch.setattr(room.socket, "gethostbyname", lambda _: "10.0.0.7")
    room._choose_interface(there, one_machine=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # its own name leads where others can come
