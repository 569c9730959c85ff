"""Batches: for every optimiser step a rank's canonical micro-batches, the same for any number of ranks and workers."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core import sockets
from core.data.cutting import BOX, check_policies
from core.data.order import Order
from core.data.prefetch import Prefetch
from core.data.repeated import RepeatedOrder
from core.data.samples import Ints, MicroBatch, Samples, decoded
from core.data.source import DataError, Source
from core.data.views import Crops, RandomCrops, View, centre_crop

EvalBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    replay: int = 0,
    fast: bool = False,
) -> Iterator[list[MicroBatch]]:
    """Micro-batches of this rank, one list for each step in [start_step, stop_step).

    A global batch is M = batch / micro_batch micro-batches; number m reads stream m of the sample order, and rank r of
    W gets numbers r M / W to (r + 1) M / W.  workers: processes (0: in this one); prefetch: micro-batches that each
    prepares ahead; pin: page-locked memory, for copies to a GPU; context: how workers start (None: the platform's way).
    crops: where views are cut out (None: each at random); companions: what else comes with each micro-batch.
    repeats: copies of a sample, see core.data.repeated; their indices differ by multiples of the source's length.
    replay: above 0, epoch e has the crops and colours of epoch e % replay.
    fast: what core.data.cutting says of the two ways to make pixels.
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
    if fast:
        check_policies(views)
    share = range(rank * micros // world, (rank + 1) * micros // world)
    order = source.order(seed, micros, block)
    if repeats > 1:
        order = RepeatedOrder(source.shard_sizes, seed, micros, block, repeats)
    dataset = _TrainSet(source, views, crops or RandomCrops(views), companions, order, seed, micro_batch, epoch_steps,
                        replay, fast, Prefetch(source, order, share))  # fmt: skip
    loader = in_workers(dataset, _Tasks(range(start_step, stop_step), share), workers, prefetch, pin, context)
    return _by_step(loader, len(share))


def _by_step(loader: DataLoader[MicroBatch], share: int) -> Iterator[list[MicroBatch]]:
    step: list[MicroBatch] = []
    for micro in loader:
        step.append(micro)
        if len(step) == share:
            yield step
            step = []


def row_batches(
    source: Source, views: Sequence[View], tasks: Iterable[tuple[Any, Ints, int]], *, seed: int, workers: int,
    prefetch: int, pin: bool = False, crops: Crops | None = None, fast: bool = False,
) -> Iterator[tuple[Any, MicroBatch]]:  # fmt: skip
    """Given samples with the draws of a given epoch: of tasks (tag, index (B,), epoch), the tag and what was cut.

    Tasks are taken as they are needed: `prefetch` ahead for each worker.
    """
    dataset = _RowSet(Samples(source, views, crops or RandomCrops(views), seed, fast))
    yield from in_workers(dataset, tasks, workers, prefetch, pin)


def clean_batches(
    source: Source, size: int, tasks: Iterable[tuple[Any, range]], workers: int, prefetch: int
) -> Iterator[tuple[Any, EvalBatch]]:
    """Images of tasks (tag, range), as `eval_batches` gives them, with the tag."""
    yield from in_workers(_TaggedEvalSet(_EvalSet(source, size)), tasks, workers, prefetch)


def eval_batches(
    source: Source, size: int, batch: int, workers: int, rank: int = 0, world: int = 1
) -> Iterator[EvalBatch]:
    """Every image once, in index order: uint8 (B, 3, size, size), labels int64 (B,), indices int64 (B,).

    Short side to `size`, centre crop.  Rank r gets the r-th of `world` contiguous parts; the last batch may be smaller.
    Unreadable images are left out, so the indices that come tell how many there were.
    """
    edges = [len(source) * r // world for r in (rank, rank + 1)]
    tasks = [range(first, min(first + batch, edges[1])) for first in range(edges[0], edges[1], batch)]
    for item in in_workers(_EvalSet(source, size), tasks, workers, prefetch=2):
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
        seed: int, micro_batch: int, epoch_steps: int, replay: int, fast: bool, prefetch: Prefetch,
    ) -> None:  # fmt: skip
        self.made = Samples(source, views, crops, seed, fast)
        self.companions, self.order, self.prefetch = companions, order, prefetch
        self.micro_batch, self.epoch_steps, self.replay = micro_batch, epoch_steps, replay

    def __getitem__(self, task: tuple[int, int]) -> MicroBatch:
        step, micro = task
        epoch, place = divmod(step, self.epoch_steps)
        positions = np.arange(place * self.micro_batch, (place + 1) * self.micro_batch)
        self.prefetch.at(epoch, place * self.micro_batch)
        index = self.order.index(epoch, micro, positions)
        made = self.made(index, epoch % self.replay if self.replay else epoch)
        made.step, made.micro, made.epoch = step, micro, epoch
        for companion in self.companions:
            found = companion(epoch, micro, place, made.index.numpy())
            _compare_boxes(found, made.extra)
            made.extra |= {name: value for name, value in found.items() if name not in made.extra}
        return made


@dataclass(frozen=True)
class _RowSet(Dataset[tuple[Any, MicroBatch]]):
    made: Samples

    def __getitem__(self, task: tuple[Any, Ints, int]) -> tuple[Any, MicroBatch]:
        tag, index, drawn = task
        return tag, self.made(index, drawn)


class _EvalSet(Dataset[EvalBatch]):
    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size

    def __getitem__(self, task: range) -> EvalBatch:
        images, labels, index = [], [], []
        for i in task:
            raw = self.source.read(i)
            image = decoded(raw)
            if image is not None:
                images.append(centre_crop(image, self.size))
                labels.append(raw.label)
                index.append(i)
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return stacked, torch.tensor(labels, dtype=torch.int64), torch.tensor(index, dtype=torch.int64)


def _compare_boxes(stored: dict[str, torch.Tensor], drawn: dict[str, torch.Tensor]) -> None:
    """Raises DataError where a companion remembers other crops (-1: none) than the images now give."""
    for name in stored.keys() & drawn.keys():
        if name.startswith(BOX) and ((stored[name] != drawn[name]) & (stored[name] >= 0)).any():
            raise DataError(
                f"stored features are of other crops of view {name.removeprefix(BOX)}: images have been replaced since "
                "they were made; make them again (make features RECIPE=... VERIFY=1 finds them), or set features=off"
            )


@dataclass(frozen=True)
class _TaggedEvalSet(Dataset[tuple[Any, EvalBatch]]):
    images: _EvalSet

    def __getitem__(self, task: tuple[Any, range]) -> tuple[Any, EvalBatch]:
        return task[0], self.images[task[1]]


def in_workers(
    dataset: Dataset[Any], tasks: Any, workers: int, prefetch: int, pin: bool = False, context: str | None = None
) -> DataLoader[Any]:
    """Items of `dataset` for each of `tasks`, in their order, made by worker processes; a generator of its own."""
    if workers:
        sockets.shorten()  # by which workers send tensors
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
