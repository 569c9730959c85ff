"""Samples as micro-batches: what is wanted or, where it cannot be decoded, what comes next, cut into the views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.cutting import Cutter, enough_pixels
from core.data.decode import CorruptImage, to_tensor
from core.data.packed import Packed
from core.data.source import DataError, Raw, Source
from core.data.views import Crops, View

Ints = NDArray[np.int64]
# More unreadable samples in a row than this is a broken data set, not a few broken files.
MAX_BAD_IN_A_ROW = 1000
DECODED_AT_ONCE = 8  # a decoded photograph can be a hundred times as large as its crop


@dataclass
class MicroBatch:
    """One canonical micro-batch of B samples.

    step: optimiser step of the stage.  micro: its number in the global batch, which is also its stream.
    drawn: epoch whose crops and colours these are: the epoch itself, unless a few are replayed again and again.
    index: int64 (B,), samples in the source, after replacement of unreadable ones; draws are keyed by them.
    views: by View.name, uint8 (B, 3, size, size).  bad: keys of the samples that could not be decoded on the way.
    labels: int64 (B,), -1 where there is none.  extra: what the method's crops and the companions add.
    packed, steps: what is left to the device where `views` are not all, see core.data.cutting.
    """

    step: int
    micro: int
    epoch: int
    drawn: int
    index: torch.Tensor
    views: dict[str, torch.Tensor]
    bad: list[str] = field(default_factory=list)
    labels: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    packed: Packed | None = None
    steps: dict[str, torch.Tensor] = field(default_factory=dict)

    def pin_memory(self) -> MicroBatch:
        """Called by the DataLoader with pin=True."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        self.extra = {name: tensor.pin_memory() for name, tensor in self.extra.items()}
        self.packed = self.packed and self.packed.pin_memory()
        self.index, self.labels = self.index.pin_memory(), self.labels.pin_memory()
        return self


class Samples:
    """Samples and the epoch whose draws they get -> MicroBatch, a pure function."""

    def __init__(self, source: Source, views: Sequence[View], crops: Crops, seed: int, fast: bool) -> None:
        self.source, self.views, self.crops, self.seed = source, list(views), crops, seed
        self.fast, self.least = fast, enough_pixels(views, fast)

    def __call__(self, index: Ints, drawn: int) -> MicroBatch:
        """index: (B,), not changed; what comes has the readable ones."""
        index = index.copy()
        cutter = Cutter(self.views, self.crops, self.seed, drawn, len(index), self.fast)
        labels = torch.full((len(index),), -1)
        bad: list[str] = []
        for first in range(0, len(index), DECODED_AT_ONCE):
            rows = slice(first, first + DECODED_AT_ONCE)
            found = [self._readable(wanted, bad) for wanted in index[rows].tolist()]
            index[rows] = [i for i, _, _ in found]
            labels[rows] = torch.tensor([-1 if label is None else label for _, _, label in found])
            cutter.add([image for _, image, _ in found], index[rows])
        cut = cutter.finish()
        return MicroBatch(0, 0, drawn, drawn, torch.from_numpy(index), cut.views, bad, labels, cut.extra, cut.packed,
                          cut.steps)  # fmt: skip

    def _readable(self, wanted: int, bad: list[str]) -> tuple[int, torch.Tensor, int | None]:
        """The wanted sample or the next one that can be decoded; keys of those that cannot are added to `bad`."""
        count, why = len(self.source), ""
        for ahead in range(min(count, MAX_BAD_IN_A_ROW)):
            i = (wanted + ahead) % count
            raw = self.source.read(i)
            try:  # a copy stays the copy that it is
                return wanted // count * count + i, to_tensor(raw.data, self.least), raw.label
            except CorruptImage as reason:
                why = why or str(reason)
            bad.append(raw.key)
        raise DataError(
            f"none of {len(bad)} samples in a row, from {bad[0]} to {bad[-1]}, can be decoded; the first: "
            f"{why}; check the data source"
        )


def decoded(raw: Raw) -> torch.Tensor | None:
    try:
        return to_tensor(raw.data)
    except CorruptImage:
        return None
