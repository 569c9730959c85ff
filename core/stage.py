"""Everything one stage of a run needs, built from the recipe: data, student, teachers, method, engine."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from core import coupled
from core.batches import clean_batch, on_device
from core.checkpoint import Reader, restore
from core.comm import Comm
from core.config import ConfigError
from core.data.loader import Companion, EvalBatch, eval_batches, train_batches
from core.data.samples import MicroBatch
from core.data.source import Source
from core.engine import Engine
from core.inputs import open_inputs, shard_cache, stage_steps
from core.manifest import CheckpointError
from core.methods.base import Batch, Info, Method, Outputs, Report
from core.models.layouts.keys import few
from core.models.students import build_student
from core.models.teachers import FrozenTeacher, load_teachers
from core.models.vit import resize_pos_embed
from core.recipe import Recipe, Train


@dataclass
class Stage:
    name: str
    recipe: Recipe
    settings: Train
    steps: int
    first_step: int  # steps of the stages before
    run_steps: int  # of all stages
    source: Source
    held: Source | None  # held-out images
    method: Method
    teachers: dict[str, Outputs]
    engine: Engine
    comm: Comm
    rebuild: Callable[[], nn.Module]  # another module like the engine's, for comparisons
    companions: list[Companion]
    held_companions: list[Companion]
    features: set[str]  # stored sets that it reads

    def batches(self, start: int) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of every step from `start` on."""
        s, loader = self.settings, self.recipe.loader
        return train_batches(
            self.source, self.method.views(), seed=self.recipe.seed, batch=s.batch, micro_batch=s.micro_batch,
            block=self.recipe.data.block, start_step=start, stop_step=self.steps, rank=self.comm.rank,
            world=self.comm.world, workers=loader.workers, prefetch=loader.prefetch,
            pin=self.comm.device.type == "cuda", crops=self.method.crops(), companions=self.companions,
            repeats=self.recipe.data.repeats, replay=self.recipe.data.views, fast=self.recipe.data.pixels == "fast",
        )  # fmt: skip

    def batch(self, micro: MicroBatch) -> Batch:
        return on_device(micro, self.method, self.recipe, self.engine.device)

    def seed_network(self, step: int, micro: MicroBatch) -> None:
        """Key what the student draws itself (stochastic depth) by canonical micro-batch, whatever the world size."""
        torch.manual_seed(zlib.crc32(f"{self.recipe.seed}/{self.first_step + step}/{micro.micro}".encode()))

    def targets(self, batch: Batch) -> Any:
        """What the method makes of its teachers' outputs."""
        return self.method.targets({name: teacher(batch) for name, teacher in self.teachers.items()}, batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Report]:
        """Teachers, student and loss of one micro-batch."""
        targets = self.targets(batch)
        return self.method.losses(self.engine.forward(batch), targets, batch)

    def backward(self, step: int, micros: list[MicroBatch]) -> Iterator[tuple[Tensor, Report]]:
        """Gradients of one step: the loss and report of each micro-batch, or of all where the loss couples them."""
        if self.method.couples_batch:
            yield coupled.backward(self, step, micros)
            return
        for micro in micros:
            self.seed_network(step, micro)
            loss, report = self.loss(self.batch(micro))
            self.engine.backward(loss)
            yield loss, report

    @cached_property
    def _any_heldout(self) -> EvalBatch:
        """An image that can be read, for ranks that have run out of theirs; black where there is none."""
        assert self.held is not None
        side, row = self.settings.img_size, torch.zeros(1, dtype=torch.int64)
        black = torch.zeros(1, 3, side, side, dtype=torch.uint8), row - 1, row
        return next(eval_batches(self.held, side, 1, 0), black)

    @torch.no_grad()
    def heldout(self) -> float | None:
        """Mean loss over all held-out images: evaluation transform and mode, nothing dropped; None without images."""
        if self.held is None:
            return None
        device, side, share = self.engine.device, self.settings.img_size, -(-len(self.held) // self.comm.world)
        size = min(self.settings.micro_batch, share)
        batches = eval_batches(self.held, side, size, 0, self.comm.rank, self.comm.world)
        total = torch.zeros(2, device=device)  # losses of images, images
        self.engine.train(False)
        for _ in range(-(-share // size)):  # as often on every rank: ZeRO-3 forwards are collective
            found = next(batches, None)
            count = 0 if found is None else len(found[2])
            images, labels, index = found or self._any_heldout
            extra = {k: v.to(device) for read in self.held_companions for k, v in read(0, 0, 0, index.numpy()).items()}
            loss, _ = self.loss(clean_batch(images, labels, index, self.method, self.recipe.seed, device, extra))
            total += torch.stack([loss.float() * count, loss.new_tensor(count, dtype=torch.float32)])
        self.engine.train(True)
        losses, images_seen = self.comm.sum(total).tolist()
        return losses / images_seen if images_seen else None


def build(recipe: Recipe, name: str, step: int, root: str, comm: Comm, reader: Reader | None) -> tuple[Stage, int]:
    """A stage ready to train, and the step of it to start at.

    step: taken by the run so far.  reader: the checkpoint to go on from: one of this stage (everything is restored) or
    the last one of the stage before (weights and method state are taken over, the optimiser starts afresh).
    Raises ConfigError, DataError, WeightsError, StoreError, CheckpointError.
    """
    cache = shard_cache(recipe.loader)
    inputs = open_inputs(recipe, name, root, cache)
    whole, recipe, settings, method, info = recipe, inputs.recipe, inputs.settings, inputs.method, inputs.info
    check_world(settings, comm.world)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32

    def load(names: set[str]) -> dict[str, FrozenTeacher]:
        some = dataclasses.replace(recipe, teachers={k: t for k, t in recipe.teachers.items() if k in names})
        return load_teachers(some, info, inputs.teachers, root, comm.device, dtype)

    teachers = inputs.stored.teachers(inputs, load)

    # A checkpoint holds all weights; the recipe's own may be of another stage's image size.
    start_from = recipe.student if reader is None else dataclasses.replace(recipe.student, weights="")

    def fresh() -> nn.Module:
        student, _ = build_student(start_from, settings.img_size, recipe.seed, root, method.initialise)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed + 1)
            return method.build(student, info, inputs.teachers)

    module = fresh()
    here = reader is not None and reader.manifest.position.stage == name
    if reader is not None:
        _take_over(module, reader, method, here, info)
    engine = Engine(module, method.param_groups(module), settings, zero_stage=recipe.zero.stage, world=comm.world,
                    per_parameter_clip=method.per_parameter_clip, device=comm.device)  # fmt: skip
    method.to(comm.device)
    state = restore(reader.run, reader.manifest, engine) if reader is not None and here else None
    method.attach(engine, fresh)
    if reader is not None and (here or _same_method(whole, reader, name)):
        method.load_state(state if state is not None else reader.whole("method"))
    start = reader.manifest.position.stage_step if reader is not None and here else 0
    steps = {each: inputs.steps if each == name else stage_steps(whole, each, root, cache)
             for each in whole.stage_names()}  # fmt: skip
    stage = Stage(name, recipe, settings, inputs.steps, step - start, sum(steps.values()), inputs.source, inputs.held,
                  method, teachers, engine, comm, fresh, inputs.companions, inputs.held_companions,
                  inputs.stored.sets())  # fmt: skip
    return stage, start


def check_world(settings: Train, world: int) -> None:
    """Raises ConfigError when the canonical micro-batches cannot be shared out equally."""
    micros = settings.batch // settings.micro_batch
    if micros % world:
        allowed = ", ".join(str(n) for n in range(1, micros + 1) if micros % n == 0)
        raise ConfigError(
            f"launch.ranks: {micros} micro-batches (batch {settings.batch} / micro_batch {settings.micro_batch}) "
            f"cannot be shared by {world} ranks; allowed: {allowed}"
        )


def _same_method(recipe: Recipe, reader: Reader, name: str) -> bool:
    """Whether the stage that the checkpoint is of had the method of stage `name`, and so a state that it knows."""
    return recipe.at(reader.manifest.position.stage).method.name == recipe.at(name).method.name


def _take_over(module: nn.Module, reader: Reader, method: Method, here: bool, info: Info) -> None:
    """Load buffers, and from another stage also weights, whose position table may be of another image size.

    Raises CheckpointError when names or shapes are not those of the module.
    """
    own, given = module.state_dict(), reader.whole("buffer") if here else method.take_over(reader.model())
    for name, value in given.items():
        if name.endswith("pos_embed") and name in own and own[name].shape != value.shape:
            prefix = own[name].shape[1] - info.grid[0] * info.grid[1]
            side = math.isqrt(value.shape[1] - prefix)
            given[name] = resize_pos_embed(value, (side, side), info.grid, prefix)
    wrong = {name for name in given.keys() & own.keys() if given[name].shape != own[name].shape}
    wrong |= given.keys() - own.keys() if here else given.keys() ^ own.keys()
    if wrong:
        raise CheckpointError(f"{reader.manifest.key}: does not fit this recipe's module: {few(sorted(wrong))}")
    module.load_state_dict(given, strict=not here)
