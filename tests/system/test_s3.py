"""The store against a real S3 server, a Ceph gateway: what is pinned on moto, and outages that moto cannot have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from core.bucket import S3Store
from core.bucket_client import S3Options
from core.cache import ShardCache
from core.storage import AccessDenied, Store, crc32c, open_store
from tests.conftest import TOOLS, Ceph, start_ceph
from tests.core.test_bucket import BucketBehaviour, quick  # noqa: F401 (a fixture)
from tests.core.test_storage import StoreBehaviour, each_operation, keys

pytestmark = pytest.mark.system
IMPATIENT = S3Options(attempts=8, read_timeout_s=1.0)


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """One of these tests' own: they freeze, stop and kill it."""
    found = start_ceph(Path(tempfile.mkdtemp(prefix="s3-")), os.getpid())
    yield found
    subprocess.run([TOOLS / "s3-down", found.folder, "--purge"], check=True, timeout=60)


@pytest.fixture
def store(bucket: str) -> Store:
    return open_store(bucket)


class TestGateway(StoreBehaviour):
    pass


class TestGatewayBehindFaults(BucketBehaviour):
    pass


def test_listing_goes_past_a_thousand_keys(store: Store) -> None:
    names = [f"{i:04d}" for i in range(1005)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert keys(store) == names
    assert keys(store, after="0999") == names[1000:]


def test_eight_processes_have_one_winner(store: Store) -> None:
    with get_context("fork").Pool(8) as pool:
        won = pool.starmap(store.put_if_absent, [("log/0", b"%d" % i) for i in range(8)], chunksize=1)
    assert won.count(True) == 1
    assert store.get("log/0") == b"%d" % won.index(True)


def test_a_frozen_server_is_ridden_out(bucket: str, ceph: Ceph) -> None:
    """Requests reach the frozen process, time out, are repeated, and are all done once it wakes: only one may win."""
    store = S3Store(bucket, IMPATIENT)
    store.put("before", b"1")
    ceph.signal_gateway(signal.SIGSTOP)
    wake = threading.Timer(4, ceph.signal_gateway, [signal.SIGCONT])
    wake.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            put = pool.submit(store.put, "x", b"2")
            assert store.put_if_absent("log/0", b"mine") is True
            put.result()
    finally:
        wake.join()
    assert store.put_if_absent("log/0", b"mine") is False
    assert keys(store) == ["before", "log/0", "x"]


def test_a_wrong_secret_is_access_denied(bucket: str, aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        aws_env.setenv(name, "wrong")
        store = open_store(bucket)
        for use in (*each_operation(store, tmp_path), lambda store=store: keys(store)):
            with pytest.raises(AccessDenied, match="gives no access"):
                use()


def test_somebody_elses_bucket_is_access_denied(
    bucket: str, ceph: Ceph, aws_env: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    command = ["radosgw-admin", "-c", str(ceph.folder / "ceph.conf"), "user", "create", "--uid", "stranger"]
    made = subprocess.run([*command, "--display-name", "stranger"], check=True, timeout=60, capture_output=True)
    stranger = json.loads(made.stdout)["keys"][0]
    aws_env.setenv("AWS_ACCESS_KEY_ID", stranger["access_key"])
    aws_env.setenv("AWS_SECRET_ACCESS_KEY", stranger["secret_key"])
    store = open_store(bucket)
    for use in (*each_operation(store, tmp_path), lambda: keys(store)):
        with pytest.raises(AccessDenied, match="AccessDenied.*rights"):
            use()


def test_shards_are_cached_from_a_real_server(store: Store, tmp_path: Path) -> None:
    data = os.urandom(20 << 20)  # more than one part
    store.put("shard", data)
    path = ShardCache(tmp_path / "cache", 1 << 30).fetch(store, "shard", len(data), crc32c(data))
    assert path.read_bytes() == data


def test_a_restart_keeps_port_keys_and_data(store: Store, ceph: Ceph) -> None:
    store.put("before", b"1")
    up = [TOOLS / "s3-up", ceph.folder, "--until", str(os.getpid())]
    twice = subprocess.run(up, capture_output=True, text=True, timeout=60)
    assert (twice.returncode, "s3-down first" in twice.stderr) == (1, True)
    assert store.get("before") == b"1"
    subprocess.run([TOOLS / "s3-down", ceph.folder], check=True, timeout=60)
    subprocess.run(up, check=True, timeout=120)
    assert store.get("before") == b"1"


# The last one: for half a minute after it, the server waits for its dead predecessor whenever a user or bucket is made.
def test_a_killed_server_is_waited_for_and_has_lost_nothing(bucket: str, ceph: Ceph) -> None:
    store = S3Store(bucket, IMPATIENT)
    store.put("before", b"1")
    ceph.signal_gateway(signal.SIGKILL)
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(store.put, "during", b"2")
        ceph.start_gateway()
        put.result()
    assert store.get("before") == b"1"
    assert store.get("during") == b"2"
