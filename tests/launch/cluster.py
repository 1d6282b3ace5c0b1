"""A throw-away Slurm cluster on this machine: munge, a controller, and two nodes with ports of their own.

Debian's packages munge, slurmctld, slurmd and slurm-client are enough; all files live in one folder, and nothing
is left running.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

NEEDED = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue"]

CONF = """
ClusterName=leakfree
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
KillWait=20
OverTimeLimit=0
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={first} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={second} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=2 State=UP
PartitionName=spare Nodes=n1,n2 MaxTime=60 PriorityTier=1 State=UP
PartitionName=grace Nodes=n1,n2 MaxTime=60 PriorityTier=1 GraceTime=30 State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; "" where one can."""
    absent = [name for name in NEEDED if _which(name) is None]
    if absent:
        return f"no Slurm here: {', '.join(absent)} missing (Debian: apt install munge slurmctld slurmd slurm-client)"
    return "" if os.geteuid() == 0 else "starting slurmd needs root"


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Cluster:
    """Two nodes, n1 and n2, of 4 CPUs each (they are one machine), in the partition ``main``.

    It preempts the partitions ``spare``, whose jobs are requeued at once, and ``grace``, whose jobs are warned by
    SIGTERM and have 30 s left. ``cluster.environment`` is what commands need to find it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: Mapping[str, str] = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        port, first, second = _free_ports(3)
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(folder=self.folder, host=host, address="127.0.0.1", port=port, first=first, second=second)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("socket", "pid-file", "seed-file")),
            f"--log-file={self.folder}/munged.log",
        )
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self._until(lambda: self.node_states() == {"n1": "idle", "n2": "idle"}, "two idle nodes", seconds=60)

    def stop(self) -> None:
        subprocess.run(
            ["scancel", "--state=RUNNING,PENDING,SUSPENDED", "--user=root", "--signal=KILL", "--full"],
            env=self.environment, capture_output=True, check=False, timeout=20,
        )  # fmt: skip
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, check=False, timeout=20)
        for name in sorted(self._daemons, key=lambda name: ["slurmd", "slurmctld", "munged"].index(name.split()[0])):
            self._end(name)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-D", "-N", node)

    def stop_node(self, node: str) -> None:
        """What a node that loses its power looks like from outside: its daemon and all its steps are gone."""
        self._daemons[f"slurmd {node}"].kill()
        self._end(f"slurmd {node}")
        for stat in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = stat.read_bytes().decode(errors="replace")
                environment = (stat.parent / "environ").read_bytes().decode(errors="replace")
            except OSError:
                continue
            of_node = f"SLURMD_NODENAME={node}\0" in environment and str(self.folder) in environment
            if of_node or (words.startswith("slurmstepd") and f"spool.{node}" in words):
                _kill(int(stat.parent.name))

    def run(self, *command: str, timeout: float = 60) -> str:
        """A Slurm command's output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def node_states(self) -> dict[str, str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format", "%N %t"],
            env=self.environment, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return {words[0]: words[1] for line in done.stdout.splitlines() if len(words := line.split()) == 2}

    def claim(self, seconds: int = 3) -> None:
        """Submit a job of the partition ``main`` that wants all of both nodes, which preempts those of the others."""
        self.run(
            "sbatch", "--partition=main", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", f"sleep {seconds}"
        )

    def job(self, job_id: str) -> dict[str, str]:
        """``scontrol show job`` as a dict."""
        text = self.run("scontrol", "show", "job", "-o", job_id)
        return dict(word.split("=", 1) for word in text.splitlines()[0].split() if "=" in word)

    def wait_for_state(self, job_id: str, *states: str, seconds: float = 120) -> dict[str, str]:
        self._until(
            lambda: self.job(job_id)["JobState"] in states, f"job {job_id} in {states}: {self.job(job_id)}", seconds
        )
        return self.job(job_id)

    def _daemon(self, name: str, *arguments: str) -> None:
        label = f"{name} {arguments[-1]}" if name == "slurmd" else name
        log = (self.folder / f"{label.replace(' ', '.')}.out").open("ab")
        program = _which(name)
        assert program is not None
        self._daemons[label] = subprocess.Popen(
            [program, *arguments],
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_the_tests,
        )
        log.close()

    def _end(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _until(self, condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} within {seconds} s; see {self.folder}"
            time.sleep(0.2)


def _die_with_the_tests() -> None:
    """Ask the kernel to end a daemon when the process of the tests is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [int(item.getsockname()[1]) for item in sockets]
    finally:
        for item in sockets:
            item.close()
