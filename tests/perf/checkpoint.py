"""`make bench CHECKPOINT=1`: what saving costs training, beside saving in the loop, a bare upload, and DeepSpeed's own.

Two gloo ranks with the real engine and courier save to a real S3 server on this machine: a Ceph gateway, or moto where
Debian's packages are missing. Every arm is measured once a round, and rounds begin with different arms.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from core.bucket import S3Store
from core.checkpoint import newest, restore
from core.comm import Comm
from core.config import Train
from core.courier import Courier
from core.engine import Engine
from core.manifest import Manifest, Position
from core.methods.base import Batch
from core.optim import decay_groups
from core.retention import Policy
from core.snapshot import pieces
from core.spool import Spool
from jobs.bench import RESULTS
from jobs.table import table
from tests.conftest import TOOLS, make_bucket
from tests.ranks import free_port, run_ranks

WORLD, WARM, ROUNDS, STEPS = 2, 2, 9, 8
WIDTH, LAYERS = 1000, 24  # 24 M parameters: 144 MB of state on each of two ranks
SETTINGS = Train(batch=16 * WORLD, micro_batch=16, lr=1e-3, clip=0.0, precision="fp32")
CPU = torch.device("cpu")
IN_LOOP, BESIDE = "stall of a save in the loop, s", "stall of a save beside training, s"
UPLOAD, BARE = "upload of parts, MB/s", "bare boto3 upload of the same bytes, MB/s"
ALONE, BUSY = "step alone, s", "step while a save is on its way, s"
Span = tuple[float, float]  # begin and end on a clock that all processes of the machine share


@contextmanager
def server(folder: Path) -> Iterator[tuple[str, str]]:
    """What serves S3, in words, and a bucket; the environment tells clients how to reach it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost", AWS_EC2_METADATA_DISABLED="true")
    missing = [name for name in ("radosgw", "ceph-mon", "ceph-osd") if not shutil.which(name)]
    if missing:
        print(f"no {', '.join(missing)} here (apt-get install -y radosgw ceph-mon ceph-osd): measuring against moto")
    with ExitStack() as stack:
        os.environ.update(env := moto(stack) if missing else ceph(stack, folder))
        yield "moto" if missing else "a Ceph gateway", make_bucket(env)


def ceph(stack: ExitStack, folder: Path) -> dict[str, str]:
    quietly = partial(subprocess.run, check=True, timeout=180, stdout=subprocess.DEVNULL)
    stack.callback(quietly, [TOOLS / "s3-down", folder, "--purge"])
    quietly([TOOLS / "s3-up", folder, "--until", str(os.getpid()), "--gib", "32"])
    return dict(word.split("=", 1) for word in (folder / "env").read_text().split() if "=" in word)


def moto(stack: ExitStack) -> dict[str, str]:
    """In a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.kill)
    while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
        time.sleep(0.1)
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}


# ---- on the ranks


class Net(nn.Sequential):
    def forward(self, batch: Batch) -> torch.Tensor:
        return super().forward(batch.views["x"])


def engine(world: int) -> Engine:
    torch.manual_seed(0)
    module = Net(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    groups, settings = decay_groups(module.named_parameters(), 0.01), replace(SETTINGS, batch=16 * world)
    return Engine(module, groups, settings, zero_stage=1, world=world, per_parameter_clip=False, device=CPU)


class Timed(S3Store):
    """Notes when the upload of a part begins and ends, and keeps the newest part's bytes for the bare transfer."""

    span: Span
    copy: Path

    def put_file(self, key: str, path: Path) -> None:
        began = time.monotonic()
        super().put_file(key, path)
        if key.endswith(".safetensors"):
            self.span = began, time.monotonic()
            self.copy.unlink(missing_ok=True)
            os.link(path, self.copy)


class Bench:
    """One rank, and what each arm took."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.comm, self.engine, self.folder = Comm(CPU), engine(WORLD), folder
        self.store = Timed(uri)
        self.store.copy = folder / f"part-{self.comm.rank}"
        self.courier = Courier(self.store, Spool(str(folder), self.store), self.comm.rank, 0, Policy(keep=10**6))
        self.samples, self.saves = dict[str, list[Any]](), 0

    def note(self, name: str, value: float | Span) -> None:
        self.samples.setdefault(name, []).append(value)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.note(name, (began, time.monotonic()))

    def step(self) -> float:
        began = time.monotonic()
        x = torch.full((SETTINGS.micro_batch, WIDTH), 0.1 * (1 + self.comm.rank))
        self.engine.backward(self.engine.forward(Batch({"x": x})).square().mean())
        self.engine.step(lambda scale: SETTINGS.lr * scale)
        return time.monotonic() - began

    def steps(self) -> None:
        self.note(ALONE, statistics.mean(self.step() for _ in range(STEPS)))

    def save(self) -> None:
        """As `Attempt.save` does."""
        self.saves += 1
        shapes = {name: list(shape) for name, shape in self.engine.shapes.items()}
        place = Position("main", self.saves, self.saves, False)
        manifest = Manifest(place, "bench", 0, 1, WORLD, 1, self.engine.adam_step, time.time(), shapes)
        self.courier.save(manifest, pieces(self.engine, {}, self.comm), None)

    def in_the_loop(self) -> None:
        computed = time.process_time()
        with self.span(IN_LOOP):
            self.save()
            self.courier.wait(300)
        self.note("processor time of a save on a rank, s", time.process_time() - computed)
        self.note(UPLOAD, self.store.span)

    def beside(self) -> None:
        """Save, and train on until all ranks' parts are there."""
        busy = []
        with self.span("save beside training until it is committed, s"):
            with self.span(BESIDE):
                self.save()
            while self.comm.max(torch.tensor(float(self.courier.pending > 0))).item():
                busy.append(self.step())
        self.note(BUSY, statistics.mean(busy))

    def bare(self) -> None:
        """boto3 as it comes, and the bytes that the courier uploaded last."""
        import boto3

        client, bucket = boto3.client("s3"), self.store.bucket
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)  # connects
        self.comm.barrier()
        with self.span(BARE):
            client.upload_file(str(self.store.copy), bucket, f"bare/{self.comm.rank}")

    def deepspeed(self) -> None:
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        with self.span("DeepSpeed's blocking save to a local folder, s"):
            self.engine.ds.save_checkpoint(str(self.folder / "ds"), tag="last", client_state=info)


def measure(uri: str, folder: Path) -> tuple[dict[str, list[Any]], int]:
    """Samples of this rank, and the bytes of its part."""
    bench = Bench(uri, folder)
    bench.step()
    arms = [bench.in_the_loop, bench.steps, bench.bare, bench.beside, bench.deepspeed]
    for number in range(-WARM, ROUNDS):
        if number == 0:
            bench.samples.clear()
        turn = max(number, 0) % len(arms)
        for arm in arms[turn:] + arms[:turn]:
            bench.comm.barrier()
            arm()
    bench.courier.close()
    return bench.samples, bench.store.copy.stat().st_size


def resume(uri: str) -> list[float]:
    """Seconds in which one rank verifies and restores what two have written."""
    own, store = engine(1), S3Store(uri)

    def once() -> float:
        began = time.monotonic()
        manifest = newest(store, verify=Comm(CPU))
        assert manifest is not None
        restore(store, manifest, own)
        return time.monotonic() - began

    return [once() for _ in range(WARM + ROUNDS)][WARM:]


def convert(folder: Path) -> float:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(folder / "universal", ignore_errors=True)
    given = SimpleNamespace(input_folder=f"{folder}/ds/last", output_folder=f"{folder}/universal", strict=True,
                            num_extract_workers=WORLD, num_merge_workers=WORLD, keep_temp_folder=False,
                            inject_missing_state=False)  # fmt: skip
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        began = time.monotonic()
        ds_to_universal.main(given)
        return time.monotonic() - began


# ---- what it comes to


def figures(ranks: list[dict[str, list[Any]]], size: int) -> dict[str, list[float]]:
    """Of all rounds: the slower rank's seconds, MB/s of both ranks together, and ratios round by round."""
    rounds = {name: list(zip(*(rank[name] for rank in ranks), strict=True)) for name in ranks[0]}
    found = {name: [rate(both, size) if name in (UPLOAD, BARE) else max(map(seconds, both)) for both in each]
             for name, each in rounds.items()}  # fmt: skip
    pairs = {"times less stall": (IN_LOOP, BESIDE), "upload / bare": (UPLOAD, BARE), "times slower step": (BUSY, ALONE)}
    return found | {name: [a / b for a, b in zip(found[above], found[below], strict=True)]
                    for name, (above, below) in pairs.items()}  # fmt: skip


def seconds(value: float | Span) -> float:
    return value[1] - value[0] if isinstance(value, tuple) else value


def rate(spans: tuple[Span, ...], size: int) -> float:
    """MB/s from the first rank's beginning to the last one's end."""
    return size * len(spans) / 1e6 / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="save-") as name, server(Path(name) / "s3") as (kind, bucket):
        folder, uri = Path(name), f"s3://{bucket}/run"
        (first, size), (second, _) = run_ranks(measure, WORLD, uri, folder, timeout_s=600)
        found = figures([first, second], size)
        found["DeepSpeed's conversion for another world size, s"] = [convert(folder) for _ in range(3)]
        (found["verifying and restoring ours at another world size, s"],) = run_ranks(resume, 1, uri, timeout_s=300)
    device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    head = (f"{WORLD} gloo ranks on {device}, torch {torch.__version__}, ZeRO 1, fp32, {size / 1e6:.0f} MB a rank, S3 "
            f"from {kind} on the same machine, {ROUNDS} rounds taken in turns")  # fmt: skip
    quartiles = {what: statistics.quantiles(values, n=4) for what, values in found.items()}
    rows = [[what, f"{middle:.3g}", f"{low:.3g}..{high:.3g}"] for what, (low, middle, high) in quartiles.items()]
    print(f"{head}\n\n{table(['what', 'median', 'quartiles'], rows)}")
    path = RESULTS / f"checkpoint-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.write_text(json.dumps({"what": head, "quartiles": quartiles, "rounds": found}, indent=1) + "\n")
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
