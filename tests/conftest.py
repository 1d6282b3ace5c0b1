"""One thread per process, so that tests beside each other do not fight for cores; `gpu` tests skip without one.

`slow` tests run by default; leave them out with `pytest -m "not slow"`.
"""

import os

import pytest

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported, also by child processes
    os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
