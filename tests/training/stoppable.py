"""leakfree's command line, which is sent signals at the moment that the variable STRIKE names: "moment|target|signals".

Moments: "loading", "forward N" and "update N" (before and after the ranks exchange the gradients of step N), "save N",
"validation", "evaluation" (after their first batch), "leaving" (all is done, the process is about to end).
Targets: "parent" (who supervises the ranks), "rank N" (alone), "all" (each process of the run, loaders too).
"""

import atexit
import os
import subprocess
import sys
from pathlib import Path

from leakfree import cli

WHEN, TARGET, SIGNALS = (os.environ.get("STRIKE") or "||").split("|")


def _parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def tree(top):
    """``top`` and all that descend from it."""
    found = [top]
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            if _parent_of(pid) in found:
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return found


def strike(moment):
    if moment != WHEN:
        return
    rank = int(os.environ.get("RANK", 0))
    if rank != (int(TARGET.split()[1]) if TARGET.startswith("rank") else 0):
        return
    alone = "RANK" not in os.environ or "JOINED" in os.environ
    top = os.getpid() if alone else os.getppid()
    targets = [top] if TARGET == "parent" else [os.getpid()] if TARGET.startswith("rank") else tree(top)
    for name in SIGNALS.split():  # by another process: a loader's process does end when its rank asks it to
        subprocess.run(["kill", "-s", name.removeprefix("SIG"), *map(str, targets)], check=False)


def _struck(batches, moment):
    for number, batch in enumerate(batches):
        yield batch
        if number == 0:
            strike(moment)


def _arm():
    """Wrap what happens at the moment; in the ranks, which import this file too."""
    from leakfree.training import saving
    from leakfree.training.detection import DetectionTask
    from leakfree.training.module import TrainingModule

    steps = {"done": 0}

    def wrap(owner, name, before=None, after=None):
        real = getattr(owner, name)

        def wrapped(self, *args, **options):
            if before is not None:
                before(self)
            result = real(self, *args, **options)
            if after is not None:
                after(self)
            return result

        setattr(owner, name, wrapped)

    wrap(DetectionTask, "__init__", after=lambda _: strike("loading"))
    wrap(TrainingModule, "training_step", after=lambda module: strike(f"forward {module.global_step + 1}"))
    wrap(TrainingModule, "optimizer_step", after=lambda module: strike(f"update {module.global_step + 1}"))
    real_write = saving.write_checkpoint

    def write(content, path):
        steps["done"] = content["global_step"]
        strike(f"save {steps['done']}")
        real_write(content, path)
        strike(f"save {steps['done']}")

    saving.write_checkpoint = write
    for name, moment in (("validate", "validation"), ("evaluate", "evaluation")):
        real = getattr(DetectionTask, name)

        def watched(self, track, real=real, moment=moment):
            return real(self, lambda batches, what: _struck(track(batches, what), moment))

        setattr(DetectionTask, name, watched)


if WHEN and WHEN != "leaving":
    _arm()

if __name__ == "__main__":
    if "JOINED" in os.environ:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    code = cli.main()
    strike("leaving")
    atexit.register(strike, "leaving")
    sys.exit(code)
