"""The end of a run by a signal: its state is saved, and the same command goes on from there. Torch-free."""

from __future__ import annotations

__all__ = ["Stopped"]


class Stopped(RuntimeError):
    """A signal asked for the end, and the run stopped between two steps with its state on disk.

    Args:
        signal_name: such as ``"SIGUSR2"``.
        where: what is saved, for the user: "step 57 of 100 is saved in output/run".
    """

    def __init__(self, signal_name: str, where: str) -> None:
        super().__init__(f"stopped by {signal_name}: {where}; the same command with --resume goes on from there")
        self.signal_name = signal_name
        self.where = where
