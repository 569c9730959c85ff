"""Stored vectors by row, for companions that read them beside the images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data.features import FeatureSource
from core.features.codec import FeatureError, decode
from core.features.rows import Rows

Ints = NDArray[np.int64]


class StoreFeatures(FeatureSource):
    """Vectors of one teacher in the feature store.

    gapless: rows without a vector are not counted, and those behind them move up, where nothing goes by rows.
    """

    def __init__(self, teacher: str, rows: Rows, gapless: bool) -> None:
        self.teacher, self.rows = teacher, rows
        bad = rows.bad(0) if gapless else np.zeros(0, np.int64)
        self._before = bad - np.arange(len(bad))  # vectors in front of each gap
        self._count = len(rows) - len(bad)

    def __len__(self) -> int:
        return self._count

    def describe(self) -> dict[str, tuple[int, ...]]:
        return {self.teacher: self.rows.layout["cls"][1]}

    def rows_of(self, index: Ints) -> Ints:
        """Where vectors (B,) stand in what they are of."""
        return np.asarray(index + np.searchsorted(self._before, index, side="right"))

    def read(self, index: Ints) -> dict[str, NDArray[Any]]:
        """Raises FeatureError, StoreError."""
        stored, missing = self.rows.read(0, self.rows_of(index))
        if len(missing):
            raise FeatureError(
                f"teacher {self.teacher}: no vector is stored for row {int(index[missing[0]])}, whose image could not "
                f"be read when vectors were made; has it been replaced since? remove {self.rows.uri}, make them anew"
            )
        return {self.teacher: decode("cls", stored).numpy()}
