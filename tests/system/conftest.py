"""Fixtures of the system tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import Shell
from tests.conftest import S3Server
from tests.system.ray_cluster import RayCluster
from tests.toy_run import LONG, SMOKE, losses


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, once: Callable[..., Any]) -> dict[int, float]:
    """Losses of the long toy run that nobody interrupts, made on this machine without a scheduler."""

    def make() -> dict[int, float]:
        folder = tmp_path_factory.mktemp("whole")
        root = f"file://{folder}/store"
        return losses(root, Shell(folder).submit("demo", *SMOKE, LONG, "--launcher", "local", "--store", root))

    return {int(step): loss for step, loss in once("whole", make).items()}


@pytest.fixture
def s3_server(ceph: S3Server) -> S3Server:
    """Behind `bucket` stands a real server in these tests, which also costs a run less than one in Python."""
    return ceph


@pytest.fixture(scope="session")
def ray_cluster(ceph: S3Server) -> Iterator[RayCluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: it holds sockets
    cluster = RayCluster(folder, NO_PROXY="127.0.0.1,127.0.0.2,127.0.0.3,localhost", **ceph.env)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ray(ray_cluster: RayCluster) -> RayCluster:
    """Two nodes with one CPU each, which know how to reach the store; whoever submits does not hand that on."""
    ray_cluster.mend()
    return ray_cluster
