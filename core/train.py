"""The loop: the same for every method, launcher, ZeRO stage and device."""

from __future__ import annotations

import enum
import json
import zlib
from collections.abc import Callable
from typing import Any

import torch

from core import checkpoint
from core.checkpoint import Position, Reader
from core.comm import Comm, StopFlag
from core.config import Recipe, fingerprint
from core.data.loader import MicroBatch
from core.engine import pick_device
from core.metrics import Meter, MetricsLog, Pace
from core.stage import Stage, build
from core.storage import Store

Progress = Callable[[dict[str, Any]], None]


class Outcome(enum.Enum):
    FINISHED = "finished"
    PREEMPTED = "preempted"


class NonFiniteLossError(RuntimeError):
    """The loss was not a number too many times in a row."""


def train(
    recipe: Recipe, run: Store, root: str, attempt: int, on_progress: Progress, should_stop: Callable[[], bool]
) -> Outcome:
    """Train all stages, from the newest checkpoint if there is one.

    run: the run's folder in the store.  on_progress: called with every logged row (rank 0 only).  should_stop: this
    rank's wish to stop; all ranks then save at the same step and leave.
    """
    comm = Comm(pick_device(recipe.launch.device))
    manifest = checkpoint.newest(run, fingerprint(recipe))
    reader = Reader(run, manifest) if manifest else None
    step = manifest.position.step if manifest else 0
    log = MetricsLog(run, attempt, step, recipe.log.flush_s)
    stop = StopFlag(comm)
    names = recipe.stage_names()
    done = names.index(manifest.position.stage) + manifest.position.finished if manifest else 0
    outcome = Outcome.FINISHED
    for name in names[done:]:
        stage, start = build(recipe, name, step, root, comm, reader)
        stage.first_step = step - start
        outcome, step = _run_stage(stage, start, run, attempt, log, stop, on_progress, should_stop)
        if outcome is Outcome.PREEMPTED:
            break
        if name != names[-1]:
            last = checkpoint.newest(run, fingerprint(recipe))
            assert last is not None
            reader = Reader(run, last)
    stop.close()
    log.close()
    return outcome


def _run_stage(
    stage: Stage, start: int, run: Store, attempt: int, log: MetricsLog, stop: StopFlag, on_progress: Progress,
    should_stop: Callable[[], bool],
) -> tuple[Outcome, int]:  # fmt: skip
    """One stage from step `start` to its end or to a wish to stop; returns the outcome and the run's step."""
    recipe, settings, method, engine, comm = stage.recipe, stage.settings, stage.method, stage.engine, stage.comm
    meter, pace, bad = Meter(comm), Pace(settings.batch), 0
    batches = stage.batches(start)
    engine.train(True)
    if start == 0:
        _write(
            stage, log, {"stage": stage.name, "step": stage.first_step, "heldout_loss": stage.heldout()}, on_progress
        )
    for step in range(start, stage.steps):
        pace.wait()
        micros = next(batches)
        pace.go()
        for micro in micros:
            torch.manual_seed(_key(recipe.seed, stage.first_step + step, micro.micro))
            loss, report = stage.loss(stage.batch(micro))
            engine.backward(loss)
            meter.add({"loss": loss, **report})
        meter.watch(loss)
        values = method.schedules(step)
        engine.step(values["lr"], values.get("weight_decay"))
        meter.add(method.after_step(step, comm))
        bad += sum(len(micro.bad) for micro in micros)

        taken, total = step + 1, stage.first_step + step + 1
        stopping = stop.exchange(should_stop()) and taken < stage.steps
        saving = taken % recipe.checkpoint.every_steps == 0 or taken == stage.steps or stopping
        if saving or taken % recipe.log.every_steps == 0 or taken == 1:
            row = {"stage": stage.name, "step": total, "epoch": micros[0].epoch, **meter.read(), **values}
            _guard(row, stage, run, micros)
            row |= pace.read(stage.steps - taken) | {"bad_samples": bad, "steps": stage.first_step + stage.steps}
            if saving:
                row["heldout_loss"] = stage.heldout()
            _write(stage, log, row, on_progress)
        if saving:
            log.flush() if comm.rank == 0 else None
            position = Position(stage.name, taken, total, taken == stage.steps)
            checkpoint.save(
                run, engine, method.state(), comm, position, fingerprint(recipe), attempt, recipe.zero.stage
            )
            if comm.rank == 0:
                checkpoint.retain(run, recipe.checkpoint.keep)
            comm.barrier()
            pace.restart()
        if stopping:
            return Outcome.PREEMPTED, total
    return Outcome.FINISHED, stage.first_step + stage.steps


def _key(seed: int, step: int, micro: int) -> int:
    """Seed of what a network draws itself (stochastic depth) in one canonical micro-batch, whatever the world size."""
    return zlib.crc32(f"{seed}/{step}/{micro}".encode())


def _write(stage: Stage, log: MetricsLog, row: dict[str, Any], on_progress: Progress) -> None:
    row = {k: v for k, v in row.items() if v is not None}
    if stage.comm.rank == 0:
        log.write(row)
        on_progress(row)


def _guard(row: dict[str, Any], stage: Stage, run: Store, micros: list[MicroBatch]) -> None:
    """Stop when the loss has not been a number for too long, before a checkpoint could be overwritten.

    Raises NonFiniteLossError; the samples of the step are written to the run folder.
    """
    if row.pop("bad_losses") < stage.settings.max_bad_losses:
        return
    samples = {"step": row["step"], "samples": [int(i) for micro in micros for i in micro.index]}
    key = f"nonfinite/rank-{stage.comm.rank:04d}.json"
    run.put(key, json.dumps(samples).encode())
    raise NonFiniteLossError(
        f"the loss was not finite {stage.settings.max_bad_losses} times in a row before step {row['step']}; the last "
        f"good checkpoint is kept, the samples of the step are in {run.uri}/{key}. Try a lower train.lr, train.clip, "
        f"or train.precision=fp32"
    )
