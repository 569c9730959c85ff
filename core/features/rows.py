"""Reading stored features by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core import small_json
from core.data.files import Files
from core.features.about import About
from core.features.codec import FeatureError, layout
from core.features.sets import MEND, FeatureSet, Ints, Part, file
from core.snapshot import NAMES as OTHERS

if TYPE_CHECKING:
    from core.cache import ShardCache

VIEW_BOX = "box"
NAMES = OTHERS | {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}
Header = dict[str, int]  # where a tensor's rows begin in the file


class Rows:
    """Outputs of one teacher by view and row.  Can be pickled and survives a fork."""

    def __init__(self, found: FeatureSet, views: int, cache: ShardCache | None) -> None:
        """Raises FeatureError for damaged sets, StoreError."""
        self.set, self.uri, self._files = found.name, found.store.uri, Files(found.store, cache)
        self._ends = np.array(found.ends, np.int64)
        self._parts = [found.finished(view) for view in range(views)]
        self.layout = layout(found.about["codec"], found.about["outputs"]) | drawn(found.about)
        self._headers: dict[tuple[int, int], Header] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def bad(self, view: int) -> Ints:
        """Rows of finished parts that were unreadable, ascending."""
        parts = sorted(self._parts[view].items())
        firsts = [int(self._ends[number - 1]) if number else 0 for number, _ in parts]
        found = [np.array(part.bad, np.int64) + first for first, (_, part) in zip(firsts, parts, strict=True)]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))

    def lacking(self) -> int:
        """Rows of all views that are not there, those of unreadable images aside."""
        return len(self) * len(self._parts) - sum(p.rows for view in self._parts for p in view.values())

    def read(self, view: int, index: Ints) -> tuple[dict[str, Tensor], Ints]:
        """Stored tensors (B, ...) of rows (B,), and the places (M,) in them of rows that are not there, left zero.

        Raises FeatureError, StoreError.
        """
        out = {name: torch.zeros(len(index), *shape, dtype=dtype) for name, (dtype, shape) in self.layout.items()}
        parts = np.searchsorted(self._ends, index, side="right")
        missing = []
        for number in np.unique(parts).tolist():
            places = np.flatnonzero(parts == number)
            rows = index[places] - (self._ends[number - 1] if number else 0)
            part = self._parts[view].get(number)
            absent = np.ones(len(rows), bool) if part is None else np.isin(rows, part.bad)
            missing.append(places[absent])
            if part is not None:
                self._fill(out, view, number, part, places[~absent], rows[~absent])
        return out, np.sort(np.concatenate(missing)) if missing else np.zeros(0, np.int64)

    def _fill(self, out: dict[str, Tensor], view: int, number: int, part: Part, places: Ints, rows: Ints) -> None:
        if not len(rows):
            return
        header, order = self._header(view, number, part), np.argsort(rows, kind="stable")
        runs = np.split(rows[order], np.flatnonzero(np.diff(rows[order]) != 1) + 1)  # neighbours come in one read
        for name, (dtype, shape) in self.layout.items():
            size = _size(dtype, shape)
            data = bytearray().join(
                self._bytes(view, number, part, header[name] + int(run[0]) * size, len(run) * size) for run in runs
            )
            out[name][places[order]] = torch.frombuffer(data, dtype=dtype).view(len(rows), *shape)

    def _header(self, view: int, number: int, part: Part) -> Header:
        """Offsets of the tensors.  Raises FeatureError unless they are those that the set holds."""
        if (view, number) not in self._headers:
            size = int.from_bytes(self._bytes(view, number, part, 0, 8), "little")
            where = f"{self._files.store.uri}/{file(view, number, part)}"
            try:
                header = self._bytes(view, number, part, 8, min(size, small_json.SMALL + 1))
                content = small_json.parse(header, dict, where)
            except small_json.Unreadable as error:
                raise FeatureError(f"{error}: {MEND}") from None
            self._headers[view, number] = self._offsets(content, 8 + size, part, where)
        return self._headers[view, number]

    def _offsets(self, content: dict[str, Any], start: int, part: Part, where: str) -> Header:
        for name, (dtype, shape) in self.layout.items():
            own = content.get(name, {})
            if own.get("dtype") != NAMES[dtype] or own.get("shape") != [part.rows, *shape]:
                raise FeatureError(f"{where}: {name} is {own.get('dtype')} {own.get('shape')}: {MEND}")
        return {name: start + content[name]["data_offsets"][0] for name in self.layout}

    def _bytes(self, view: int, number: int, part: Part, start: int, count: int) -> bytes:
        where = file(view, number, part)
        data = self._files.read(where, part.bytes, part.crc32c, start, count)
        if len(data) != count:
            raise FeatureError(f"{self._files.store.uri}/{where} ends early: {MEND}")
        return data


def drawn(about: About) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Where views were cut out is stored beside the outputs of drawn views."""
    return {VIEW_BOX: (torch.int32, (5,))} if "view" in about.get("images", {}) else {}


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))
