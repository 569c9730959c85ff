"""`make bench CHECKPOINT=1`: what saving costs training, and how it compares with saving in the loop and to DeepSpeed.

Two gloo ranks with the real engine and courier save to a real S3 server on this machine: a Ceph gateway, or moto where
Debian's packages are missing. Every arm is measured once a round, each round in another order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.bucket import S3Store
from core.checkpoint import newest, restore
from core.comm import Comm
from core.config import Train
from core.courier import Courier, Delivery
from core.engine import Engine
from core.manifest import Manifest, Position
from core.methods.base import Batch
from core.retention import Policy
from core.snapshot import pieces
from core.spool import Spool
from jobs.bench import RESULTS
from jobs.table import table
from tests.conftest import TOOLS, make_bucket
from tests.ranks import free_port, run_ranks

WORLD, WARM, ROUNDS, STEPS = 2, 2, 9, 8
WIDTH, LAYERS = 1000, 24  # 24 M parameters: 144 MB of state on each of two ranks
CEPH = ("radosgw", "ceph-mon", "ceph-osd")
Samples = dict[str, list[float]]
SETTINGS = Train(batch=32, micro_batch=16, lr=1e-3, clip=0.0, precision="fp32")


# ---- servers


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[str, str]]:
    """What serves S3, in words, and the name of a bucket; the environment tells clients how to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost", AWS_EC2_METADATA_DISABLED="true")
    missing = [name for name in CEPH if not shutil.which(name)]
    if missing:
        print(f"no {', '.join(missing)} here (apt-get install -y radosgw ceph-mon ceph-osd): measuring against moto")
    with moto() if missing else ceph(folder) as (name, env):
        os.environ.update(env)
        yield name, make_bucket(env)


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        up = [TOOLS / "s3-up", folder, "--until", str(os.getpid()), "--gib", "32"]
        subprocess.run(up, check=True, timeout=180, stdout=subprocess.DEVNULL)
        words = shlex.split((folder / "env").read_text())
        yield "Ceph gateway", dict(word.split("=", 1) for word in words if "=" in word)
    finally:
        subprocess.run([TOOLS / "s3-down", folder, "--purge"], check=True, timeout=60, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def moto() -> Iterator[tuple[str, dict[str, str]]]:
    """In a process of its own."""
    port = free_port()
    keys = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield "moto", env
    finally:
        process.kill()
        process.wait()


# ---- on the ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, batch: Batch) -> torch.Tensor:
        x = batch.views["x"]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Timed(S3Store):
    """Notes when the upload of a part begins and ends, and keeps the newest part's bytes for the bare transfer."""

    span = (0.0, 0.0)
    copy: Path

    def put_file(self, key: str, path: Path) -> None:
        if not key.endswith(".safetensors"):
            return super().put_file(key, path)
        self.copy.unlink(missing_ok=True)
        os.link(path, self.copy)
        began = time.monotonic()
        super().put_file(key, path)
        self.span = began, time.monotonic()
        return None


@dataclass
class Bench:
    """One rank's engine and courier, and what each arm took. Times of `span`s can be compared between ranks."""

    uri: str
    folder: Path
    samples: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.comm, self.engine = Comm(torch.device("cpu")), engine(WORLD)
        self.store = Timed(self.uri)
        self.store.copy = self.folder / f"part-{self.comm.rank}"
        spool = Spool(str(self.folder), self.store)
        self.courier = Courier(self.store, spool, self.comm.rank, 0, Policy(keep=10**6))
        self.number = 0

    def note(self, name: str, value: Any) -> None:
        self.samples.setdefault(name, []).append(value)

    def step(self) -> float:
        began = time.perf_counter()
        x = torch.full((SETTINGS.micro_batch, WIDTH), 0.1 * (1 + self.comm.rank))
        self.engine.backward(self.engine.forward(Batch({"x": x})).square().mean())
        self.engine.step(lambda scale: SETTINGS.lr * scale)
        return time.perf_counter() - began

    def save(self) -> Delivery:
        """As `Attempt.save` does."""
        self.number += 1
        place, shapes = Position("main", self.number, self.number, False), self.engine.shapes
        manifest = Manifest(place, "bench", 0, 1, WORLD, 1, self.engine.adam_step, time.time(),
                            {name: list(shape) for name, shape in shapes.items()})  # fmt: skip
        return self.courier.save(manifest, pieces(self.engine, {}, self.comm), None)

    def in_the_loop(self) -> None:
        began = time.perf_counter()
        self.save()
        self.courier.wait(300)
        self.note("stall in the loop", time.perf_counter() - began)
        self.note("upload", self.store.span)

    def beside(self) -> None:
        """Save, and train on until all ranks' parts are there."""
        began = time.perf_counter()
        self.save()
        self.note("stall", time.perf_counter() - began)
        began, busy = time.perf_counter(), []
        while self.comm.max(torch.tensor(float(self.courier.pending > 0))).item():
            busy.append(self.step())
        self.note("step during upload", statistics.mean(busy))
        self.note("on its way", time.perf_counter() - began)

    def steps(self) -> None:
        self.note("step alone", statistics.mean(self.step() for _ in range(STEPS)))

    def bare(self) -> None:
        """boto3 as it comes, of the bytes that the courier uploaded last."""
        import boto3

        client, bucket = boto3.client("s3"), self.store.bucket
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        self.comm.barrier()
        began = time.monotonic()
        client.upload_file(str(self.store.copy), bucket, f"bare/{self.comm.rank}")
        self.note("bare upload", (began, time.monotonic()))

    def deepspeed(self) -> None:
        shutil.rmtree(self.folder / "ds" / "last", ignore_errors=True)
        self.comm.barrier()
        began = time.perf_counter()
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        self.engine.ds.save_checkpoint(str(self.folder / "ds"), tag="last", client_state=info)
        self.note("DeepSpeed's save", time.perf_counter() - began)


def engine(world: int) -> Engine:
    module, settings = Net(), Train(**{**vars(SETTINGS), "batch": SETTINGS.micro_batch * world})
    groups = [{"params": list(module.parameters()), "names": [n for n, _ in module.named_parameters()],
               "weight_decay": 0.01}]  # fmt: skip
    return Engine(module, groups, settings, zero_stage=1, world=world, per_parameter_clip=False,
                  device=torch.device("cpu"))  # fmt: skip


def measure(uri: str, folder: Path) -> tuple[dict[str, list[Any]], int]:
    """Samples of this rank, and the bytes of its part."""
    bench = Bench(uri, folder)
    bench.step()
    arms = [bench.in_the_loop, bench.steps, bench.bare, bench.beside, bench.deepspeed]
    for number in range(WARM + ROUNDS):
        if number == WARM:
            bench.samples.clear()
        turn = number % len(arms) if number >= WARM else 0
        for arm in arms[turn:] + arms[:turn]:
            bench.comm.barrier()
            arm()
    bench.courier.close()
    return bench.samples, bench.store.copy.stat().st_size


def resume(uri: str) -> list[float]:
    """Seconds in which one rank finds, verifies and restores what two have written."""
    comm, own, store, taken = Comm(torch.device("cpu")), engine(1), S3Store(uri), []
    for _ in range(WARM + ROUNDS):
        began = time.perf_counter()
        manifest = newest(store, verify=comm)
        assert manifest is not None
        verified = time.perf_counter()
        restore(store, manifest, own)
        taken.append((verified - began, time.perf_counter() - verified))
    return taken[WARM:]


def convert(folder: Path) -> float:
    from deepspeed.checkpoint import ds_to_universal

    given = argparse.Namespace(
        input_folder=str(folder / "ds" / "last"), output_folder=str(folder / "ds" / "universal"), num_extract_workers=2,
        num_merge_workers=2, keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    shutil.rmtree(given.output_folder, ignore_errors=True)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        began = time.perf_counter()
        ds_to_universal.main(given)
        return time.perf_counter() - began
