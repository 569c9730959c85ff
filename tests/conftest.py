"""Fixtures shared by all tests. Each stands alone: add others below under a heading of their own."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.faults import FaultyProxy
from tests.kube_server import KubeServer
from tests.quirky import Quirky, QuirkyServer, serving

pytest_plugins = ["tests.durations"]


def pytest_configure(config: pytest.Config) -> None:
    """Let tests and what they start hear signals, also when nohup or `&` keeps them from whoever started the suite."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
TOOLS = Path(__file__).parent / "tools"

# ---- stores


@dataclass(frozen=True)
class S3Server:
    """An S3 server with an empty bucket: what a client's environment needs."""

    env: dict[str, str]
    bucket: str


@pytest.fixture(scope="session")
def moto() -> Iterator[S3Server]:
    """moto's server in a thread of this process, on a free port of loopback."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    env = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    yield S3Server(env, make_bucket(env))
    server.stop()


@pytest.fixture
def aws_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment in which no setting or credential of the person running the tests is seen."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    return monkeypatch


@pytest.fixture
def s3_server(moto: S3Server) -> S3Server:
    """The server behind `bucket`; a module that tests another one overrides this."""
    return moto


@pytest.fixture
def bucket(s3_server: S3Server, aws_env: pytest.MonkeyPatch) -> str:
    """URI of a fresh prefix in a bucket, with the environment set so that this and child processes can use it."""
    for name, value in s3_server.env.items():
        aws_env.setenv(name, value)
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URI of an empty store, of each kind in turn."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    uri: str = request.getfixturevalue("bucket")
    return uri


@pytest.fixture
def proxy(bucket: str, aws_env: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands between `bucket` and its server in this test; plan faults on it."""
    server = FaultyProxy(os.environ["AWS_ENDPOINT_URL"])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    aws_env.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def quirky(aws_env: pytest.MonkeyPatch, no_waiting: None) -> Iterator[Quirky]:
    """quirky(quirk, ...): an S3 server that lacks these, as the one that the environment names."""
    with ExitStack() as stack:

        def start(*quirks: str) -> QuirkyServer:
            server, url = stack.enter_context(serving(*quirks))
            given = {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "word", "DEFAULT_REGION": "x"}
            for name, value in given.items():
                aws_env.setenv(f"AWS_{name}", value)
            return server

        yield start


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts last no time."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0)
    monkeypatch.setattr("core.bucket.PAUSE_S", 0.0)


def make_bucket(env: dict[str, str], name: str = "test-bucket") -> str:
    import boto3
    from botocore.config import Config

    keys = {"aws_access_key_id": env["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": env["AWS_SECRET_ACCESS_KEY"]}
    where = {"endpoint_url": env["AWS_ENDPOINT_URL"], "region_name": env["AWS_DEFAULT_REGION"]}
    boto3.client("s3", **where, **keys, config=Config(proxies={})).create_bucket(Bucket=name)
    return name


@dataclass(frozen=True)
class Ceph(S3Server):
    """A Ceph gateway of our own, which tests may freeze and kill."""

    folder: Path

    def signal_gateway(self, number: signal.Signals) -> None:
        os.kill(int((self.folder / "run" / "client.rgw.pid").read_text()), number)

    def start_gateway(self) -> None:
        subprocess.run(["radosgw", "-c", str(self.folder / "ceph.conf"), "-n", "client.rgw"], check=True, timeout=60)


def need(programs: tuple[str, ...], packages: str) -> None:
    """Skip without these programs of Debian packages, except where CI=true."""
    if not all(shutil.which(name) for name in programs) or os.getuid():
        reason = f"it needs root, and apt-get install -y --no-install-recommends {packages}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def start_ceph(folder: Path, until: int) -> Ceph:
    """A new gateway, which ends and leaves nothing behind when the process `until` has gone.  folder: its name must be
    short, for it holds sockets."""
    need(("radosgw", "ceph-mon", "ceph-osd"), "radosgw ceph-mon ceph-osd")
    subprocess.run([TOOLS / "s3-up", folder, "--until", str(until)], check=True, timeout=180)
    return find_ceph(folder)


def find_ceph(folder: Path) -> Ceph:
    words = shlex.split((folder / "env").read_text())
    env = dict(word.split("=", 1) for word in words if "=" in word)
    return Ceph(env, make_bucket(env, f"test-{os.getpid()}"), folder)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str, Callable[[], Any]], Any]:
    """once(name, make): what `make` returns, as JSON has it, made by the first of the processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == "master" else base.parent

    def once(name: str, make: Callable[[], Any]) -> Any:
        note = folder / f"{name}.json"
        with FileLock(folder / f"{name}.lock"):
            if not note.is_file():
                note.write_text(json.dumps(make()))
            return json.loads(note.read_text())

    return once


@pytest.fixture(scope="session")
def ceph(once: Callable[[str, Callable[[], Any]], Any], worker_id: str) -> Ceph:
    """A real S3 server on disk, one for all processes that run tests side by side. Who freezes or kills one has their
    own."""
    controller = os.getpid() if worker_id == "master" else os.getppid()
    folder = once("ceph", lambda: str(start_ceph(Path(tempfile.mkdtemp(prefix="s3-")), controller).folder))
    return find_ceph(Path(folder))


# ---- schedulers


@dataclass(frozen=True)
class Slurm:
    """A SLURM of our own: two nodes with an address each, accounting, and partitions main, high, short and closed."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def processes(self, node: int) -> list[int]:
        """Everything that runs on a node."""
        space = f"{(self.folder / 'bridge').read_text()}-rn{node}"
        return [int(pid) for pid in self.run("ip", "netns", "pids", space).split()]

    def kill_node(self, node: int) -> None:
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, node: int) -> None:
        subprocess.run([TOOLS / "slurm-up", self.folder, "--node", str(node)], check=True, timeout=60)

    def clear(self) -> None:
        """End all jobs and wait until none is left."""
        self.run("scancel", "--user=root")
        end = time.monotonic() + 60
        while self.run("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.2)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Slurm]:
    """Skipped where it cannot be brought up, except where CI=true."""
    need(("slurmctld", "slurmdbd", "mariadbd", "ip"), "slurm-wlm munge slurmdbd mariadb-server iproute2")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        subprocess.run([TOOLS / "slurm-up", folder, "--until", str(os.getpid())], check=True, timeout=180)
        yield Slurm(folder)
    finally:
        subprocess.run([TOOLS / "slurm-down", folder, "--purge"], check=True, timeout=60)


@pytest.fixture
def slurm(slurm_cluster: Slurm) -> Iterator[Slurm]:
    """The cluster without jobs, before and after."""
    yield slurm_cluster
    slurm_cluster.clear()


PODS = """
image: registry.example.org/retort:test
tasks_per_node: 1
mem_gb: 4
kubernetes: {namespace: ml, secrets: [store]}
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeServer]:
    """A Kubernetes API server, to which its `kubeconfig` leads; `ml.yaml` in the test's folder is a cluster file."""
    (tmp_path / "ml.yaml").write_text(PODS)
    with KubeServer(tmp_path) as server:
        yield server
