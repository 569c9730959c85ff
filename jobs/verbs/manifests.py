"""manifests: what a launcher would submit, as files to look at or to submit by hand."""

from __future__ import annotations

from contextlib import suppress

from jobs import spec
from jobs.errors import OK, UserError
from jobs.launchers.slurm import Slurm
from jobs.record import Run
from jobs.settings import Settings
from jobs.slurm import script
from jobs.slurm.queue import answers
from jobs.verbs.submit import create, ready, say

OUT = script.TEMPLATES / "out"


def manifests(settings: Settings) -> int:
    """slurm/out/RECIPE.sbatch: with the run's record made, so that `sbatch` of it is all that is left to do."""
    if settings.launcher not in ("slurm", ""):
        raise UserError(f"LAUNCHER: manifests of {settings.launcher} are not built yet; there is slurm")
    recipe = settings.load_recipe()
    root, cluster = settings.root(recipe), settings.site()
    launcher = Slurm(cluster)
    placement = launcher.place(recipe)
    if answers():
        launcher.check(recipe, root, placement)
    ready(recipe, root, launcher.gpus())
    run = Run(root, spec.run_id(recipe))
    if not run.exists():
        create(run, recipe, settings)
    folder = script.folder(cluster)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)  # of the machine that submits; SLURM does not make it
    made = script.training(recipe, cluster, placement, [run.id], root, folder)
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{recipe.name}.sbatch"
    path.write_text(made.text)
    say(f"{path}\nnext: sbatch {path}; make status RUN={run.id}\nrun: {run.id}")
    return OK
