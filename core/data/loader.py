"""Batches: for every optimiser step a rank's canonical micro-batches, the same for any number of ranks and workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from core.data.decode import CorruptImage, to_tensor
from core.data.order import Order
from core.data.rand_augment import rand_augment
from core.data.repeated import RepeatedOrder
from core.data.source import DataError, Raw, Source
from core.data.views import Crops, RandomCrops, View, centre_crop, random_resized_crop, shorten

# More unreadable samples in a row than this is a broken data set, not a few broken files.
MAX_BAD_IN_A_ROW = 1000
DECODED_AT_ONCE = 8  # a decoded photograph can be a hundred times as large as its crop
Ints = NDArray[np.int64]
EvalBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class MicroBatch:
    """One canonical micro-batch of B samples.

    step: optimiser step of the stage.  micro: its number in the global batch, which is also its stream.
    index: int64 (B,), samples in the source, after replacement of unreadable ones; draws are keyed by them.
    views: by View.name, uint8 (B, 3, size, size).  bad: keys of the samples that could not be decoded on the way.
    labels: int64 (B,), -1 where there is none.  extra: what the method's crops and the companions add.
    """

    step: int
    micro: int
    epoch: int
    index: torch.Tensor
    views: dict[str, torch.Tensor]
    bad: list[str] = field(default_factory=list)
    labels: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def pin_memory(self) -> MicroBatch:
        """Called by the DataLoader with pin=True."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        self.extra = {name: tensor.pin_memory() for name, tensor in self.extra.items()}
        self.index, self.labels = self.index.pin_memory(), self.labels.pin_memory()
        return self


class Companion(Protocol):
    """What comes with a micro-batch beside its images, read in the loader's workers: a picklable pure function.

    position: of the micro-batch among those of its stream in the epoch.  index: (B,) samples in the source.
    """

    def __call__(self, epoch: int, micro: int, position: int, index: Ints) -> dict[str, torch.Tensor]: ...


def steps_per_epoch(source_len: int, batch: int, micro_batch: int) -> int:
    """Whole global batches in an epoch: each of batch / micro_batch streams gives that many whole micro-batches."""
    return source_len // (batch // micro_batch) // micro_batch


def train_batches(
    source: Source,
    views: Sequence[View],
    *,
    seed: int,
    batch: int,
    micro_batch: int,
    block: int,
    start_step: int,
    stop_step: int,
    rank: int,
    world: int,
    workers: int,
    prefetch: int,
    pin: bool = False,
    context: str | None = None,
    crops: Crops | None = None,
    companions: Sequence[Companion] = (),
    repeats: int = 1,
) -> Iterator[list[MicroBatch]]:
    """Micro-batches of this rank, one list for each step in [start_step, stop_step).

    A global batch is M = batch / micro_batch micro-batches; number m reads stream m of the sample order, and rank r of
    W gets numbers r M / W to (r + 1) M / W.  workers: processes (0: in this one); prefetch: micro-batches that each
    prepares ahead; pin: page-locked memory, for copies to a GPU; context: how workers start (None: the platform's way).
    crops: where views are cut out (None: each at random); companions: what else comes with each micro-batch.
    repeats: copies of a sample, see core.data.repeated; their indices differ by multiples of the source's length.
    Raises DataError at once for impossible sizes.
    """
    micros = batch // micro_batch
    if batch % micro_batch or micros % world:
        raise DataError(
            f"batch {batch} cannot be shared out: it must be a multiple of micro_batch ({micro_batch}) and its "
            f"{micros} micro-batches a multiple of the number of ranks ({world}); change one of these three"
        )
    epoch_steps = steps_per_epoch(len(source), batch, micro_batch)
    if not epoch_steps:
        raise DataError(f"{len(source)} samples do not fill one batch of {batch}; lower train.batch or add images")
    if len({view.resize for view in views}) > 1:
        raise DataError("views must agree in `resize`: an image is resized once, before all crops")
    if len({view.name for view in views}) != len(views):
        raise DataError(f"views need different names: {', '.join(view.name for view in views)}")
    share = range(rank * micros // world, (rank + 1) * micros // world)
    order = Order(source.shard_sizes, seed, micros, block)
    if repeats > 1:
        order = RepeatedOrder(source.shard_sizes, seed, micros, block, repeats)
    dataset = _TrainSet(source, views, crops or RandomCrops(views), companions, order, seed, micro_batch, epoch_steps)
    loader = _loader(dataset, _Tasks(range(start_step, stop_step), share), workers, prefetch, pin, context)
    return _by_step(loader, len(share))


def _by_step(loader: DataLoader[MicroBatch], share: int) -> Iterator[list[MicroBatch]]:
    step: list[MicroBatch] = []
    for micro in loader:
        step.append(micro)
        if len(step) == share:
            yield step
            step = []


def eval_batches(
    source: Source, size: int, batch: int, workers: int, rank: int = 0, world: int = 1
) -> Iterator[EvalBatch]:
    """Every image once, in index order: uint8 (B, 3, size, size), labels int64 (B,), indices int64 (B,).

    Short side to `size`, centre crop.  Rank r gets the r-th of `world` contiguous parts; the last batch may be smaller.
    Unreadable images are left out, so the indices that come tell how many there were.
    """
    edges = [len(source) * r // world for r in (rank, rank + 1)]
    tasks = [range(first, min(first + batch, edges[1])) for first in range(edges[0], edges[1], batch)]
    for item in _loader(_EvalSet(source, size), tasks, workers, prefetch=2):
        if len(item[2]):
            yield item


@dataclass(frozen=True)
class _Tasks:
    """(step, micro) pairs in the order in which they are needed; not a list, as there are millions."""

    steps: range
    micros: range

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in self.micros)

    def __len__(self) -> int:
        return len(self.steps) * len(self.micros)


class _TrainSet(Dataset[MicroBatch]):
    """(step, micro) -> MicroBatch, a pure function."""

    def __init__(
        self, source: Source, views: Sequence[View], crops: Crops, companions: Sequence[Companion], order: Order,
        seed: int, micro_batch: int, epoch_steps: int,
    ) -> None:  # fmt: skip
        self.source, self.views, self.crops, self.companions = source, list(views), crops, companions
        self.order = order
        self.seed, self.micro_batch, self.epoch_steps = seed, micro_batch, epoch_steps

    def __getitem__(self, task: tuple[int, int]) -> MicroBatch:
        step, micro = task
        epoch, place = divmod(step, self.epoch_steps)
        positions = np.arange(place * self.micro_batch, (place + 1) * self.micro_batch)
        index = self.order.index(epoch, micro, positions)
        views = {v.name: torch.empty(len(index), 3, v.size, v.size, dtype=torch.uint8) for v in self.views}
        labels, extra = torch.full((len(index),), -1), dict[str, torch.Tensor]()
        bad: list[str] = []
        for first in range(0, len(index), DECODED_AT_ONCE):
            rows = slice(first, first + DECODED_AT_ONCE)
            found = [self._readable(wanted, bad) for wanted in index[rows].tolist()]
            index[rows] = [i for i, _, _ in found]
            labels[rows] = torch.tensor([-1 if label is None else label for _, _, label in found])
            cut = self._crop({name: view[rows] for name, view in views.items()}, [x for _, x, _ in found], epoch,
                             index[rows])  # fmt: skip
            for name, tensor in cut.items():
                extra.setdefault(name, tensor.new_empty(len(index), *tensor.shape[1:]))[rows] = tensor
        for companion in self.companions:
            extra |= companion(epoch, micro, place, index)
        return MicroBatch(step, micro, epoch, torch.from_numpy(index), views, bad, labels, extra)

    def _crop(
        self, out: dict[str, torch.Tensor], images: list[torch.Tensor], epoch: int, samples: Ints
    ) -> dict[str, torch.Tensor]:
        """Fill `out`, each (b, 3, size, size), with the views of every image; returns what else the crops tell."""
        images = [shorten(image, self.views[0].resize) for image in images]
        cropped = self.crops(self.seed, epoch, samples, np.array([image.shape[1:] for image in images]))
        for number, view in enumerate(self.views):
            boxes, flips = cropped.boxes[view.name], cropped.flips[view.name]
            for row, image in enumerate(images):
                crop = random_resized_crop(image, boxes[row], bool(flips[row]), view.size, view.interpolation)
                key = (self.seed, epoch, int(samples[row]), number)
                out[view.name][row] = rand_augment(crop, view.rand_augment, key) if view.rand_augment else crop
        return {name: torch.from_numpy(array) for name, array in cropped.extra.items()}

    def _readable(self, wanted: int, bad: list[str]) -> tuple[int, torch.Tensor, int | None]:
        """The wanted sample or the next one that can be decoded; keys of those that cannot are added to `bad`."""
        count = len(self.source)
        for ahead in range(min(count, MAX_BAD_IN_A_ROW)):
            i = (wanted + ahead) % count
            raw = self.source.read(i)
            image = _decoded(raw)
            if image is not None:
                return wanted // count * count + i, image, raw.label  # a copy stays the copy that it is
            bad.append(raw.key)
        raise DataError(
            f"none of {len(bad)} samples in a row, from {bad[0]} to {bad[-1]}, can be decoded; check the data source"
        )


class _EvalSet(Dataset[EvalBatch]):
    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, task: range) -> EvalBatch:
        images, labels, index = [], [], []
        for i in task:
            raw = self.source.read(i)
            image = _decoded(raw)
            if image is not None:
                images.append(centre_crop(image, self.size))
                labels.append(raw.label)
                index.append(i)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(index, dtype=torch.int64)


def _decoded(raw: Raw) -> torch.Tensor | None:
    try:
        return to_tensor(raw.data)
    except CorruptImage:
        return None


def _loader(
    dataset: Dataset[Any], tasks: Any, workers: int, prefetch: int, pin: bool = False, context: str | None = None
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        sampler=tasks,
        batch_size=None,  # one item is a whole batch already
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals_to_parent,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # else it would draw from the global one, which belongs to the model
    )


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals_to_parent(worker: int) -> None:
    """A scheduler signals every process of a job; the rank must still get its batches while it saves and stops."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
