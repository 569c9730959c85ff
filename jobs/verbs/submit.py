"""submit: everything that can be wrong is found first, then the run is queued and followed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from core import machine
from jobs import hub, inputs, launchers, preflight, spec
from jobs.errors import OK, UserError, nearest
from jobs.launchers import Launcher, Order
from jobs.placement import Placement, gpu_count, place
from jobs.record import IllegalMove, Run, State, View
from jobs.settings import Settings
from jobs.steps import steps

if TYPE_CHECKING:
    from core.recipe import Recipe

AFTER = ("eval", "export", "report")


def submit(settings: Settings) -> int:
    if settings.sweep:
        from jobs.verbs.sweeps import submit_sweep

        return submit_sweep(settings)
    recipe = settings.load_recipe()
    root = settings.root(recipe)
    run_id = spec.run_id(recipe)
    if settings.dry:
        return _finish(_dry(recipe, root), run_id)
    launcher = choose_launcher(settings, recipe)
    placement = checked(recipe, root, launcher)
    run = Run(root, spec.fresh_id(root, run_id) if settings.fresh else run_id)
    order = wanted(run, recipe, launcher, settings)
    if order is None:
        return _finish(OK, run.id)
    return launch(order, launcher, placement, settings)


def checked(recipe: Recipe, root: str, launcher: Launcher) -> Placement:
    """Ranks and device, when the launcher and the store can do what is wanted."""
    placement = launcher.place(recipe)
    launcher.check(recipe, root, placement)
    if inputs.check_store(root):
        ready(recipe, root, launcher.gpus())  # refuses, saying what else is missing
    return placement


def wanted(run: Run, recipe: Recipe, launcher: Launcher, settings: Settings) -> Order | None:
    """The attempt to start, its inputs made and its record there; None, having said so, when nothing is to be done."""
    view = run.view() if run.exists() else None
    if view and (view.active or view.last.state == State.SUCCEEDED):
        _nothing_to_do(run, view)
        return None
    if view:
        _require_same(run, recipe)
    ready(recipe, run.root, launcher.gpus())
    info = attempt_info(settings, launcher)
    if view is None:
        create(run, recipe, settings)
    return order(run, recipe, info, settings)


def create(run: Run, recipe: Recipe, settings: Settings) -> None:
    run.create(as_yaml(recipe), spec.record(run.id, recipe, run.root, settings, spec.code()))


def order(run: Run, recipe: Recipe, info: dict[str, Any], settings: Settings) -> Order:
    """The run's next attempt; a lost one is written down as such."""
    view = run.view()
    if view.lost:
        with suppress(IllegalMove):
            run.move(State.PREEMPTED, reason=f"lost: {view.lost}")
    return Order(run, recipe, view.last.attempt + 1, info, after_verbs(settings))


def after_verbs(settings: Settings) -> tuple[str, ...]:
    """AFTER=eval,export.  Raises UserError."""
    verbs = tuple(name.strip() for name in settings.after.split(",") if name.strip())
    for verb in verbs:
        if verb not in AFTER:
            raise UserError(f"AFTER: {verb!r} cannot follow a run{nearest(verb, AFTER)} (known: {', '.join(AFTER)})")
    return verbs


def _require_same(run: Run, recipe: Recipe) -> None:
    """Raises UserError when the run has gone on with another recipe than the one it was made from."""
    from core.config import fingerprint

    stored = run.recipe()
    if fingerprint(stored) != fingerprint(recipe):
        raise UserError(
            f"run {run.id} was resumed with a changed recipe: {steps(run.root, run.id, 'resume')} goes on with that "
            "one, FRESH=1 makes a new run of this one"
        )
    recipe.checkpoint.accept = stored.checkpoint.accept


def choose_launcher(settings: Settings, recipe: Recipe) -> Launcher:
    """LAUNCHER, else the recipe's, with the settings of CLUSTER.  Raises UserError, ConfigError."""
    name = settings.launcher or recipe.launch.launcher
    if name == "auto":
        name, why = launchers.automatic()
        print(f"launcher: {name} (auto: {why})")
    return launchers.find(name).at(settings.site())


def ready(recipe: Recipe, root: str, gpus: int, beside: bool = True) -> None:
    """Refuse what cannot work, say what is missing, make and stage what can be.  Raises ConfigError, NotReady.

    beside: with what a method reads beside the images.
    """
    preflight.check_networks(recipe)
    inputs.require(recipe, root, gpus)
    hub.stage(recipe, root, say)
    module = inputs.preparer(recipe)
    if module:
        module.prepare(recipe, root, say)
    preflight.check_data(recipe, root, beside)


def attempt_info(settings: Settings, launcher: Launcher) -> dict[str, Any]:
    current = spec.code()
    if not launcher.shares_tree:
        spec.require_clean(current, settings.dirty)
    return {"commit": current.commit, "dirty": current.dirty}


def launch(order: Order, launcher: Launcher, placement: Placement, settings: Settings) -> int:
    """Start the attempt, follow it, and do what comes after it where no queue does."""
    run = order.run
    if launcher.submit([order], placement) != [True]:  # submitted twice in the same moment
        _nothing_to_do(run, run.view())
        return _finish(OK, run.id)
    print(f"{run.id}: attempt {order.attempt} submitted to {described(launcher, placement, run.root)}", flush=True)
    if look := run.look(run.last()).text:
        print(look)
    if settings.detach:
        print(f"next: {steps(run.root, run.id, 'status', 'logs', 'cancel')}")
        return _finish(OK, run.id)
    from jobs.follow import follow

    code = follow(run, order.attempt, launcher)
    if code == OK and not launcher.queues and run.last().state == State.SUCCEEDED:
        with machine.told(order.recipe):
            code = max((_verb(verb, run) for verb in order.after), default=OK)
    return _finish(code, run.id)


def described(launcher: Launcher, placement: Placement, root: str) -> str:
    nodes = f" on {placement.nodes} nodes" if placement.nodes > 1 else ""
    return f"{launcher.name}, {placement.ranks} x {placement.device}{nodes}, store {root}"


def _verb(name: str, run: Run) -> int:
    from jobs.cli import VERBS

    return VERBS[name].load()(Settings(run=run.id, store=run.root))


def _nothing_to_do(run: Run, view: View) -> None:
    if view.last.state == State.SUCCEEDED:
        print(f"{run.id} is already done: {run.uri}")
        print(f"next: {steps(run.root, run.id, 'eval', 'export', 'report')}; a new run: FRESH=1")
    else:
        print(f"{run.id} is already {view.shown}\nnext: {steps(run.root, run.id, 'status', 'cancel')}")
        if look := run.look(view.last).text:
            print(look)


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
