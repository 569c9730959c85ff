"""The loop: the same for every method, launcher, ZeRO stage and device."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from core.attempt import Attempt
from core.checkpoint import Reader, newest
from core.comm import Comm, StopFlag
from core.config import Recipe, fingerprint
from core.engine import pick_device
from core.guard import LossGuard, Quarantine
from core.guard import NonFiniteLossError as NonFiniteLossError
from core.manifest import Position
from core.metrics import Meter, MetricsLog, Pace
from core.stage import Stage, build
from core.storage import Store


class Outcome(enum.Enum):
    FINISHED = "finished"
    PREEMPTED = "preempted"


def train(
    recipe: Recipe, run: Store, root: str, attempt: int, on_progress: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
) -> Outcome:  # fmt: skip
    """Train all stages, from the newest sound checkpoint if there is one.

    run: the run's folder in the store.  on_progress: called with every logged row (rank 0 only).  should_stop: this
    rank's wish to stop; all ranks then save at the same step and leave.
    Raises NonFiniteLossError and DataError (too many broken images) on all ranks alike, and what `build` raises.
    """
    comm = Comm(pick_device(recipe.launch.device))
    identity = fingerprint(recipe)
    last = newest(run, identity, verify=comm)
    step = last.position.step if last else 0
    log = MetricsLog(run, attempt, step, recipe.log.flush_s, recipe.log.tensorboard and comm.rank == 0)
    own = Attempt(recipe, identity, run, attempt, comm, log, StopFlag(comm), on_progress, should_stop)
    names = recipe.stage_names()
    done = names.index(last.position.stage) + last.position.finished if last else 0
    outcome = Outcome.FINISHED
    with closing(log):
        for name in names[done:]:
            stage, start = build(recipe, name, step, root, comm, Reader(run, last) if last else None)
            outcome, step = _train_stage(own, stage, start)
            if outcome is Outcome.PREEMPTED:
                break
            last = newest(run, identity)
        own.stop.close()
    return outcome


def _train_stage(own: Attempt, stage: Stage, start: int) -> tuple[Outcome, int]:
    """One stage from its step `start` to its end or to a wish to stop; returns the outcome and the run's step."""
    recipe, settings, method, engine, comm = own.recipe, stage.settings, stage.method, stage.engine, own.comm
    meter, pace, losses = Meter(comm), Pace(settings.batch), LossGuard(own.run, comm, settings.max_bad_losses)
    quarantine = Quarantine(own.run, comm, len(stage.source), recipe.data.max_bad_share)
    batches, last = stage.batches(start), stage.first_step + stage.steps
    engine.train(True)
    if start == 0:
        own.tell({"stage": stage.name, "step": stage.first_step, "heldout_loss": stage.heldout()})
        pace.restart()
    for step in range(start, stage.steps):
        pace.wait()
        micros = next(batches)
        pace.go()
        for loss, report in stage.backward(step, micros):
            meter.add({"loss": loss, **report})
        values = method.schedules(step)
        engine.step(partial(method.lr, step), values.get("weight_decay"))
        meter.add(method.after_step(step, comm))
        quarantine.add(micros)

        taken, total = step + 1, stage.first_step + step + 1
        losses.add(total, loss, micros)
        stopping = own.stopping() and taken < stage.steps
        saving = taken % recipe.checkpoint.every_steps == 0 or taken == stage.steps or stopping
        if saving or taken % recipe.log.every_steps == 0 or taken == 1:
            row = {
                "stage": stage.name,
                "step": total,
                "steps": stage.run_steps,
                **meter.read(),
                **values,
            }
            row |= {"epoch": micros[0].epoch, "bad_samples": quarantine.count(), **pace.read(stage.run_steps - total)}
            own.tell(row | {"heldout_loss": stage.heldout() if saving else None})
            losses.check()
        if saving:
            saved = own.save(stage, Position(stage.name, taken, total, taken == stage.steps))
            if not saved and taken == stage.steps:
                losses.stop("weights or statistics are not finite any more")
            pace.restart()
        if stopping:
            return Outcome.PREEMPTED, total
    return Outcome.FINISHED, last
