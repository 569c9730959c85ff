"""What a step costs: parts of a recipe's step alone, and DeepSpeed's engine against the same step in plain PyTorch.

Variants take turns within one process, so drifts of the machine touch all alike; ratios are medians of paired rounds.
"""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from core.comm import Comm
from core.data.samples import MicroBatch
from core.engine import Engine
from core.methods.base import Batch, Outputs
from core.plain import PlainEngine
from core.recipe import Recipe
from core.stage import Stage, build

WARM, ROUNDS = 5, 30


def bench(recipe: Recipe, root: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Medians in seconds per step of a recipe's first stage on this rank, and ratios. All ranks must call it."""
    comm = Comm(torch.device(recipe.launch.device if recipe.launch.device != "auto" else "cpu"))
    stage, _ = build(recipe, recipe.stage_names()[0], 0, root, comm, None)
    micros = next(stage.batches(0))
    parts = _parts(stage, micros)
    steps = {f"engine, ZeRO {stage.recipe.zero.stage}": _stepper(stage, stage.engine, micros)}
    for zero, engine in _engines(stage):
        steps[zero] = _stepper(stage, engine, micros)
    seconds = _take_turns({**parts, **steps}, rounds, comm)
    batch = stage.settings.batch
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = seconds["plain PyTorch"]
    ratios = {name: statistics.median(a / b for a, b in zip(seconds[name], base, strict=True)) for name in steps}
    return {
        "recipe": recipe.name, "device": _device(comm), "world": comm.world, "precision": stage.settings.precision,
        "torch": torch.__version__, "rounds": rounds, "batch": batch, "seconds_per_step": median,
        "quartiles": {n: statistics.quantiles(v, n=4) for n, v in seconds.items()},
        "images_per_s": {n: batch / s for n, s in median.items()}, "ratio_to_plain": ratios,
    }  # fmt: skip


def _parts(stage: Stage, micros: list[MicroBatch]) -> dict[str, Callable[[], None]]:
    """Data, augmentation and every teacher alone, for one step's micro-batches."""
    batches: Iterator[list[MicroBatch]] = stage.batches(0)
    ready = [stage.batch(micro) for micro in micros]

    def load() -> None:
        nonlocal batches
        if next(batches, None) is None:
            batches = stage.batches(0)
            next(batches)

    def colour() -> None:
        for micro in micros:
            stage.batch(micro)

    alone = {f"teacher {name} alone": partial(_forward, teacher, ready) for name, teacher in stage.teachers.items()}
    return {"loader alone": load, "colour alone": colour, **alone}


def _forward(teacher: Outputs, batches: list[Batch]) -> None:
    for batch in batches:
        teacher(batch)


def _engines(stage: Stage) -> Iterator[tuple[str, Any]]:
    """The same module under plain PyTorch and under the other ZeRO stages that the precision allows."""
    settings, method, comm = stage.settings, stage.method, stage.comm
    plain = stage.rebuild().to(comm.device)
    yield "plain PyTorch", PlainEngine(plain, method.param_groups(plain), settings, comm, method.per_parameter_clip)
    for zero in (0, 1, 2, 3):
        if zero != stage.recipe.zero.stage and not (zero == 0 and settings.precision == "bf16"):
            module = stage.rebuild()
            groups, clip = method.param_groups(module), method.per_parameter_clip
            yield f"engine, ZeRO {zero}", Engine(module, groups, settings, zero_stage=zero, world=comm.world,
                                                 per_parameter_clip=clip, device=comm.device)  # fmt: skip


def _stepper(stage: Stage, engine: Any, micros: list[MicroBatch]) -> Callable[[], None]:
    """One whole optimiser step with this engine: teachers, student, loss, backward, update, statistics."""
    own = copy.copy(stage)
    own.engine = engine
    engine.train(True)

    def step() -> None:
        for micro in micros:
            loss, _ = own.loss(own.batch(micro))
            engine.backward(loss)
        engine.step(lambda scale: 1e-4 * scale)
        own.method.after_step(0, own.comm)

    return step


def _take_turns(variants: dict[str, Callable[[], None]], rounds: int, comm: Comm) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(WARM + rounds):
        for name, run in variants.items():
            comm.barrier()
            began = time.perf_counter()
            run()
            if comm.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _device(comm: Comm) -> str:
    if comm.device.type == "cuda":
        return torch.cuda.get_device_name(comm.device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads a rank)"
