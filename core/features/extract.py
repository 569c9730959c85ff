"""Teachers run over a data set once, part by part, by any number of workers; their outputs go to the store."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.features.about import fingerprint
from core.features.claims import BEAT_S, LEASE_S, Claims, shared
from core.features.codec import check_finite, encode
from core.features.rows import VIEW_BOX
from core.features.sets import FOLDER
from core.features.work import Chunk, Work
from core.methods.base import Features, Outputs
from core.storage import open_store

Say = Callable[[str], None]
SAY_EVERY_S = 10.0
UPLOADS = 2  # parts on their way at once


def extract(
    work: Work, teachers: dict[str, Outputs], root: str, device: torch.device, say: Say, beat_s: float = BEAT_S,
    lease_s: float = LEASE_S,
) -> None:  # fmt: skip
    """Until everything is stored, whoever stores it; see `Claims`.  Raises FeatureError, DataError, StoreError."""
    together = hashlib.sha256("".join(fingerprint(s.about) for s in work.sets.values()).encode()).hexdigest()[:16]
    items, progress = work.items(), Progress(work, say)
    with Claims(open_store(root).sub(f"{FOLDER}/work/{together}"), beat_s, lease_s) as claims:
        for taken in shared(items, claims, work.done, work.is_done, lambda: progress.add(0)):
            with Writer(work) as writer:
                _run(work, teachers, taken, writer, device, progress)
    store = open_store(root)
    store.delete(*(entry.key for entry in store.list(f"{FOLDER}/work/{together}/")))


def _run(
    work: Work, teachers: dict[str, Outputs], items: Iterable[str], writer: Writer, device: torch.device,
    progress: Progress,
) -> None:  # fmt: skip
    before: Computed | None = None
    for chunk in work.chunks(items, device):
        now = Computed(work, teachers, chunk, device)
        if before is not None:  # while the device computes the next
            writer.add(before)
        before = now
        progress.add(len(chunk.rows))
    if before is not None:
        writer.add(before)


class Computed:
    """The stored form of a chunk's outputs, on its way from the device."""

    @torch.no_grad()
    def __init__(self, work: Work, teachers: dict[str, Outputs], chunk: Chunk, device: torch.device) -> None:
        self.chunk = chunk
        self._host = {name: self._started(work, name, teacher(chunk.batch)) for name, teacher in teachers.items()}
        self._ready = _mark(device)

    def _started(self, work: Work, name: str, features: Features) -> dict[str, Tensor]:
        about, rows = work.sets[name].about, len(self.chunk.rows)
        stored: dict[str, Tensor] = {}
        for kind in about["outputs"]:
            stored |= encode(about["codec"], kind, getattr(features, kind)[:rows])
        return {key: _to_host(value) for key, value in stored.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Of one teacher, on the CPU."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host[name]


def _mark(device: torch.device) -> Any:
    """What can be waited for: that the device has done all it was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _to_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


class Writer:
    """Puts chunks together to parts and uploads these in the background.  Raises FeatureError, StoreError."""

    def __init__(self, work: Work) -> None:
        self._work, self._pool = work, ThreadPoolExecutor(UPLOADS)
        self._chunks: list[Computed] = []
        self._uploads: deque[Future[None]] = deque()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            while self._uploads and kind is None:
                self._uploads.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def add(self, computed: Computed) -> None:
        """Chunks of a part come in order, and none of another between them."""
        self._chunks.append(computed)
        chunk = computed.chunk
        if chunk.rows.stop < self._work.any_set.rows(chunk.part).stop:
            return
        parts, self._chunks = self._chunks, []
        while len(self._uploads) >= UPLOADS:
            self._uploads.popleft().result()
        self._uploads.append(self._pool.submit(self._store, parts))

    def _store(self, computed: list[Computed]) -> None:
        chunk = computed[-1].chunk
        first = self._work.any_set.rows(chunk.part).start
        bad = [row - first for each in computed for row in each.chunk.bad]
        for name, found in self._work.sets.items():
            given = [each.tensors(name) for each in computed]
            tensors = {key: torch.cat([part[key] for part in given]) for key in given[0]}
            check_finite(f"teacher {name}", found.about["codec"], tensors)
            boxes = [e.chunk.boxes[: len(e.chunk.rows)] for e in computed if e.chunk.boxes is not None]
            tensors |= {VIEW_BOX: torch.cat(boxes)} if boxes else {}
            with tempfile.TemporaryDirectory(prefix="retort-features-") as folder:
                path = Path(folder) / "part.safetensors"
                save_file({key: value.contiguous() for key, value in tensors.items()}, path)
                found.commit(chunk.view, chunk.part, path, bad)


class Progress:
    """Says now and then how far all workers are, and how fast this one is."""

    def __init__(self, work: Work, say: Say) -> None:
        self._work, self._say = work, say
        self._begun = self._said = time.monotonic()
        self._own = 0

    def add(self, rows: int) -> None:
        self._own += rows
        now = time.monotonic()
        if now - self._said < SAY_EVERY_S:
            return
        self._said = now
        total = self._work.any_set.ends[-1] * self._work.views
        done = sum(self._work.size(item) for item in self._work.done())
        told = f"{self._work.split}: {done:,} of {total:,} rows are stored"
        if not self._own:
            self._say(f"{told}; other workers have the rest")
            return
        rate = self._own / (now - self._begun)
        left = f"at most {max(total - done, 0) / rate / 60:,.0f} min left"
        self._say(f"{told}; {rate:,.1f} rows/s here, {left}")
