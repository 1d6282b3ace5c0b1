"""A training that does nothing but stop as a real one does: what the requeueing of a job is tested with."""

import os
import signal
import sys
import threading
import time

from leakfree.launch.job import Training
from leakfree.training import Stopped, watchdog
from leakfree.training.endings import AWAY, Ending


class Stopping(Training):
    """Runs until a signal; a job that was restarted ``STAND_IN_STARTS`` times is done at once."""

    def start(self, config):
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        print(f"start {restarts} of rank {os.environ['RANK']}", flush=True)
        if restarts >= int(os.environ.get("STAND_IN_STARTS", "1")):
            return
        came = []
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, lambda number, frame: came.append(signal.Signals(number).name))
        if "STAND_IN_DEAF" in os.environ:
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        while not came:
            time.sleep(0.05)
        time.sleep(float(os.environ.get("STAND_IN_SAVES", "0.5")))  # the other rank's signal has come too
        raise Stopped(came[0], "step 3 of 6 is saved in output/run")


class Late(Training):
    """Rank 1 never gets to the preflight."""

    def __call__(self):
        if os.environ["SLURM_PROCID"] == "1":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit lets it pass
            time.sleep(600)
        return super().__call__()


class Broken(Training):
    """Rank 1 fails with a traceback, rank 0 waits for it for ever."""

    def start(self, config):
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("the loss of rank 1")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)


class LostMachine(Training):
    """Rank 0 hears that the machine of rank 1 does not answer: in its work at the first start, then by its watchdog."""

    def start(self, config):
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        print(f"start {restarts} of rank {os.environ['RANK']}", flush=True)
        ending = Ending(1, AWAY, "rank 1 on n2 does not answer any more")
        if restarts > 1:
            return
        if os.environ["RANK"] == "0" and restarts == 0:
            raise ending.error()
        if os.environ["RANK"] == "0":  # what the watchdog does when the work is stuck in a collective
            threading.Thread(target=lambda: [tidy(ending) for tidy in reversed(watchdog._tidying)]).start()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(600)


class Unlucky(Training):
    """The first of its runs fails in a way that nobody expected."""

    def start(self, config):
        if config.seed == 0:
            raise ZeroDivisionError("a library's fault")
        super().start(config)


class PrivateFolder(Training):
    """Rank 1 sees a file system of its own where the output folder is, as on a machine that does not share it."""

    def __call__(self):
        if os.environ["SLURM_PROCID"] == "1":
            import ctypes

            libc = ctypes.CDLL(None, use_errno=True)
            place = os.environ["STAND_IN_FOLDER"].encode()
            clone_new_namespace, private_recursive = 0x20000, 0x44000
            for done in (
                libc.unshare(clone_new_namespace),
                libc.mount(None, b"/", None, private_recursive, None),
                libc.mount(b"none", place, b"tmpfs", 0, None),
            ):
                if done != 0:
                    sys.exit(f"no private mount here: {os.strerror(ctypes.get_errno())}")
        return super().__call__()
