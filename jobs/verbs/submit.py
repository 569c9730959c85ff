"""submit: everything that can be wrong is found first, then the run is queued and followed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jobs import hub, inputs, launchers, preflight, spec
from jobs.errors import OK, UserError
from jobs.launchers import Launcher
from jobs.placement import Placement, gpu_count, place
from jobs.record import IllegalMove, Run, State, View
from jobs.settings import Settings

if TYPE_CHECKING:
    from core.config import Recipe


def submit(settings: Settings) -> int:
    recipe = settings.load_recipe()
    root = settings.root(recipe)
    run_id = spec.run_id(recipe)
    if settings.dry:
        return _finish(_dry(recipe, root), run_id)
    launcher = choose_launcher(settings, recipe)
    gpus = gpu_count()
    placement = place(recipe, gpus)
    if inputs.check_store(root):
        ready(recipe, root, gpus)  # refuses, saying what else is missing
    run = Run(root, spec.fresh_id(root, run_id) if settings.fresh else run_id)
    view = run.view() if run.exists() else None
    if view and (view.active or view.last.state == State.SUCCEEDED):
        return _finish(_nothing_to_do(run, view), run.id)
    if view:
        _require_same(run, recipe)
    ready(recipe, root, gpus)
    info = attempt_info(settings, launcher)
    if view is None:
        run.create(as_yaml(recipe), spec.record(run.id, recipe, root, settings, spec.code()))
    return launch(run, recipe, launcher, placement, info, settings)


def _require_same(run: Run, recipe: Recipe) -> None:
    """Raises UserError when the run has gone on with another recipe than the one it was made from."""
    from core.config import fingerprint

    stored = run.recipe()
    if fingerprint(stored) != fingerprint(recipe):
        raise UserError(
            f"run {run.id} was resumed with a changed recipe: make resume RUN={run.id} goes on with that one, FRESH=1 "
            "makes a new run of this one"
        )
    recipe.checkpoint.accept = stored.checkpoint.accept


def choose_launcher(settings: Settings, recipe: Recipe) -> Launcher:
    wanted = settings.launcher or recipe.launch.launcher
    launcher = launchers.find(wanted)
    if wanted == "auto":
        print(f"launcher: {launcher.name} (auto: the only one built so far)")
    return launcher


def ready(recipe: Recipe, root: str, gpus: int) -> None:
    """Refuse what cannot work, say what is missing, make and stage what can be.  Raises ConfigError, NotReady."""
    preflight.check_networks(recipe)
    inputs.require(recipe, root, gpus)
    hub.stage(recipe, root, say)
    module = inputs.preparer(recipe)
    if module:
        module.prepare(recipe, root, say)
    preflight.check_data(recipe, root)


def attempt_info(settings: Settings, launcher: Launcher) -> dict[str, Any]:
    current = spec.code()
    if not launcher.shares_tree:
        spec.require_clean(current, settings.dirty)
    return {"commit": current.commit, "dirty": current.dirty}


def launch(
    run: Run, recipe: Recipe, launcher: Launcher, placement: Placement, info: dict[str, Any], settings: Settings
) -> int:
    view = run.view()
    if view.lost:
        with suppress(IllegalMove):
            run.move(State.PREEMPTED, reason=f"lost: {view.lost}")
    attempt = view.last.attempt + 1
    try:
        launcher.submit(run, recipe, attempt, placement, info)
    except IllegalMove:  # submitted twice in the same moment
        return _finish(_nothing_to_do(run, run.view()), run.id)
    where = f"{launcher.name}, {placement.ranks} x {placement.device}, store {run.root}"
    print(f"{run.id}: attempt {attempt} submitted to {where}", flush=True)
    if settings.detach:
        print(f"next: make status RUN={run.id}; make logs RUN={run.id}; make cancel RUN={run.id}")
        return _finish(OK, run.id)
    from jobs.follow import follow

    return _finish(follow(run, attempt, launcher), run.id)


def _nothing_to_do(run: Run, view: View) -> int:
    if view.last.state == State.SUCCEEDED:
        print(f"{run.id} is already done: {run.uri}")
        print(f"next: make eval RUN={run.id}; make export RUN={run.id}; make report RUN={run.id}; a new run: FRESH=1")
    else:
        print(f"{run.id} is already {view.shown}; make status RUN={run.id} shows it, make cancel RUN={run.id} stops it")
    return OK


def _dry(recipe: Recipe, root: str) -> int:
    from jobs import plan

    place(recipe, gpu_count())
    print(as_yaml(recipe))
    print(plan.render(plan.plan(recipe, root)))
    print("nothing was submitted (DRY=1)")
    return OK


def as_yaml(recipe: Recipe) -> str:
    from core.config import to_yaml

    return to_yaml(recipe)


def say(text: str) -> None:
    print(text, flush=True)


def _finish(code: int, run_id: str) -> int:
    """The last line of standard output names the run: people script against it."""
    print(f"run: {run_id}", flush=True)
    return code
