"""manifests: what a launcher would submit, as a file to look at or to submit by hand."""

from __future__ import annotations

from jobs import launchers, spec
from jobs.errors import OK
from jobs.record import Run
from jobs.settings import Settings
from jobs.verbs.submit import create, ready, say


def manifests(settings: Settings) -> int:
    """slurm/out/RECIPE.sbatch: with the run's record made, so that `sbatch` of it is all that is left to do."""
    launcher = launchers.find(settings.launcher or "slurm").at(settings.site())
    recipe = settings.load_recipe()
    root, placement = settings.root(recipe), launcher.place(recipe)
    run = Run(root, spec.run_id(recipe))
    path = launcher.render(run, recipe, placement)
    ready(recipe, root, launcher.gpus())
    if not run.exists():
        create(run, recipe, settings)
    say(f"{path}\nnext: submit it by hand, then make status RUN={run.id}\nrun: {run.id}")
    return OK
