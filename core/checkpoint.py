"""Checkpoints in the store: slices of fp32 weights and moments per parameter, committed by a manifest.

    checkpoints/00000200-a0001/rank-0000.safetensors   what rank 0 owned
                               rank-0000.json          its size, checksum and slices
                               manifest.json           written last, once; without it there is no checkpoint

No pickle, no gather of full tensors, and nothing in the layout depends on ZeRO stage or world size: a reader fetches
the slices that overlap what it needs, and every slice carries its own CRC32C.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.comm import Comm
from core.engine import Engine
from core.fragments import KINDS
from core.manifest import CheckpointError, Manifest, Position, Slice, commit, committed, folder, keys, read
from core.storage import MissingObject, Store, crc32c

GAP = 1 << 20  # ranges closer than this are fetched in one request,
REQUEST = 1 << 28  # which is not extended beyond this size


def save(run: Store, engine: Engine, method_state: dict[str, Tensor], comm: Comm, position: Position,
         fingerprint: str, attempt: int, zero_stage: int) -> bool:  # fmt: skip
    """Write this rank's part; rank 0 commits the manifest when all parts are there.

    False on all ranks, and nothing written, when some weight, moment or state is not finite: such a checkpoint would
    only push out a good one.  Raises CheckpointError when this checkpoint is already committed, StoreError.
    """
    tensors, names = _own_part(engine, method_state, comm)
    if not _finite(tensors.values(), comm):
        return False
    key = folder(position.step, attempt)
    if committed(run, key):
        raise CheckpointError(f"{run.uri}/{key}: is committed already; another process is training this run")
    _write_part(run.sub(key), f"rank-{comm.rank:04d}", tensors, names)
    comm.barrier()
    if comm.rank == 0:
        shapes = {name: list(shape) for name, shape in engine.shapes.items()}
        shapes |= {f"method/{name}": list(value.shape) for name, value in method_state.items()}
        shapes |= {f"buffer/{name}": list(value.shape) for name, value in engine.buffers().items()}
        manifest = Manifest(position, fingerprint, attempt, comm.world, zero_stage, engine.adam_step, time.time(),
                            shapes, key=key)  # fmt: skip
        _collect_parts(run.sub(key), manifest)
        commit(run, manifest)
    return True


def _own_part(
    engine: Engine, method_state: dict[str, Tensor], comm: Comm
) -> tuple[dict[str, Tensor], dict[str, tuple[str, str, int]]]:
    """Tensors to write and, by key in the file, (name, kind, start). At stage 0 ranks deal out whole parameters."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, tuple[str, str, int]] = {}

    def add(name: str, kind: str, start: int, flat: Tensor) -> None:
        key = f"{kind}/{name}@{start}"
        tensors[key], names[key] = flat.detach().cpu().contiguous(), (name, kind, start)

    for number, fragment in enumerate(engine.fragments()):
        if engine.replicated and number % comm.world != comm.rank:
            continue
        for kind in KINDS:
            add(fragment.name, kind, fragment.start, fragment.view(kind).clone())
    if comm.rank == 0:
        for name, tensor in engine.buffers().items():
            add(name, "buffer", 0, tensor.reshape(-1).clone())
        for name, tensor in method_state.items():
            add(name, "method", 0, tensor.reshape(-1).clone())
    return tensors, names


def _finite(tensors: Iterable[Tensor], comm: Comm) -> bool:
    """Whether no rank holds an infinity or NaN."""
    bad = not all(bool(t.isfinite().all()) for t in tensors)
    return not comm.max(torch.tensor(float(bad), device=comm.device)).item()


def _write_part(store: Store, part: str, tensors: dict[str, Tensor], names: dict[str, tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory(prefix="retort-checkpoint-") as temporary:
        path = Path(temporary) / f"{part}.safetensors"
        save_file(tensors, path)
        store.put_file(path.name, path)
        raw = path.read_bytes()
    slices = [asdict(s) for s in _describe(raw, names)]
    store.put(f"{part}.json", json.dumps({"size": len(raw), "crc32c": crc32c(raw), "slices": slices}).encode())


def _describe(raw: bytes, names: dict[str, tuple[str, str, int]]) -> Iterator[Slice]:
    """Byte ranges and checksums of a safetensors file's tensors."""
    header_size = int.from_bytes(raw[:8], "little")
    for key, entry in json.loads(raw[8 : 8 + header_size]).items():
        if key == "__metadata__":
            continue
        name, kind, start = names[key]
        begin, end = (8 + header_size + o for o in entry["data_offsets"])
        yield Slice(name, kind, start, entry["shape"][0], entry["dtype"], begin, end - begin, crc32c(raw[begin:end]))


def _collect_parts(store: Store, manifest: Manifest) -> None:
    for rank in range(manifest.world):
        about = json.loads(store.get(f"rank-{rank:04d}.json"))
        name = f"rank-{rank:04d}.safetensors"
        manifest.files[name] = {"size": about["size"], "crc32c": about["crc32c"]}
        manifest.slices += [Slice(**{**s, "file": name}) for s in about["slices"]]


def newest(
    run: Store, fingerprint: str | None = None, verify: Comm | None = None, warn: Callable[[str], object] = print
) -> Manifest | None:
    """The newest checkpoint whose files are all there with the right sizes; damaged ones are named and passed over.

    verify: also read every byte and compare checksums, shared out between these ranks, which all get the same answer.
    """
    for key in reversed(keys(run)):
        manifest, problem = None, ""
        try:
            manifest = read(run, key)
            _check(run, manifest, fingerprint)
            if verify is not None:
                Reader(run, manifest).verify(sorted(manifest.files)[verify.rank :: verify.world])
        except (CheckpointError, MissingObject) as error:
            problem = str(error)
            warn(f"warning: checkpoint passed over: {problem}")
        bad = torch.tensor(float(bool(problem)))
        if not (bad if verify is None else verify.max(bad.to(verify.device))).item():
            return manifest
    return None


def _check(run: Store, manifest: Manifest, fingerprint: str | None) -> None:
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise CheckpointError(f"{manifest.key}: belongs to another recipe ({manifest.fingerprint[:10]})")
    for name, about in manifest.files.items():
        size = run.size(f"{manifest.key}/{name}")
        if size != about["size"]:
            found = "is not there" if size is None else f"has {size} bytes instead of {about['size']}"
            raise CheckpointError(f"{manifest.key}/{name} {found}")


_DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16,
           "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


class Reader:
    """Reads ranges of a checkpoint's tensors, verifying every slice it touches."""

    def __init__(self, run: Store, manifest: Manifest) -> None:
        self.run, self.manifest = run, manifest
        self._by_tensor: dict[tuple[str, str], list[Slice]] = {}
        for piece in manifest.slices:
            self._by_tensor.setdefault((piece.kind, piece.name), []).append(piece)
        self._loaded: dict[tuple[str, int], Tensor] = {}  # (file, offset) -> flat tensor

    def prefetch(self, wanted: list[tuple[str, str, int, int]]) -> None:
        """Fetch what these (kind, name, start, numel) ranges need.  Raises as `verify` does."""
        needed = {(s.file, s.offset): s for each in wanted for s in self._over(*each)}
        for piece, data in self._fetch([s for place, s in needed.items() if place not in self._loaded]):
            flat = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).view(_DTYPES[piece.dtype])
            self._loaded[piece.file, piece.offset] = flat

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a flattened tensor, from as many slices as they lie in."""
        self.prefetch([(kind, name, start, numel)])
        parts = []
        for piece in self._over(kind, name, start, numel):
            flat = self._loaded[piece.file, piece.offset]
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
            raw = self.run.get_range(f"{self.manifest.key}/{first.file}", first.offset, end - first.offset)
            for piece in batch:
                data = raw[piece.offset - first.offset : piece.end - first.offset]
                if len(data) != piece.size or crc32c(data) != piece.crc32c:
                    where = f"{self.manifest.key}/{piece.file}"
                    raise CheckpointError(f"{where}: checksum of {piece.kind} {piece.name} is wrong")
                yield piece, data

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
