"""A real two-node Slurm cluster for the tests of this folder."""

import pytest

from tests.launch.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def here(cluster, monkeypatch):
    """The cluster, as commands of this process see it."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster
