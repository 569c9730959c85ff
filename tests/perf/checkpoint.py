"""`make bench CHECKPOINT=1`: what saving costs training, beside saving in the loop, a bare upload, and DeepSpeed's own.

Two gloo ranks with the real engine and courier save to an S3 server on this machine: a Ceph gateway, or moto where its
packages are missing. Every arm is measured once a round, and rounds begin with different arms.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import torch
from torch import nn

from core.bucket import S3Store
from core.checkpoint import newest, restore
from core.comm import Comm
from core.courier import Courier
from core.engine import Engine
from core.manifest import Manifest, Position
from core.methods.base import Batch
from core.optim import decay_groups
from core.recipe import Train
from core.retention import Policy
from core.snapshot import pieces
from core.spool import Spool
from jobs.bench import RESULTS
from jobs.table import table
from tests.conftest import TOOLS, make_bucket
from tests.ranks import free_port, run_ranks

WORLD, WARM, ROUNDS, STEPS = 2, 2, 7, 5
WIDTH, LAYERS, IMAGES = 1000, 24, 16  # 24 M parameters: 144 MB of state on each of two ranks
CPU = torch.device("cpu")
IN_LOOP, BESIDE = "stall of a save in the loop, s", "stall of a save beside training, s"
UPLOAD, BARE = "upload of parts, MB/s", "bare boto3 upload of the same bytes, MB/s"
ALONE, BUSY = "step alone, s", "step while a save is on its way, s"


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
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.enter_context(process)
    stack.callback(process.kill)
    while socket.socket().connect_ex(("127.0.0.1", port)) and process.poll() is None:
        time.sleep(0.1)
    return {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}  # fmt: skip


class Net(nn.Sequential):
    def forward(self, batch: Batch) -> torch.Tensor:
        return super().forward(batch.views["x"])


def engine(world: int) -> Engine:
    torch.manual_seed(0)
    module = Net(*[layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    groups = decay_groups(module.named_parameters(), 0.01)
    settings = Train(batch=IMAGES * world, micro_batch=IMAGES, clip=0.0, precision="fp32")
    return Engine(module, groups, settings, zero_stage=1, world=world, per_parameter_clip=False, device=CPU)


class Timed(S3Store):
    """Notes when the upload of a part begins and ends, and keeps the newest part's bytes for the bare transfer."""

    span, copy = (0.0, 0.0), Path()

    def put_file(self, key: str, path: Path) -> None:
        began = time.monotonic()
        super().put_file(key, path)
        if key.endswith(".safetensors"):
            self.span = began, time.monotonic()
            self.copy.unlink(missing_ok=True)
            os.link(path, self.copy)


class Bench:  # one rank, and what each arm took
    def __init__(self, uri: str, folder: Path) -> None:
        self.comm, self.engine, self.folder = Comm(CPU), engine(WORLD), folder
        self.store = Timed(uri)
        self.store.copy = folder / f"part-{self.comm.rank}"
        self.courier = Courier(self.store, Spool(str(folder), self.store), self.comm.rank, 0, Policy(keep=10**6))
        self.samples, self.saves = defaultdict[str, list[Any]](list), 0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.samples[name].append(time.monotonic() - began)

    def step(self) -> float:
        began = time.monotonic()
        x = torch.full((IMAGES, WIDTH), 0.1 * (1 + self.comm.rank))
        self.engine.backward(self.engine.forward(Batch({"x": x})).square().mean())
        self.engine.step(lambda scale: 1e-3 * scale)
        return time.monotonic() - began

    def steps(self) -> None:
        self.samples[ALONE].append(statistics.mean(self.step() for _ in range(STEPS)))

    def save(self) -> None:
        """As `Attempt.save` does."""
        self.saves += 1
        shapes = {name: list(shape) for name, shape in self.engine.shapes.items()}
        manifest = Manifest(Position("main", self.saves, self.saves, False), "bench", 0, 1, WORLD, 1,
                            self.engine.adam_step, time.time(), shapes)  # fmt: skip
        self.courier.save(manifest, pieces(self.engine, {}, self.comm), None)

    def in_the_loop(self) -> None:
        computed = time.process_time()
        with self.timed(IN_LOOP):
            self.save()
            self.courier.wait(300)
        self.samples["processor time of a save on a rank, s"].append(time.process_time() - computed)
        self.samples[UPLOAD].append(self.store.span)

    def beside(self) -> None:
        """Save, and train on until all ranks' parts are there."""
        with self.timed("save beside training until it is committed, s"):
            with self.timed(BESIDE):
                self.save()
            busy = [self.step()]
            while self.comm.max(torch.tensor(float(self.courier.pending > 0))).item():
                busy.append(self.step())
        self.samples[BUSY].append(statistics.mean(busy))

    def bare(self) -> None:
        """boto3 as it comes, and the bytes that the courier uploaded last."""
        client = boto3.client("s3")
        client.list_objects_v2(Bucket=self.store.bucket, MaxKeys=1)  # connects
        self.comm.barrier()
        began = time.monotonic()
        client.upload_file(str(self.store.copy), self.store.bucket, f"bare/{self.comm.rank}")
        self.samples[BARE].append((began, time.monotonic()))

    def deepspeed(self) -> None:
        info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        with self.timed("DeepSpeed's blocking save to a local folder, s"):
            self.engine.ds.save_checkpoint(str(self.folder / "ds"), tag="last", client_state=info)


def measure(uri: str, folder: Path) -> tuple[dict[str, list[Any]], int]:
    """Samples of this rank, and the bytes of its part."""
    bench = Bench(uri, folder)
    bench.step()
    arms = [bench.bare, bench.beside, bench.deepspeed, bench.in_the_loop, bench.steps]  # begins with the fourth
    for number in range(-WARM, ROUNDS):
        for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
            bench.comm.barrier()
            arm()
    bench.courier.close()
    return {name: values[WARM:] for name, values in bench.samples.items()}, bench.store.copy.stat().st_size


def resume(uri: str) -> list[float]:
    """Seconds in which one rank verifies and restores what two have written."""
    own, store, taken = engine(1), S3Store(uri), []
    for _ in range(WARM + ROUNDS):
        began = time.monotonic()
        manifest = newest(store, verify=Comm(CPU))
        assert manifest is not None
        restore(store, manifest, own)
        taken.append(time.monotonic() - began)
    return taken[WARM:]


def convert(folder: Path) -> float:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(folder / "universal", ignore_errors=True)
    given = SimpleNamespace(input_folder=f"{folder}/ds/last", output_folder=f"{folder}/universal", strict=True,
                            num_extract_workers=2, num_merge_workers=2, keep_temp_folder=False,
                            inject_missing_state=False)  # fmt: skip
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        began = time.monotonic()
        ds_to_universal.main(given)
        return time.monotonic() - began


def figures(ranks: list[dict[str, list[Any]]], size: int) -> dict[str, list[float]]:
    """Of all rounds: the slower rank's seconds, MB/s of both ranks together, and ratios round by round."""
    rounds = {name: list(zip(*(rank[name] for rank in ranks), strict=True)) for name in ranks[0]}
    found = {name: [max(both) for both in each] for name, each in rounds.items()}
    for name in (UPLOAD, BARE):
        found[name] = [WORLD * size / 1e6 / (max(a[1], b[1]) - min(a[0], b[0])) for a, b in rounds[name]]
    pairs = {"times less stall": (IN_LOOP, BESIDE), "upload / bare": (UPLOAD, BARE), "times slower step": (BUSY, ALONE)}
    return found | {name: [a / b for a, b in zip(found[above], found[below], strict=True)]
                    for name, (above, below) in pairs.items()}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="save-") as name, server(Path(name) / "s3") as (kind, bucket):
        folder, uri = Path(name), f"s3://{bucket}/run"
        (first, size), (second, _) = run_ranks(measure, WORLD, uri, folder, timeout_s=1800)
        found = figures([first, second], size)
        found["DeepSpeed's conversion for another world size, s"] = [convert(folder) for _ in range(3)]
        (found["verifying and restoring ours at another world size, s"],) = run_ranks(resume, 1, uri, timeout_s=300)
    device = f"cpu-{platform.machine().replace('_', '-')}-{os.cpu_count()}-cores"
    head = (f"{WORLD} gloo ranks on {device}, torch {torch.__version__}, ZeRO 1, fp32, {size / 1e6:.0f} MB a rank, S3 "
            f"from {kind} on the same machine, {ROUNDS} rounds taken in turns")  # fmt: skip
    quartiles = {what: statistics.quantiles(values, n=4) for what, values in found.items()}
    rows = [[what, f"{middle:.3g}", f"{low:.3g}..{high:.3g}"] for what, (low, middle, high) in quartiles.items()]
    print(f"{head}\n\n{table(['what', 'median', 'quartiles'], rows)}")
    path = RESULTS / f"checkpoint-{device}.json"
    path.write_text(json.dumps({"what": head, "quartiles": quartiles, "rounds": found}, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
