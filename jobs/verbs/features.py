"""features: teacher outputs stored once, to train from without teachers."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from core import machine
from jobs import extract, spec
from jobs.advice import advise
from jobs.errors import BUG, OK, UserError, nearest
from jobs.launchers import Launcher
from jobs.placement import Placement, gpu_count
from jobs.settings import Settings
from jobs.steps import elsewhere
from jobs.verbs.corpus import choose, parse
from jobs.verbs.results import names
from jobs.verbs.submit import choose_launcher, ready, say

if TYPE_CHECKING:
    from core.features.about import Split
    from core.features.work import Work
    from core.recipe import Recipe

GB = 1e9


def features(settings: Settings) -> int:
    recipe = wanted(settings)
    if settings.select:
        parse(settings.select)  # before hours of work
    root, split = settings.root(recipe), splits(settings.split)
    if settings.nproc < 0:
        raise UserError(f"NPROC: {settings.nproc} is no number of workers")
    if not (settings.dry or settings.verify or settings.advise):
        return fill(recipe, root, split, settings)
    works = planned(recipe, root, split, gpu_count())
    if settings.verify:
        return check(works, root)
    print(advise(recipe, works, root, settings.site()) if settings.advise else "nothing was stored (DRY=1)")
    return OK


def planned(recipe: Recipe, root: str, split: list[Split], gpus: int) -> list[Work]:
    """What there is to store, told.  Raises UserError, NotReady, and what reading data, teachers and store raises."""
    ready(recipe, root, gpus, beside=False)
    from core.features import run

    works = run.works(recipe, root, split)
    if not works:
        raise UserError(f"{recipe.name}: no stage of it has teachers whose outputs could be stored")
    for work in works:
        print(told(work, run.total_bytes(work)), flush=True)
    return works


def fill(recipe: Recipe, root: str, split: list[Split], settings: Settings) -> int:
    """Store what is missing, by workers where the launcher starts them or some are wanted, else in this process."""
    from core.features import run

    launcher = choose_launcher(settings, recipe)
    placement = place(launcher, recipe, root, settings)
    works, count = planned(recipe, root, split, launcher.gpus()), workers(settings.nproc, launcher, placement)
    if lacking(works) and (launcher.queues or count > 1):
        line = extract.arguments(root, extract.order(root, recipe, split))
        with machine.told(recipe):
            say(launcher.workers(line, count, recipe, placement))
        if launcher.queues:
            print("the same command with DRY=1 says how far they are; without it, it adds workers while some is left")
            return OK
    for work in works:
        run.store(work, root, run.device(recipe), say)
    if settings.select:
        return choose(recipe, root, settings)
    print(stored(works))
    profile = f" PROFILE={settings.profile}" if settings.profile else ""
    recipe_word = shlex.quote(settings.recipe)
    print(f"next: make submit RECIPE={recipe_word}{profile} {training(works, settings)}{elsewhere(root)}")
    return OK


def workers(wanted: int, launcher: Launcher, placement: Placement) -> int:
    """How many: as wanted, else one for each GPU of this machine, and of a cluster one."""
    on_all = placement.device == "cuda" and not launcher.queues
    return wanted or (launcher.gpus() if on_all else 1)


def lacking(works: list[Work]) -> bool:
    return any(len(work.done()) < len(work.items()) for work in works)


def place(launcher: Launcher, recipe: Recipe, root: str, settings: Settings) -> Placement:
    """What one worker gets, when the launcher and the store can do what is wanted.  Raises UserError, NotReady."""
    one = replace(launcher.place(recipe), ranks=1, nodes=1)
    launcher.check(recipe, root, one)
    if not launcher.shares_tree:
        spec.require_clean(spec.code(), settings.dirty)
    return one


def check(works: list[Work], root: str) -> int:
    from core.features import run

    wrong = [line for work in works for line in run.check(work, root, run.device(work.inputs.recipe), say)]
    end = f"{len(wrong)} damaged parts were dropped; make features RECIPE=... makes them again"
    print("\n".join([*wrong, end]) if wrong else "all that is stored is sound")
    return BUG if wrong else OK


def stored(works: list[Work]) -> str:
    return "\n".join(f"{work.split}: {name}: {found}" for work in works for name, found in work.sets.items())


def training(works: list[Work], settings: Settings) -> str:
    """What a submission needs to use these features."""
    data = works[0].inputs.recipe.data
    views = [f"data.views={data.views}"] if any(work.replays for work in works) else []
    mode = "auto" if settings.split else "require"  # as other splits may not be there
    words = [*settings.set, f"features={mode}", *views, f"data.codec={data.codec}"]
    return f"SET={shlex.quote(shlex.join(words))}"


def wanted(settings: Settings) -> Recipe:
    """The recipe with VIEWS and CODEC in it.  Raises ConfigError."""
    more = [f"data.views={settings.views}"] if settings.views else []
    more += [f"data.codec={settings.codec}"] if settings.codec else []
    recipe = replace(settings, set=(*settings.set, *more, "features=off")).load_recipe()
    return recipe if recipe.data.views else replace(recipe, data=replace(recipe.data, views=1))


def splits(text: str) -> list[Split]:
    """`train,heldout`; all for nothing.  Raises UserError."""
    from core.features.about import SPLITS

    for name in names(text):
        if name not in SPLITS:
            raise UserError(f"SPLIT: {name!r} is not one of {', '.join(SPLITS)}{nearest(name, list(SPLITS))}")
    return cast("list[Split]", names(text)) or list(SPLITS)


def told(work: Work, size: int) -> str:
    codec = work.inputs.recipe.data.codec
    views = f"{work.views} view{'s' * (work.views > 1)}"
    return (
        f"{work.title}: {work.any_set.ends[-1]:,} rows x {views} of {', '.join(work.sets)}: "
        f"{size / GB:,.3f} GB as {codec}; {len(work.done())} of {len(work.items())} parts are there"
    )
