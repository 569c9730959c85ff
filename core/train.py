"""The loop: the same for every method, launcher, ZeRO stage and device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from core import commits, numerics
from core.attempt import Attempt
from core.attempt import Outcome as Outcome
from core.checkpoint import Reader, newest
from core.comm import Comm
from core.commits import SupersededError
from core.courier import Fate
from core.engine import pick_device
from core.features import usage
from core.guard import BadLossError as BadLossError
from core.guard import LossGuard, Quarantine
from core.manifest import Position
from core.metrics import Meter, Pace
from core.recipe import Recipe
from core.stage import Stage, build
from core.storage import Store


def train(
    recipe: Recipe, run: Store, root: str, attempt: int, on_progress: Callable[[dict[str, Any]], None],
    should_stop: Callable[[], bool],
) -> Outcome:  # fmt: skip
    """Train all stages, from the newest sound checkpoint if there is one.

    run: the run's folder in the store.  on_progress: called with every logged row (rank 0 only).  should_stop: this
    rank's wish to stop; all ranks then save at the same step and leave.
    Raises ConfigError (begun before a change of core.numerics), BadLossError and DataError (too many broken images) on
    all ranks alike, and what `build` raises.
    """
    numerics.require_none_since(recipe)
    comm, skip = Comm(pick_device(recipe.launch.device)), None
    while True:
        try:
            with closing(Attempt(recipe, run, attempt, comm, on_progress, should_stop, skip)) as own:
                return _train_stages(own, root)
        except BadLossError as error:
            if len(own.claim.skipped) >= recipe.train.rewinds:
                raise
            skip = error.window
            if comm.rank == 0:
                print(f"warning: {error}; rewinding, steps {skip[0]} to {skip[1]} are left out", flush=True)
        except RuntimeError as error:  # a newer attempt may have moved or removed what this one was about to use
            if isinstance(error, SupersededError) or commits.overtaken(run, attempt):
                return Outcome.SUPERSEDED
            raise


def _train_stages(own: Attempt, root: str) -> Outcome:
    recipe, comm, last = own.recipe, own.comm, own.manifest
    names, step = recipe.stage_names(), last.position.step if last else 0
    done = names.index(last.position.stage) + last.position.finished if last else 0
    for name in names[done:]:
        stage, start = build(recipe, name, step, root, comm, Reader(own.run, last) if last else None)
        if comm.rank == 0 and recipe.features != "off":
            usage.note(own.run, recipe, name, stage.features)
        outcome, step = _train_stage(own, stage, start)
        if outcome is not Outcome.FINISHED:
            return outcome
        if name != names[-1]:
            last = newest(own.run)
    return Outcome.FINISHED


def _train_stage(own: Attempt, stage: Stage, start: int) -> tuple[Outcome, int]:
    """One stage from its step `start` to its end or to a wish to stop; returns the outcome and the run's step."""
    recipe, settings, method, engine, comm = own.recipe, stage.settings, stage.method, stage.engine, own.comm
    meter, pace = Meter(comm), Pace(settings.batch)
    losses = LossGuard(own.run, comm, settings.max_bad_losses, settings.explode, own.claim.number)
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
        taken, total = step + 1, stage.first_step + step + 1
        if own.skips(total) and taken < stage.steps:
            own.watchdog.step()
            continue
        for loss, report in stage.backward(step, micros):
            meter.add({"loss": loss, **report})
        values = method.schedules(step)
        engine.step(partial(method.lr, step), values.get("weight_decay"))
        meter.add(method.after_step(step, comm))
        quarantine.add(micros)

        losses.add(total, loss, micros)
        ending = own.stopping() if taken < stage.steps else None
        must = taken == stage.steps or ending is not None
        saving = must or taken % recipe.checkpoint.every_steps == 0
        if saving or taken % recipe.log.every_steps == 0 or taken == 1:
            row = {"stage": stage.name, "step": total, "steps": stage.run_steps, **meter.read(), **values}
            row |= {"epoch": micros[0].epoch, "bad_samples": quarantine.count(), **pace.read(stage.run_steps - total)}
            score = stage.heldout() if saving else None
            own.tell(row | {"heldout_loss": score})
            good = losses.check()
        if saving and (good or must):
            position = Position(stage.name, taken, total, taken == stage.steps, taken * settings.batch)
            own.save(stage, position, score, must)
            pace.restart()
        if ending is not None:
            fate = own.settle(0.0 if ending is Outcome.OUTAGE else own.grace_s())
            return (Outcome.SUPERSEDED if fate is Fate.SUPERSEDED else ending), total
    fate = own.settle(recipe.checkpoint.patience_s)
    if fate is Fate.REFUSED:
        losses.stop(
            "the state at the end of its stage cannot be a checkpoint: weights or statistics are not finite, "
            "or the warning above says what else"
        )
    outcomes = {Fate.COMMITTED: Outcome.FINISHED, Fate.SUPERSEDED: Outcome.SUPERSEDED}
    return outcomes.get(fate, Outcome.OUTAGE), last
