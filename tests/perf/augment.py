"""What augmentation costs: CPU milliseconds of an image in a loader's worker and on the device, which is this CPU.

Each method's recipe in both ways of `data.pixels` beside the plain pipeline of its release, all through a loader with
one worker process. A worker's cost is its own processor time, with what it takes to hand batches over; the device's is
that of one thread. The arms take turns; figures are medians.
"""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.config import load
from core.data.loader import train_batches
from core.data.rendering import rendered
from core.data.samples import MicroBatch
from core.methods.base import Method
from core.registry import create
from jobs.table import table
from tests.perf import plain_augment
from tests.photographs import Repeated, files, photographs

RECIPES = {"unic": "unic-b", "fd": "fd-clip-b", "proteus": "proteus-b", "udi": "udi-s"}
TARGETS = {"unic": 4.0, "fd": 2.0, "proteus": 2.0, "udi": 10.0}  # times less work in the worker
SOURCES = {"500x375 q95": ((375, 500), 95), "256-short q90": ((256, 341), 90)}
PHOTOGRAPHS, BATCH, BATCHES, ROUNDS = 24, 32, 5, 5
LEAK_SAMPLES, LEAK_BATCH = 100_000, 128
SELDOM = 20  # looking at memory takes as long as an image
CPU = torch.device("cpu")
MIB = 1 << 20
MEMORY = ("first", "early", "late", "most")


@dataclass(frozen=True)
class Clock:
    """A companion: the worker's processor time in s so far, and now and then the bytes of memory that are its own."""

    def __call__(self, epoch: int, micro: int, position: int, index: Any) -> dict[str, Tensor]:
        memory = psutil.Process().memory_full_info().uss if position % SELDOM == SELDOM - 1 else math.nan
        return {"clock": torch.tensor([time.process_time(), memory], dtype=torch.float64)}


class Plain(Dataset[Any]):
    """A release's pipeline: the worker's processor time, then views of an image."""

    def __init__(self, name: str, data: list[bytes]) -> None:
        self.chain, self.data = getattr(plain_augment, name)(), data

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, i: int) -> tuple[float, Any]:
        return time.process_time(), self.chain(self.data[i % len(self.data)])


def method_of(name: str) -> Method:
    recipe = load(RECIPES[name])
    method = create(recipe, recipe.stage(recipe.stage_names()[0]), 1)
    if name == "udi":
        method._patch = 16  # known to the method when it has seen a student
    return method


def batches(method: Method, data: list[bytes], fast: bool, workers: int, count: int, size: int) -> Iterator[MicroBatch]:
    steps = train_batches(
        Repeated(data, size * count), method.views(), seed=0, batch=size, micro_batch=size, block=1024, start_step=0,
        stop_step=count, rank=0, world=1, workers=workers, prefetch=2, crops=method.crops(), companions=[Clock()],
        fast=fast,
    )  # fmt: skip
    return (micro for (micro,) in steps)


def plain_worker(name: str, data: list[bytes]) -> float:
    random.seed(0)
    torch.manual_seed(0)
    loader = DataLoader(Plain(name, data), BATCH, num_workers=1, prefetch_factor=2)
    clocks = [found[0][0].item() for found in loader]  # the start of every batch
    return (clocks[-1] - clocks[1]) / (BATCH * (BATCHES - 2))


def our_worker(method: Method, data: list[bytes], fast: bool) -> float:
    clocks = [micro.extra["clock"][0].item() for micro in batches(method, data, fast, 1, BATCHES, BATCH)]
    return (clocks[-1] - clocks[1]) / (BATCH * (BATCHES - 2))


def our_device(method: Method, data: list[bytes], fast: bool) -> float:
    """Seconds of an image on the device."""
    micros = list(batches(method, data, fast, 0, 2, BATCH))
    for micro in micros:
        began = time.thread_time()
        rendered(micro, method.views(), CPU, 0, fast)
        taken = time.thread_time() - began
    return taken / BATCH  # of the second one


def shipped(method: Method, data: list[bytes], fast: bool) -> float:
    """Bytes of an image that go from the worker to the device."""
    micro = next(batches(method, data, fast, 0, 1, BATCH))
    tensors = [*micro.views.values(), *micro.steps.values(), micro.index, micro.labels]
    tensors += [tensor for name, tensor in micro.extra.items() if name != "clock"]
    if micro.packed is not None:
        tensors += [micro.packed.pixels, micro.packed.sizes, *micro.packed.boxes.values()]
    return sum(tensor.nbytes for tensor in tensors) / BATCH


def differences(method: Method, data: list[bytes]) -> dict[str, float]:
    """Of the two ways on real photographs, in grey levels over all views: the largest and the mean."""
    both = [
        rendered(next(batches(method, data, fast, 0, 1, len(data))), method.views(), CPU, 0, fast)
        for fast in (False, True)
    ]
    levels = torch.tensor(plain_augment.IMAGENET_STD).view(3, 1, 1) * 255
    apart = [((both[0][name] - both[1][name]) * levels).abs().flatten() for name in both[0]]
    return {"largest": max(a.max().item() for a in apart), "mean": torch.cat(apart).mean().item()}


def measure(rounds: int = ROUNDS) -> dict[str, Any]:
    """By recipe and source: seconds of an image in every round and arm, bytes shipped, differences."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for source, (size, quality) in SOURCES.items():
        data = files(photographs(PHOTOGRAPHS, size), quality)
        for name in RECIPES:
            method = method_of(name)
            arms: dict[str, Callable[[], float]] = {"plain worker": partial(plain_worker, name, data)}
            for way in ("exact", "fast"):
                arms[f"{way} worker"] = partial(our_worker, method, data, way == "fast")
                arms[f"{way} device"] = partial(our_device, method, data, way == "fast")
            times = defaultdict(list)
            for turn in range(rounds):
                for arm in (*list(arms)[turn % len(arms) :], *list(arms)[: turn % len(arms)]):
                    times[arm].append(arms[arm]())
            found[f"{name}, {source}"] = {
                "target": TARGETS[name], "times": dict(times), "differences": differences(method, data),
                "bytes": {way: shipped(method, data, way == "fast") for way in ("exact", "fast")},
            }  # fmt: skip
    return found


def leak(name: str, fast: bool, samples: int = LEAK_SAMPLES) -> dict[str, float]:
    """MiB of a worker's own memory, beside what it shares with the process it came from, while it makes many samples:
    first, after a tenth of them, at the end, and the most there was."""
    data = files(photographs(PHOTOGRAPHS, SOURCES["256-short q90"][0]), 90)
    micros = batches(method_of(name), data, fast, 1, samples // LEAK_BATCH, LEAK_BATCH)
    seen = [own / MIB for micro in micros if not math.isnan(own := micro.extra["clock"][1].item())]
    early, late = (statistics.median(seen[part]) for part in (slice(len(seen) // 10, len(seen) // 5), slice(-5, None)))
    return dict(zip(MEMORY, (seen[0], early, late, max(seen)), strict=True))


def row_of(what: str, found: dict[str, Any]) -> list[str]:
    """Medians in ms, ratios round by round."""
    times = found["times"]
    plain = times["plain worker"]
    cells = [what, f"{1e3 * statistics.median(plain):.2f}"]
    for way in ("exact", "fast"):
        worker, device = times[f"{way} worker"], times[f"{way} device"]
        less = statistics.median(a / b for a, b in zip(plain, worker, strict=True))
        share = statistics.median((b + c) / a for a, b, c in zip(plain, worker, device, strict=True))
        cells += [f"{1e3 * statistics.median(worker):.2f}", f"{1e3 * statistics.median(device):.2f}", f"{less:.1f}",
                  f"{share:.2f}", f"{found['bytes'][way] / 1e3:.0f}"]  # fmt: skip
    apart = found["differences"]
    return [*cells, f"{found['target']:.0f}", f"{apart['largest']:.1f}", f"{apart['mean']:.4f}"]


HEAD = ["recipe, source", "plain ms"]
HEAD += [f"{way} {what}" for way in ("exact", "fast") for what in ("worker ms", "device ms", "less", "both", "kB")]
HEAD += ["target", "largest", "mean"]


def main() -> int:
    found = measure()
    print(f"{os.cpu_count()} cores {platform.machine()}, one used; torch {torch.__version__}; batches of {BATCH}")
    print("less: plain / worker; both: (worker + device) / plain; kB: sent to the device; largest, mean: difference of "
          "exact and fast in grey levels\n")  # fmt: skip
    print(table(HEAD, [row_of(what, arm) for what, arm in found.items()]))
    rows = []
    for name, fast in (("unic", False), ("unic", True), ("udi", True)):
        grown = leak(name, fast)
        cells = [f"{grown[column]:.1f}" for column in MEMORY]
        rows.append([f"{name}, {'fast' if fast else 'exact'}", *cells])
    print(f"\n{LEAK_SAMPLES} samples of 341x256 in batches of {LEAK_BATCH}, prefetch 2: MiB of the worker's own memory")
    print(table(["recipe", *MEMORY], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
