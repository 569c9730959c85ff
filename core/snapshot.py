"""A rank's share of a checkpoint, copied to host memory in the layout of a safetensors file: the only part of a save
that training waits for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.comm import Comm
from core.engine import Engine
from core.fragments import KINDS
from core.manifest import Slice
from core.storage import crc32c

DTYPES = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16, "F16": torch.float16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    name: str
    kind: str
    start: int  # first element, in the flattened tensor
    value: Tensor  # flat

    def entry(self) -> tuple[str, str, str, int]:
        return f"{self.kind}/{self.name}@{self.start}", self.name, self.kind, self.start


@dataclass
class Part:
    """What one rank wrote, described so that any reader can fetch the ranges it needs."""

    size: int
    crc32c: int
    finite: bool  # else the checkpoint is not worth having
    slices: list[Slice]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Part:
        return cls(content["size"], content["crc32c"], content["finite"], [Slice(**s) for s in content["slices"]])


def pieces(engine: Engine, method_state: dict[str, Tensor], comm: Comm) -> list[Piece]:
    """What this rank saves: its fragments, and of what all ranks hold alike (stage 0, method state) its deal."""
    found = []
    for number, fragment in enumerate(engine.fragments()):
        if not engine.replicated or number % comm.world == comm.rank:
            found += [Piece(fragment.name, kind, fragment.start, fragment.view(kind)) for kind in KINDS]
    state = sorted(method_state.items(), key=lambda item: -item[1].nbytes)[comm.rank :: comm.world]
    found += [Piece(name, "method", 0, tensor.reshape(-1)) for name, tensor in state]
    if comm.rank == 0:  # batch statistics are a rank's own
        found += [Piece(name, "buffer", 0, tensor.reshape(-1)) for name, tensor in engine.buffers().items()]
    return sorted(found, key=lambda p: -p.value.element_size())  # so that every tensor lies aligned


def _is_finite(flat: Tensor) -> bool:
    """Whether there is no infinity or NaN: NaN spreads to the extremes, which take an eighth of the time to find."""
    return flat.numel() == 0 or bool(torch.stack(flat.aminmax()).isfinite().all())


class Snapshot:
    """Host memory for one part; taken again and again, it is allocated once."""

    def __init__(self) -> None:
        self._layout: Any = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, found: list[Piece]) -> None:
        """Copy. Returns when the copy is complete, so that training may change the tensors."""
        layout = [(*p.entry(), p.value.numel(), p.value.dtype) for p in found]
        if layout != self._layout:
            self._lay_out(layout, pinned=any(p.value.is_cuda for p in found))
        for piece, (target, _) in zip(found, self._places, strict=True):
            target.copy_(piece.value.detach(), non_blocking=True)
        if any(p.value.is_cuda for p in found):
            torch.cuda.synchronize()

    def content(self) -> memoryview[int]:
        """The file."""
        return memoryview(self._memory.numpy().data).toreadonly()

    def describe(self) -> Part:
        """Checksums, and whether all numbers are finite."""
        raw, slices = self.content(), []
        finite = all(_is_finite(t) for t, _ in self._places if t.is_floating_point())
        whole = crc32c(bytes(raw[: self._begin]))
        for _, about in self._places:
            data = bytes(raw[about["offset"] : about["offset"] + about["size"]])
            slices.append(Slice(**about, crc32c=crc32c(data)))
            whole = crc32c(data, whole)
        return Part(len(raw), whole, finite, slices)

    def _lay_out(self, layout: list[Any], pinned: bool) -> None:
        offsets, end = [], 0
        for *_, numel, dtype in layout:
            offsets.append((end, end := end + numel * dtype.itemsize))
        header = {entry: {"dtype": NAMES[dtype], "shape": [numel], "data_offsets": list(offset)}
                  for (entry, _, _, _, numel, dtype), offset in zip(layout, offsets, strict=True)}  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        begin = self._begin = 8 + len(text)
        self._memory = torch.empty(begin + end, dtype=torch.uint8, pin_memory=pinned)
        self._memory[:begin] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._places = list(self._targets(layout, offsets, begin))
        self._layout = layout

    def _targets(self, layout: list[Any], offsets: list[tuple[int, int]], begin: int) -> Iterable[tuple[Tensor, Any]]:
        """A typed view of the memory for each piece, and its slice without checksum."""
        for (_, name, kind, start, numel, dtype), (first, last) in zip(layout, offsets, strict=True):
            about = {"name": name, "kind": kind, "start": start, "numel": numel, "dtype": NAMES[dtype],
                     "offset": begin + first, "size": last - first}  # fmt: skip
            yield self._memory[begin + first : begin + last].view(dtype), about
