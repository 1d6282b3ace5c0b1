"""Where all ranks stop after a signal to any of them.

They tell each other through the store of the process group: it works beside any backend, a look costs
microseconds, and a rank that looks waits for nobody. No collective is involved, so none can be left half done.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from leakfree.distributed import broadcast_object, get_rank, get_world_size, is_distributed
from leakfree.training.logs import track
from leakfree.training.stopping import StopAsked, received

__all__ = ["Agreement"]

_PATIENCE = 30.0  # seconds that a rank waits for others before it lets a chance to stop go by
_FAREWELL = 10.0  # seconds that rank 0, which may hold the store, waits until all have read that they stop


class Agreement:
    """One for each session of a run; every rank makes it and goes through the same steps and evaluations.

    A run is a row of stretches, parted by meetings: training, one loop of an evaluation, training... The first rank
    that has heard a signal names a place in the present stretch, at which, or after which, all stop:

    - in training a step. It is told before this rank takes part in the step's exchange of gradients, and no rank comes
      to the step's end without that exchange. So all have read it there, and stop after the same step. On GPUs a rank
      only orders the exchange, and may be at the step's end before others have: see ``ahead``.
    - in an evaluation a batch. Where ranks exchange something in every batch, the same holds. Where they do not, some
      have fewer batches and are waiting in the meeting at the loop's end, where the others join them.

    Args:
        ahead: by how many steps a rank may be ahead of the last exchange that all have taken part in: 0 where it waits
            for each, 1 on GPUs, where the look at the loss of the next step waits for the exchange of this one. So much
            later is the place that is named.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._ahead = ahead
        self._store: dist.Store | None = None
        if is_distributed():
            name = broadcast_object(uuid.uuid4().hex)  # a process group may see several runs
            self._store = dist.PrefixStore(f"leakfree/stop/{name}", _store_of_all_ranks())
        self._stretch = 0
        self._told: tuple[str, tuple[float, float]] | None = None  # the signal, and the (stretch, index) to stop at

    def before_exchange(self, step: int) -> None:
        """This rank has not yet given its gradients to ``step``."""
        self._tell(step)

    def after_step(self, step: int) -> str:
        """The signal for which training ends after ``step``, on every rank; "" = it goes on."""
        signal_name = self._stops_at(step)
        if not signal_name:
            self._tell(step + 1)
        return signal_name

    def track(self, batches: Iterable[Any], what: str) -> Iterable[Any]:
        """:func:`leakfree.training.logs.track`, left at the next batch when a rank was signalled.

        Raises:
            StopAsked: on every rank alike, where it asks for the next batch.
        """
        self.meet()
        met = False
        try:
            for index, batch in enumerate(track(batches, what)):
                if not met and self._stops_at(index):
                    met = True
                    self.meet()
                self._tell(index + 1)
                yield batch
            if not met:
                met = True
                self.meet()
        finally:
            if not met:  # left early, or failed: nobody need wait for this rank
                self._arrive("go")
                self._stretch += 1

    def meet(self) -> None:
        """Wait until all ranks are here; if one was signalled, all stop.

        Raises:
            StopAsked: on every rank or on none.
        """
        if self._store is None:
            if received():
                raise StopAsked(received())
            return
        self._tell(0)
        self._arrive()
        verdict = f"verdict {self._stretch}"
        deadline, pause = time.monotonic() + _PATIENCE, 0.001
        while not self._store.check([verdict]):
            self._tell(0)
            if time.monotonic() > deadline:
                self._store.compare_set(verdict, "", "go")
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        self._stretch += 1
        signal_name = self._store.get(verdict).decode()
        if signal_name != "go":
            self._take_leave(self._store)
            raise StopAsked(signal_name)

    # ---------------------------------------------------------------------------------- the store

    def _tell(self, index: int) -> None:
        """If this rank was signalled, and none before it: all stop at ``index`` of this stretch."""
        if self._store is not None and self._told is None and received():
            self._store.compare_set("stop", "", f"{received()} {self._stretch} {index + self._ahead}")

    def _stops_at(self, index: float) -> str:
        if self._store is None:
            return received()
        if self._told is None and self._store.check(["stop"]):
            signal_name, stretch, first = self._store.get("stop").decode().split()
            self._told = signal_name, (int(stretch), int(first))
        return self._told[0] if self._told and (self._stretch, index) >= self._told[1] else ""

    def _arrive(self, verdict: str = "") -> None:
        """Be counted in the meeting at the end of this stretch; the last one decides.

        The first verdict stands, so that all ranks go on or all stop.
        """
        if self._store is not None and self._store.add(f"arrived {self._stretch}", 1) == get_world_size():
            found = verdict or self._stops_at(math.inf) or "go"
            self._store.compare_set(f"verdict {self._stretch}", "", found)

    def _take_leave(self, store: dist.Store) -> None:
        store.add("left", 1)
        deadline = time.monotonic() + _FAREWELL
        while get_rank() == 0 and store.add("left", 0) < get_world_size() and time.monotonic() < deadline:
            time.sleep(0.01)


def _store_of_all_ranks() -> dist.Store:
    """A connection of its own where there can be: another thread may wait for a key in the shared one."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store  # since torch 2.8
