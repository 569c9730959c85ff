"""resume: an interrupted run goes on from its newest checkpoint, here or elsewhere, with what may differ changed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import UserError
from jobs.record import Run, State
from jobs.settings import Settings
from jobs.steps import steps
from jobs.verbs.submit import as_yaml, attempt_info, choose_launcher, launch, order, ready, say

if TYPE_CHECKING:
    from core.recipe import Recipe


def resume(settings: Settings) -> int:
    """Continue a run; SET, RECIPE and NPROC may change where and how fast it goes on, FORCE=1 also what it computes."""
    root = settings.root()
    run = Run.find(root, settings.need("run"))
    view = run.view()
    if view.last.state == State.SUCCEEDED:
        raise UserError(f"run {run.id} has succeeded, nothing is left to do; a new one: make submit RECIPE=... FRESH=1")
    if view.active:
        raise UserError(f"run {run.id} is still {view.shown}; stop it first: {steps(root, run.id, 'cancel')}")
    recipe, changes = changed(run.recipe(), settings, trains=True)
    for line in changes:
        say(f"changed: {line}")
    launcher = choose_launcher(settings, recipe)
    placement = launcher.place(recipe)
    launcher.check(recipe, root, placement)
    ready(recipe, root, launcher.gpus())
    info = attempt_info(settings, launcher) | ({"changed": changes} if changes else {})
    return launch(order(run, recipe, info, settings), launcher, placement, settings)


def changed(old: Recipe, settings: Settings, trains: bool = False) -> tuple[Recipe, list[str]]:
    """The run's recipe with RECIPE, SET and NPROC applied, and what differs, a line each.

    trains: it is to be trained on, so that changes of Retort itself count as well.
    Raises UserError when that changes what the run computes and FORCE is not given.
    """
    from core import numerics
    from core.config import fingerprint

    new = _resolved(old, settings)
    new.numerics = numerics.CURRENT if trains else old.numerics
    if settings.nproc:
        new.launch.ranks = settings.nproc
    if fingerprint(new) == fingerprint(old):
        new.checkpoint.accept = old.checkpoint.accept
        return new, differences(old, new)
    of_retort = [f"Retort since {line}" for line in numerics.made_since(old)] if trains else []
    lines = [*differences(old, new), *of_retort]
    if not settings.force:
        raise UserError(
            "\n  ".join(["this changes what the run computes, so it would be another run:", *lines])
            + "\nSubmit the changed recipe as a run of its own, or go on from this run's checkpoints all the same with "
            "FORCE=1. Without it only launch, loader, zero, checkpoint, log and evaluate can change on resume"
        )
    new.checkpoint.accept = sorted({*old.checkpoint.accept, fingerprint(old)} - {fingerprint(new)})
    return new, lines


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`train.lr: 0.001 -> 0.002` for each field that differs."""
    from core.config import to_dict
    from core.merge import flatten

    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [f"{key}: {before.get(key, 'not set')!s} -> {after.get(key, 'not set')!s}"
            for key in sorted((before.keys() | after.keys()) - {"numerics"})
            if before.get(key) != after.get(key)]  # fmt: skip


def with_overrides(recipe: Recipe, settings: Settings) -> Recipe:
    """The run's recipe with SET applied.  Raises UserError when that would change the result."""
    return changed(recipe, settings)[0]


def _resolved(old: Recipe, settings: Settings) -> Recipe:
    if settings.recipe:
        return settings.load_recipe()
    from core.config import from_yaml, load
    from core.registry import complete

    if not settings.set:
        return from_yaml(as_yaml(old))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(as_yaml(old))
        return complete(load(str(path), settings.profile, list(settings.set)))
