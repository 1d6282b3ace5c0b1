"""Real gloo processes for tests, started once for the whole run.

``run_ranks(fn, world_size, *args)`` runs the module-level ``fn(rank, world_size, *args)`` in that many
processes with an initialized process group and returns their results in rank order. An exception in
any rank is raised here with its traceback; a hang fails the test within ``timeout`` seconds.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_workers: list[tuple[Any, Connection]] = []


def _serve(pipe: Connection, root: str) -> None:
    sys.path.insert(0, root)
    torch.set_num_threads(1)
    mp.set_start_method(None, force=True)  # loaders start their processes as anywhere else, not as this one was
    while True:
        task = pipe.recv()
        if task is None:
            return
        fn, rank, world_size, args, store, timeout = task
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            try:
                dist.barrier()  # a rank that is done while others still connect to each other would break that off
                result = (True, fn(rank, world_size, *args))
            finally:
                dist.destroy_process_group()
        except BaseException:
            result = (False, traceback.format_exc())
        pipe.send(result)


def _stop() -> None:
    for process, _ in _workers:
        process.kill()
        process.join()
    _workers.clear()


atexit.register(_stop)


def _grow(world_size: int) -> None:
    context = mp.get_context("spawn")
    while len(_workers) < world_size:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, os.getcwd()))  # no daemon: those may have no loaders
        process.start()
        there.close()
        _workers.append((process, here))


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` on ``world_size`` gloo ranks; results in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), or did not answer in time.
    """
    _grow(world_size)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        for rank in range(world_size):
            _workers[rank][1].send((fn, rank, world_size, args, store, timeout))
        pending = {_workers[rank][1]: rank for rank in range(world_size)}
        results: list[Any] = [None] * world_size
        deadline = time.monotonic() + timeout + 10  # the first use also imports
        failure = ""
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = sorted(pending.values())
                _stop()
                raise AssertionError(failure or f"ranks {stuck} hung for {timeout} s")
            for pipe in ready:
                rank = pending.pop(pipe)  # type: ignore[index, arg-type]
                try:
                    done, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:  # the process died without a word
                    _stop()
                    raise AssertionError(f"rank {rank} died") from None
                results[rank] = value
                if not done and not failure:
                    failure = f"rank {rank} raised:\n{value}"
                    deadline = min(deadline, time.monotonic() + 10)  # its peers may wait for it in vain
        if failure:
            raise AssertionError(failure)
    return results
