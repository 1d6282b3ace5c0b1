"""How the ranks of a run find each other: where they meet, by when, and over which network. Torch-free at import."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING

from leakfree.errors import ConfigError
from leakfree.training.endings import RankError

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["from_launcher", "interface_of_this_machine", "interface_towards", "meet", "names_of_this_machine"]

_LAST_WORDS = 2.0  # seconds in which the others read why rank 0 gives up

_runs = count()


def meet(rank: int, world_size: int, file: str | None, within: float) -> dist.Store:
    """The store for a process group, once all ranks have arrived there.

    Args:
        file: where the ranks of one machine meet; None = where a launcher says.
        within: seconds that the others have to arrive.

    Raises:
        RankError: not all arrived within the time.
        ConfigError: a launcher's MASTER_ADDR or MASTER_PORT is missing or cannot be used.
    """
    import torch.distributed as dist

    limit = timedelta(seconds=within)
    base = _launchers_store(rank, limit) if file is None else dist.FileStore(file, world_size)
    base.set_timeout(limit)
    # a launcher's store may outlive a run, and the processes in it
    store = dist.PrefixStore(f"leakfree/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_runs)}", base)
    store.set(f"arrived/{rank}", socket.gethostname())
    if rank != 0:
        try:
            store.wait(["met"], 2 * limit)
        except RuntimeError as error:
            raise RankError(f"rank 0 is missing: it did not arrive within {within:g} s") from error
        if fault := store.get("met").decode():
            raise RankError(fault)
        return store
    keys = [f"arrived/{other}" for other in range(world_size)]
    try:
        store.wait(keys, limit)
    except RuntimeError as error:
        missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        fault = (
            f"only {world_size - len(missing)} of {world_size} ranks arrived within {within:g} s: "
            f"missing rank {', '.join(missing)}; see there why it did not start, or whether it reaches this machine"
        )
        store.set("met", fault)
        time.sleep(_LAST_WORDS)
        raise RankError(fault) from error
    store.set("met", "")
    return store


def _launchers_store(rank: int, limit: timedelta) -> dist.TCPStore:
    import torch.distributed as dist

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ConfigError(
                f"environment variable {name}: is not set; a launcher such as torchrun sets it: without one, unset "
                "RANK, LOCAL_RANK and WORLD_SIZE"
            )
    address, port = os.environ["MASTER_ADDR"], from_launcher("MASTER_PORT", low=1)
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(address, port, is_master=hosts, timeout=limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        if hosts:
            raise ConfigError(
                f"environment variable MASTER_PORT: rank 0 cannot listen on port {port} ({_first_line(error)}); "
                "choose a free one"
            ) from error
        raise RankError(
            f"rank 0 is missing: nothing answers at {address}:{port} (MASTER_ADDR, MASTER_PORT) within "
            f"{limit.total_seconds():g} s"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def names_of_this_machine() -> list[str]:
    """Under which other machines may find this one: the address it shows to MASTER_ADDR, and its names."""
    found = [_address_towards_master(), os.environ["MASTER_ADDR"], socket.gethostname(), socket.getfqdn()]
    return list(dict.fromkeys(name for name in found if name and not name.startswith("127.")))


def _address_towards_master() -> str:
    """The address of the interface that leads to MASTER_ADDR; "" if that is this machine alone."""
    own = _address_towards(os.environ["MASTER_ADDR"])
    return "" if own.startswith("127.") or own == "::1" else own


def interface_of_this_machine() -> str:
    """The network interface that leads to MASTER_ADDR; "" if it is not known: gloo then asks for the host's name."""
    return interface_towards(os.environ["MASTER_ADDR"]) if _address_towards_master() else ""


def interface_towards(host: str) -> str:
    """The network interface by which ``host`` is reached, of those with an IPv4 address; "" if it cannot be told."""
    own = _address_towards(host)
    if sys.platform != "linux" or not own or ":" in own:
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return ""


def _address_towards(host: str) -> str:
    """The own address on the way to ``host``; "" if there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def from_launcher(name: str, low: int) -> int:
    """The number in an environment variable of a launcher.

    Raises:
        ConfigError: it is no whole number of at least ``low``.
    """
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit()) or int(text) < low:
        raise ConfigError(
            f"environment variable {name}: got {os.environ[name]!r}, must be a whole number of at least {low}; "
            "a launcher such as torchrun sets it: without one, unset RANK, LOCAL_RANK and WORLD_SIZE"
        )
    return int(text)
