"""Stored teacher outputs that come with a micro-batch: of its images row for row, and of unrelated sentences."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.order import Order
from core.data.source import DataError, Source
from core.data.tsv import Tables, feature, open_tables
from core.storage import open_store

Ints = NDArray[np.int64]
MOST_SHARDS = 1 << 20  # of the shuffle of a set of sentences; larger sets are shuffled in groups of neighbours
BLOCK = 8192
IMAGE, TEXT = "image_features", "text_features"  # names in Batch.extra


class FeatureSource(ABC):
    """Teacher outputs by row.  Can be pickled and survives a fork: handles are opened by the process that reads."""

    @abstractmethod
    def __len__(self) -> int:
        """Rows."""

    @abstractmethod
    def describe(self) -> dict[str, tuple[int, ...]]:
        """Shape of a row for every teacher, such as (768,)."""

    @abstractmethod
    def read(self, index: Ints) -> dict[str, NDArray[Any]]:
        """Rows (B,) of every teacher: (B, *shape).  Raises DataError and core.storage.StoreError."""


class TsvFeatures(FeatureSource):
    """Vectors of one teacher in tables of base64 float32."""

    def __init__(self, tables: Tables, teacher: str = "teacher") -> None:
        if not len(tables):
            raise DataError(f"{tables}: no rows")
        self.tables, self.teacher = tables, teacher
        self.dim = len(self._row(0))

    def __len__(self) -> int:
        return len(self.tables)

    def describe(self) -> dict[str, tuple[int, ...]]:
        return {self.teacher: (self.dim,)}

    def read(self, index: Ints) -> dict[str, NDArray[Any]]:
        out = np.empty((len(index), self.dim), np.float32)
        for place, row in enumerate(index.tolist()):
            values = self._row(row)
            if len(values) != self.dim:
                raise DataError(f"{self.tables}: row {row} has {len(values)} numbers, row 0 has {self.dim}")
            out[place] = values
        return {self.teacher: out}

    def _row(self, row: int) -> NDArray[np.float32]:
        key, payload = self.tables.pair(row)
        return feature(payload, f"{self.tables}: row {row} ({key})")


def open_features(uri: str, role: str) -> FeatureSource:
    """Vectors in the tables of a folder. role: image_feat or text_feat.  Raises DataError without any."""
    tables = open_tables(open_store(uri), role)
    if tables is None:
        raise DataError(
            f"{uri}: no tables of role {role}; name them in {role}.list, one path a line, or put image or text and "
            "feat into their names; or make features RECIPE=... and set features=require"
        )
    return TsvFeatures(tables)


def place_of_texts(position: int, batches: int) -> tuple[int, int]:
    """Which pass over the sentences, and which batch of it, goes with the image batch at `position` of an epoch.

    The sentences start anew, shuffled again, when all their batches have been used and at every epoch's start.
    """
    return divmod(position, batches)


class TextStream:
    """A companion: as many sentences' vectors as there are images, of a stream of its own.

    Rows are a pure function of (seed, epoch, micro-batch, position), so a run goes on anywhere without replay, and no
    number of ranks or workers changes them.

    micros: micro-batches in a global batch.  epoch_steps: global batches of images in an epoch.
    Raises DataError when the sentences do not fill one global batch.
    """

    def __init__(self, features: FeatureSource, seed: int, micros: int, micro_batch: int, epoch_steps: int) -> None:
        self.features, self.micro_batch = features, micro_batch
        self.batches = len(features) // micros // micro_batch
        if not self.batches:
            raise DataError(
                f"{len(features)} sentences do not fill one batch of {micros * micro_batch}; lower train.batch or "
                "add some"
            )
        together = 1 + len(features) // MOST_SHARDS
        groups = np.full(-(-len(features) // together), together, np.int64)
        groups[-1] -= groups.sum() - len(features)
        self.order = Order(groups, zlib.crc32(f"texts/{seed}".encode()), micros, BLOCK)
        self.passes = -(-epoch_steps // self.batches)  # begun in an epoch, at most

    def rows(self, epoch: int, micro: int, position: int) -> Ints:
        """(B,) rows of the sentences that go with an image batch."""
        number, batch = place_of_texts(position, self.batches)
        positions = np.arange(batch * self.micro_batch, (batch + 1) * self.micro_batch)
        return self.order.index(epoch * self.passes + number, micro, positions)

    def __call__(self, epoch: int, micro: int, position: int, index: Ints) -> dict[str, torch.Tensor]:
        return {TEXT: _only(self.features.read(self.rows(epoch, micro, position)[: len(index)]))}


@dataclass(frozen=True)
class ImageVectors:
    """A companion: the stored vectors of a micro-batch's images."""

    features: FeatureSource

    def __call__(self, epoch: int, micro: int, position: int, index: Ints) -> dict[str, torch.Tensor]:
        """index: a repeated image's copies have numbers of their own, and one vector."""
        return {IMAGE: _only(self.features.read(index % len(self.features)))}


@dataclass(frozen=True)
class FixedTexts:
    """A companion for held-out images: always the same sentence with the same image."""

    features: FeatureSource

    def __call__(self, epoch: int, micro: int, position: int, index: Ints) -> dict[str, torch.Tensor]:
        return {TEXT: _only(self.features.read(index % len(self.features)))}


def _only(rows: dict[str, NDArray[Any]]) -> torch.Tensor:
    (array,) = rows.values()
    return torch.from_numpy(array)


@dataclass(frozen=True)
class Beside:
    """Where a stage's images lie, for what a method reads beside them.

    images, texts: resolved addresses of the folders with the tables of vectors.  micros, micro_batch, epoch_steps: how
    an epoch is cut into batches.  composed: what makes samples other than the source's rows.  training: False for
    held-out images.  stored_images, stored_texts: vectors that the feature store has, in place of tables; they are of
    the images as they are composed.
    """

    source: Source
    images: str
    texts: str
    seed: int
    micros: int
    micro_batch: int
    epoch_steps: int
    composed: str = ""
    training: bool = True
    stored_images: FeatureSource | None = None
    stored_texts: FeatureSource | None = None

    def image_vectors(self) -> ImageVectors:
        """Raises DataError when there is not one vector for each image."""
        if self.stored_images is not None:
            return ImageVectors(self.stored_images)
        if self.composed:
            raise DataError(
                f"data.{self.composed}: stored vectors of tables belong to the images of data.source row for row; "
                "remove this field, make features RECIPE=... and set features=require, or let the teacher see the "
                "images"
            )
        features = open_features(self.images, "image_feat")
        if len(features) != len(self.source):
            raise DataError(
                f"{self.images}: {len(features)} vectors for {len(self.source)} images; vectors belong to images by "
                "row number, so there must be as many, in the same order"
            )
        return ImageVectors(features)

    def text_vectors(self) -> TextStream | FixedTexts:
        stored = self.stored_texts
        features = open_features(self.texts, "text_feat") if stored is None else stored
        if not self.training:
            return FixedTexts(features)
        return TextStream(features, self.seed, self.micros, self.micro_batch, self.epoch_steps)


def check_width(features: FeatureSource, width: int) -> None:
    """Raises DataError unless every vector has as many numbers as the student's."""
    shapes = features.describe()
    if list(shapes.values()) != [(width,)]:
        raise DataError(
            f"stored vectors have shapes {shapes}, the student's {(width,)}: set student.args.num_classes to theirs, "
            "or take another teacher's tables"
        )
