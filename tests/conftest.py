"""One thread per process, so that tests beside each other do not fight for cores; `gpu` tests skip without one.

Hypothesis draws the same examples at each run, so that a failure in CI is one that can be repeated; look further with
`pytest --hypothesis-profile=default`. Single examples may be slow by chance: they have no deadline.

`slow` tests run by default; leave them out with `pytest -m "not slow"`. `long` ones, whose point a shorter test makes
too, only run with `pytest --long`. `make test` runs those that are `alone` one by one, after the others side by side.
"""

import os
import signal

import pytest
from hypothesis import settings

from leakfree.config import load_config

settings.register_profile("leakfree", derandomize=True, deadline=None)
settings.load_profile("leakfree")

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported, also by child processes
    os.environ.setdefault(name, "1")


# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: runs with --long"))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture
def make_config(config_file, tmp_path):
    """``make_config("run", "seed=1")``: the folder's ``config_file``, written to ``tmp_path / "run"``."""

    def make(name="run", *overrides):
        return load_config(config_file, [f"output_dir={tmp_path / name}", *overrides])

    return make
