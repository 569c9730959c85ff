"""What a teacher costs here, and how fast the store is, measured in seconds of work."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from core.features.work import Work
from core.methods.base import Batch, Outputs
from core.storage import open_store

WARM, TIMED = 2, 5
PROBE_BYTES, RANGE_BYTES, READERS = 128 << 20, 8 << 20, 8


@torch.no_grad()
def teachers_seconds(work: Work, teachers: dict[str, Outputs], device: torch.device) -> float:
    """Per image, all teachers, in batches of the recipe's micro-batch: the median of five."""
    settings = work.inputs.settings
    side = next(v.size for v in work.inputs.method.views() if v.name == work.inputs.method.teacher_view)
    images = torch.zeros(settings.micro_batch, 3, side, side, device=device)
    batch = Batch({work.inputs.method.teacher_view: images})

    def forward() -> None:
        for teacher in teachers.values():
            teacher(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _median(forward) / settings.micro_batch


def read_rate(root: str) -> float:
    """bytes/s from the store to this machine: eight at once read ranges of 8 MB of an object made for it.

    A folder's bytes come out of memory.  Raises StoreError.
    """
    store, key = open_store(root), f"features/work/probe-{uuid.uuid4().hex}"
    store.put(key, os.urandom(PROBE_BYTES))
    try:
        with ThreadPoolExecutor(READERS) as pool:
            starts = range(0, PROBE_BYTES, RANGE_BYTES)
            return PROBE_BYTES / _median(lambda: list(pool.map(lambda s: store.get_range(key, s, RANGE_BYTES), starts)))
    finally:
        store.delete(key)


def _median(action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(WARM + TIMED):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[WARM:])
