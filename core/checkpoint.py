"""Checkpoints in the store: slices of fp32 weights and moments per parameter, committed by an entry of the run's log.

    checkpoints/00000200-000003/rank-0000.safetensors   what rank 0 owned
                                rank-0000.json          its size, checksum and slices: the part is there
    commits/000007.json                                 the manifest; without it there is no checkpoint

No pickle, no gather of full tensors, and nothing in the layout depends on ZeRO stage or world size: a reader fetches
the slices that overlap what it needs, and every slice carries its own CRC32C.

Scale, worked out for a ViT-g student (1.14 G trained parameters in 805 tensors of two groups) at ZeRO 1 on 256 GPUs:
12 bytes a parameter are 13.7 GB, 53 MB a rank. A save stalls training for their copy to pinned memory, 5 ms at 10 GB/s.
It then takes 7 requests of a rank's own (multipart: 4 parts and 2 more; the description), and of rank 0 a listing and
256 reads of 2 KB (40 KB of its own, which holds all shapes) and one conditional put of the manifest: 3 (805 + 2 x 255)
slices of 210 bytes, 0.8 MB. At 150 MB/s a rank the parts are there in 0.4 s, at 1 GB/s for all of them in 14 s.
tests/system/test_scale.py commits for 1,024 ranks on a real server: 8,550 slices, 1.8 MB, 1,029 requests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from torch import Tensor

from core import commits
from core.comm import Comm
from core.engine import Engine
from core.fragments import KINDS
from core.manifest import CheckpointError, Manifest, Slice
from core.snapshot import DTYPES
from core.storage import MissingObject, Store, crc32c

GAP = 1 << 20  # ranges closer than this are fetched in one request,
REQUEST = 1 << 28  # which is not extended beyond this size
PAUSE_S = 0.5  # before a listed object that a server denies to have is asked for again


def newest(
    run: Store, fingerprints: Collection[str] | None = None, verify: Comm | None = None,
    warn: Callable[[str], object] = print,
) -> Manifest | None:  # fmt: skip
    """The newest checkpoint whose files are all there with the right sizes; damaged ones are named and passed over.

    fingerprints: of the recipes whose checkpoints will do.  verify: also read every byte and compare checksums, shared
    out between these ranks, which all get the same answer.
    """
    for manifest in commits.checkpoints(run, warn):
        problem = ""
        try:
            _check(run, manifest, fingerprints)
            if verify is not None:
                Reader(run, manifest).verify(sorted(manifest.files)[verify.rank :: verify.world])
        except (CheckpointError, MissingObject) as error:
            problem = str(error)
            warn(f"warning: checkpoint passed over: {problem}")
        bad = torch.tensor(float(bool(problem)))
        if not (bad if verify is None else verify.max(bad.to(verify.device))).item():
            return manifest
    return None


def _check(run: Store, manifest: Manifest, fingerprints: Collection[str] | None) -> None:
    if fingerprints is not None and manifest.fingerprint not in fingerprints:
        raise CheckpointError(f"{manifest.key}: belongs to another recipe ({manifest.fingerprint[:10]})")
    sizes = {e.key: e.size for e in run.list(f"{manifest.key}/")}
    for name, about in manifest.files.items():
        size = sizes.get(f"{manifest.key}/{name}")
        if size != about["size"]:
            found = "is not there" if size is None else f"has {size} bytes instead of {about['size']}"
            raise CheckpointError(f"{manifest.key}/{name} {found}")


class Reader:
    """Reads ranges of a checkpoint's tensors, verifying every slice it touches."""

    def __init__(self, run: Store, manifest: Manifest) -> None:
        self.run, self.manifest = run, manifest
        self._by_tensor: dict[tuple[str, str], list[Slice]] = {}
        for piece in manifest.slices:
            self._by_tensor.setdefault((piece.kind, piece.name), []).append(piece)
        self._loaded: dict[Slice, Tensor] = {}  # flat (by slice: an empty one lies where the next begins)

    def prefetch(self, wanted: list[tuple[str, str, int, int]]) -> None:
        """Fetch what these (kind, name, start, numel) ranges need.  Raises as `verify` does."""
        needed = {s for each in wanted for s in self._over(*each)}
        for piece, data in self._fetch(list(needed - self._loaded.keys())):
            flat = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).view(DTYPES[piece.dtype])
            self._loaded[piece] = flat

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a flattened tensor, from as many slices as they lie in."""
        self.prefetch([(kind, name, start, numel)])
        parts = []
        for piece in self._over(kind, name, start, numel):
            flat = self._loaded[piece]
            parts.append(flat[max(start - piece.start, 0) : start + numel - piece.start])
        return torch.cat(parts)

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind, in its shape (weights come back fp32)."""
        names = sorted({name for k, name in self._by_tensor if k == kind})
        shapes = {n: self.manifest.shapes[n if kind in KINDS else f"{kind}/{n}"] for n in names}
        self.prefetch([(kind, n, 0, math.prod(shapes[n])) for n in names])
        return {n: self.read(kind, n, 0, math.prod(shapes[n])).reshape(shapes[n]) for n in names}

    def model(self) -> dict[str, Tensor]:
        """State dict of the trainable module: weights, frozen parameters and buffers."""
        return self.whole("weight") | self.whole("buffer")

    def verify(self, files: list[str]) -> None:
        """Read all slices of these files.  Raises CheckpointError naming file and tensor of a wrong checksum."""
        for _ in self._fetch([s for s in self.manifest.slices if s.file in files]):
            pass

    def _fetch(self, pieces: list[Slice]) -> Iterator[tuple[Slice, bytes]]:
        """Slices and their verified bytes; neighbouring ones come in one request."""
        missing = sorted(pieces, key=lambda s: (s.file, s.offset))[::-1]
        while missing:
            first = missing.pop()
            batch, end = [first], first.end
            while missing and missing[-1].file == first.file and _near(missing[-1], first.offset, end):
                batch.append(missing.pop())
                end = batch[-1].end
            yield from self._sound(batch, end)

    def _sound(self, batch: list[Slice], end: int) -> list[tuple[Slice, bytes]]:
        """Bytes of neighbouring slices, fetched again when they are absent or wrong: answers of servers can be."""
        first = batch[0]
        where = f"{self.manifest.key}/{first.file}"
        for last_try in (False, False, True):
            try:
                raw = self.run.get_range(where, first.offset, end - first.offset)
            except MissingObject:
                if last_try:
                    raise
                time.sleep(PAUSE_S)
                continue
            found = [(s, raw[s.offset - first.offset : s.end - first.offset]) for s in batch]
            wrong = [s for s, data in found if len(data) != s.size or crc32c(data) != s.crc32c]
            if not wrong:
                return found
        raise CheckpointError(f"{where}: checksum of {wrong[0].kind} {wrong[0].name} is wrong")

    def _over(self, kind: str, name: str, start: int, numel: int) -> list[Slice]:
        """Slices that cover a range, in order.  Raises CheckpointError for a hole."""
        pieces = sorted(self._by_tensor.get((kind, name), []), key=lambda s: s.start)
        if numel == 0:
            return pieces[:1]
        over = [s for s in pieces if s.start < start + numel and start < s.start + s.numel]
        reached = start
        for piece in over:
            if piece.start > reached:
                break
            reached = max(reached, piece.start + piece.numel)
        if reached < start + numel:
            raise CheckpointError(f"{self.manifest.key}: {kind} {name} lacks elements {reached} to {start + numel}")
        return over


def _near(piece: Slice, begin: int, end: int) -> bool:
    """Whether a slice is worth reading in one request with the bytes begin..end before it."""
    return piece.offset - end < GAP and piece.end - begin <= REQUEST


def restore(run: Store, manifest: Manifest, engine: Engine) -> dict[str, Tensor]:
    """Fill this rank's fragments of weights and moments; returns the method's state.

    Works at any world size and ZeRO stage that the fragments describe.  Raises CheckpointError, StoreError.
    """
    reader, fragments = Reader(run, manifest), engine.fragments()
    stored = {s.name: tuple(manifest.shapes[s.name]) for s in manifest.slices if s.kind == "weight"}
    if differ := sorted(name for name, _ in stored.items() ^ engine.shapes.items()):
        raise CheckpointError(f"{manifest.key}: other names or shapes of parameters: {', '.join(differ)}")
    reader.prefetch([(kind, f.name, f.start, f.numel) for f in fragments for kind in KINDS])
    engine.prepare_load(manifest.adam_step)
    for f in fragments:
        for kind in KINDS:
            f.view(kind).copy_(reader.read(kind, f.name, f.start, f.numel))
    engine.finish_load()
    return reader.whole("method")
