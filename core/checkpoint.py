"""Checkpoints in the store: slices of fp32 weights and moments per parameter, committed by a manifest.

    checkpoints/00000200-a0001/rank-0000.safetensors   what rank 0 owned
                               rank-0000.json          its size, checksum and slices
                               manifest.json           written last, once; without it there is no checkpoint

No pickle, no gather of full tensors, and nothing in the layout depends on ZeRO stage or world size: a reader fetches
the slices that overlap what it needs, and every slice carries its own CRC32C.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.comm import Comm
from core.engine import KINDS, Engine
from core.storage import MissingObject, Store, StoreError, crc32c

FOLDER = "checkpoints"
SCHEMA = 1
GAP = 1 << 20  # ranges closer than this are fetched in one request


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to something else."""


@dataclass(frozen=True)
class Slice:
    """A run of one tensor's flattened elements in one file."""

    name: str
    kind: str  # weight | exp_avg | exp_avg_sq | buffer | method
    start: int
    numel: int
    dtype: str
    offset: int  # bytes, in the file
    size: int
    crc32c: int
    file: str = ""


@dataclass(frozen=True)
class Position:
    """Where training goes on."""

    stage: str
    stage_step: int  # steps of this stage taken
    step: int  # steps taken over all stages
    finished: bool  # the stage is complete


@dataclass
class Manifest:
    position: Position
    fingerprint: str
    attempt: int
    world: int
    zero_stage: int
    adam_step: int
    created: float
    shapes: dict[str, list[int]]  # of every tensor, by "kind/name" for buffers and method state, else by name
    files: dict[str, dict[str, int]]  # name -> size, crc32c
    slices: list[Slice] = field(default_factory=list)
    schema: int = SCHEMA
    key: str = ""  # folder, set by the reader


def save(run: Store, engine: Engine, method_state: dict[str, Tensor], comm: Comm, position: Position,
         fingerprint: str, attempt: int, zero_stage: int) -> str | None:  # fmt: skip
    """Write this rank's part; rank 0 commits the manifest when all parts are there.  Returns the folder's key."""
    folder = run.sub(f"{FOLDER}/{position.step:08d}-a{attempt:04d}")
    tensors, names = _own_part(engine, method_state, comm)
    part = f"rank-{comm.rank:04d}"
    with tempfile.TemporaryDirectory(prefix="retort-checkpoint-") as temporary:
        path = Path(temporary) / f"{part}.safetensors"
        save_file(tensors, path)
        slices = list(_describe(path, names))
        folder.put_file(path.name, path)
        about = {
            "size": path.stat().st_size,
            "crc32c": crc32c(path.read_bytes()),
            "slices": [asdict(s) for s in slices],
        }
        folder.put(f"{part}.json", json.dumps(about).encode())
    comm.barrier()
    if comm.rank:
        return None
    state = {f"method/{k}": list(v.shape) for k, v in method_state.items()}
    state |= {f"buffer/{k}": list(v.shape) for k, v in engine.buffers().items()}
    manifest = Manifest(position, fingerprint, attempt, comm.world, zero_stage, engine.adam_step, time.time(),
                        {k: list(v) for k, v in engine.shapes.items()} | state, {})  # fmt: skip
    for rank in range(comm.world):
        name = f"rank-{rank:04d}"
        about = json.loads(folder.get(f"{name}.json"))
        manifest.files[f"{name}.safetensors"] = {"size": about["size"], "crc32c": about["crc32c"]}
        manifest.slices += [Slice(**{**s, "file": f"{name}.safetensors"}) for s in about["slices"]]
    if not folder.put_if_absent("manifest.json", json.dumps(asdict(manifest)).encode()):
        raise CheckpointError(f"{folder.uri}: another attempt has committed this checkpoint")
    return folder.uri.removeprefix(run.uri).strip("/")


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


def _describe(path: Path, names: dict[str, tuple[str, str, int]]) -> Iterator[Slice]:
    """Byte ranges and checksums of a safetensors file's tensors."""
    raw = path.read_bytes()
    header_size = int.from_bytes(raw[:8], "little")
    for key, entry in json.loads(raw[8 : 8 + header_size]).items():
        if key == "__metadata__":
            continue
        name, kind, start = names[key]
        begin, end = (8 + header_size + o for o in entry["data_offsets"])
        yield Slice(name, kind, start, entry["shape"][0], entry["dtype"], begin, end - begin, crc32c(raw[begin:end]))


def manifests(run: Store) -> list[str]:
    """Keys of committed checkpoints, oldest first."""
    return sorted(e.key.rpartition("/")[0] for e in run.list(f"{FOLDER}/") if e.key.endswith("/manifest.json"))


def read_manifest(run: Store, key: str) -> Manifest:
    """Raises CheckpointError when it is not a manifest of this schema."""
    try:
        content: dict[str, Any] = json.loads(run.get(f"{key}/manifest.json"))
        if content.get("schema") != SCHEMA:
            raise CheckpointError(f"{key}: checkpoint schema {content.get('schema')}, this Retort reads {SCHEMA}")
        content["position"] = Position(**content["position"])
        content["slices"] = [Slice(**s) for s in content["slices"]]
        return Manifest(**{**content, "key": key})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{key}: unreadable manifest: {error}") from None


def newest(run: Store, fingerprint: str | None = None, warn: Any = print) -> Manifest | None:
    """The newest checkpoint whose files are all there with the right sizes; damaged ones are named and passed over."""
    for key in reversed(manifests(run)):
        try:
            manifest = read_manifest(run, key)
            if fingerprint is not None and manifest.fingerprint != fingerprint:
                raise CheckpointError(f"{key}: belongs to another recipe ({manifest.fingerprint[:10]})")
            for name, about in manifest.files.items():
                if run.size(f"{key}/{name}") != about["size"]:
                    raise CheckpointError(f"{key}/{name}: {run.size(f'{key}/{name}')} bytes instead of {about['size']}")
            return manifest
        except (CheckpointError, MissingObject) as error:
            warn(f"warning: checkpoint passed over: {error}")
    return None


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
        """Fetch what these (kind, name, start, numel) ranges need, joining neighbouring byte ranges.

        Raises CheckpointError naming the file and tensor that does not match its checksum.
        """
        needed = {
            (s.file, s.offset): s for kind, name, start, numel in wanted for s in self._over(kind, name, start, numel)
        }
        missing = sorted((s for k, s in needed.items() if k not in self._loaded), key=lambda s: (s.file, s.offset))
        while missing:
            batch = [missing.pop(0)]
            while missing and missing[0].file == batch[0].file and missing[0].offset - _end(batch[-1]) < GAP:
                batch.append(missing.pop(0))
            begin = batch[0].offset
            raw = self.run.get_range(f"{self.manifest.key}/{batch[0].file}", begin, _end(batch[-1]) - begin)
            for piece in batch:
                data = raw[piece.offset - begin : _end(piece) - begin]
                if len(data) != piece.size or crc32c(data) != piece.crc32c:
                    raise CheckpointError(
                        f"{self.manifest.key}/{piece.file}: checksum of {piece.kind} {piece.name} is wrong"
                    )
                flat = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8)).view(_DTYPES[piece.dtype])
                self._loaded[piece.file, piece.offset] = flat

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start..start+numel of a flattened tensor, from as many slices as they lie in."""
        self.prefetch([(kind, name, start, numel)])
        pieces = self._over(kind, name, start, numel)
        parts = []
        for piece in pieces:
            flat = self._loaded[piece.file, piece.offset]
            parts.append(flat[max(start - piece.start, 0) : start + numel - piece.start])
        return torch.cat(parts)

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every tensor of a kind, in its shape (weights come back fp32)."""
        names = sorted({name for k, name in self._by_tensor if k == kind})
        shapes = {n: self.manifest.shapes[n if kind in KINDS else f"{kind}/{n}"] for n in names}
        self.prefetch([(kind, n, 0, int(np.prod(shapes[n]))) for n in names])
        return {n: self.read(kind, n, 0, int(np.prod(shapes[n]))).reshape(shapes[n]) for n in names}

    def model(self) -> dict[str, Tensor]:
        """State dict of the trainable module: weights, frozen parameters and buffers."""
        return self.whole("weight") | self.whole("buffer")

    def _over(self, kind: str, name: str, start: int, numel: int) -> list[Slice]:
        """Slices that cover a range, in order.  Raises CheckpointError for a hole."""
        pieces = sorted(self._by_tensor.get((kind, name), []), key=lambda s: s.start)
        over = [s for s in pieces if s.start < start + numel and start < s.start + s.numel]
        reached = start
        for piece in over:
            if piece.start > reached:
                break
            reached = max(reached, piece.start + piece.numel)
        if reached < start + numel:
            raise CheckpointError(f"{self.manifest.key}: {kind} {name} lacks elements {reached} to {start + numel}")
        return over


def _end(piece: Slice) -> int:
    return piece.offset + piece.size


def restore(run: Store, manifest: Manifest, engine: Engine) -> dict[str, Tensor]:
    """Fill this rank's fragments of weights and moments; returns the method's state.

    Works at any world size and ZeRO stage that the fragments describe.  Raises CheckpointError, StoreError.
    """
    reader = Reader(run, manifest)
    fragments = engine.fragments()
    absent = [f.name for f in fragments if f.name not in manifest.shapes]
    if absent:
        raise CheckpointError(f"{manifest.key}: has no parameter {absent[0]} (and {len(absent) - 1} more)")
    reader.prefetch([(kind, f.name, f.start, f.numel) for f in fragments for kind in KINDS])
    engine.prepare_load(manifest.adam_step)
    for f in fragments:
        for kind in KINDS:
            f.view(kind).copy_(reader.read(kind, f.name, f.start, f.numel))
    engine.finish_load()
    return reader.whole("method")


def retain(run: Store, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, manifests first."""
    for key in manifests(run)[:-keep]:
        try:
            run.delete(f"{key}/manifest.json")
            run.delete(*[e.key for e in run.list(f"{key}/")])
        except StoreError:
            return  # a later checkpoint tries again
