"""Runs commands one after the other in this process, and watches what they do.

Talks JSON lines with :mod:`tests.fuzz.pool`: a request has ``argv``, ``cwd``, ``writes`` and ``secret``; the answer
has the exit ``code`` (None after an exception), both streams, and ``deeds``: what no command may do.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

_MEMORY = 3 << 30  # bytes of address space that cases may take beyond what the libraries hold
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.startfile")
# Of these, those of a link are of itself, and not of what it leads to.
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_CONNECTIONS = ("socket.connect", "socket.bind")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """An audit hook: notes programs that are started, unpickled names, and files changed outside ``writes``."""

    def __init__(self) -> None:
        self.armed = False
        self.writes: list[str] = []
        self.secret = ""
        self.deeds: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in _PROGRAMS or event in _CONNECTIONS or event == "pickle.find_class":
            self._note(f"{event}: {args!r:.200}")
        elif event == "import" and str(args[0]).startswith("leakfree_canary"):
            self._note(f"import of {args[0]}")
        elif event == "open":
            path, mode, flags = args
            if self.secret and self._real(path) == self.secret:
                self._note(f"read {self.secret}")
            elif (flags or 0) & _WRITING or set(mode or "") & set("wax+"):
                self._changed(event, path)
        elif event in _CHANGES:
            folder = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
            for path in args[: 2 if event in ("os.rename", "os.link") else 1]:
                self._changed(event, path, folder)
            if event == "os.symlink":
                self._changed(event, args[1])

    def _changed(self, event: str, path: Any, folder: Any = -1) -> None:
        real = self._real(path, folder, follow=event in ("open", "os.truncate", "os.chmod"))
        if event == "os.mkdir" and os.path.lexists(real):
            return  # which fails, and so is how one asks whether there is a folder
        inside = any(real == allowed or real.startswith(allowed + os.sep) for allowed in self.writes)
        if real and not inside:
            self._note(f"{event}: {real}")

    def _real(self, path: Any, folder: Any = -1, *, follow: bool = True) -> str:
        if isinstance(path, int) or path is None:  # a file that was opened before
            return ""
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            text = os.path.join(f"/proc/self/fd/{folder}", text)
        if "\0" in text:
            return ""
        armed, self.armed = self.armed, False
        try:
            if follow:
                return os.path.realpath(text)
            parent, name = os.path.split(text.rstrip(os.sep))
            return os.path.join(os.path.realpath(parent), name)
        finally:
            self.armed = armed

    def _note(self, deed: str) -> None:
        self.deeds.append(deed)


def _warm(made: Path) -> None:
    """Import, once and unwatched, what commands import."""
    from leakfree.cli import main
    from tests.fuzz.place import SHORT
    from tests.fuzz.soundness import TASKS

    for task in TASKS:
        folder = Path.cwd() / f"warm_{task}"
        line = ["--config-file", str(made / f"{task}.yaml"), f"output_dir={folder}", *SHORT]
        assert main(["train", *line]) == 0
        assert main(["check", *line]) == 0
    assert main(["compare", str(folder), "-o", str(folder / "report.html")]) == 0
    output = str(folder / "backbone.pt")
    assert main(["export", str(made / "exported"), "--format", "torchvision", "-o", output]) == 0


def _run(request: dict[str, Any], watch: Watch) -> dict[str, Any]:
    from leakfree.cli import main

    os.chdir(request["cwd"])
    os.environ["HOME"] = request["cwd"]
    watch.writes, watch.secret, watch.deeds = request["writes"], request["secret"], []
    answer: dict[str, Any] = {"code": None, "problem": ""}
    watch.armed = True
    try:
        answer["code"] = main(request["argv"])
    except BaseException:
        watch.armed = False
        answer["problem"] = traceback.format_exc()
    finally:
        watch.armed = False
    answer["deeds"] = list(dict.fromkeys(watch.deeds))
    return answer


def serve(requests: TextIO, answers: TextIO, made: Path) -> None:
    _warm(made)
    watch = Watch()
    sys.addaudithook(watch)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, resource.RLIM_INFINITY))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        print(json.dumps(_captured(request, watch)), file=answers, flush=True)


def _captured(request: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """The answer, with what was written to the two streams, by Python or by C."""
    places = [Path(request["cwd"]).parent / name for name in ("stdout", "stderr")]
    for number, place in enumerate(places, start=1):
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    answer = _run(request, watch)
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir("/")
    answer["stdout"], answer["stderr"] = (place.read_text(errors="replace") for place in places)
    for place in places:
        place.unlink()
    return answer


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")  # file 1 is the commands' own
    os.dup2(2, 1)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    serve(sys.stdin, channel, Path(sys.argv[1]))
