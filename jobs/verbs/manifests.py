"""manifests: what a launcher would submit, as a file to look at or to submit by hand."""

from __future__ import annotations

import os
from dataclasses import replace

from jobs import launchers, spec
from jobs.errors import OK
from jobs.record import Run
from jobs.settings import Settings
from jobs.steps import steps
from jobs.verbs.submit import create, ready, say


def manifests(settings: Settings) -> int:
    """slurm/out/RECIPE.sbatch or k8s/out/RECIPE.yaml, and the run's record: sbatch or kubectl is all that is left."""
    launcher = launchers.find(settings.launcher or "slurm")
    if launcher.example and not (settings.cluster or os.environ.get("RETORT_CLUSTER")):
        say(f"CLUSTER is not set: store, image and sizes are those of jobs/clusters/{launcher.example}.yaml")
        settings = replace(settings, cluster=launcher.example)
    launcher = launcher.at(settings.site()).by_hand()
    recipe = settings.load_recipe()
    root, placement = settings.root(recipe), launcher.place(recipe)
    run = Run(root, spec.run_id(recipe))
    path = launcher.render(run, recipe, placement)
    try:
        ready(recipe, root, launcher.gpus())
    except Exception:
        say(f"{path} is there to look at; a run of it lacks something yet")
        raise
    if not run.exists():
        create(run, recipe, settings)
    say(f"{path}\nnext: submit it by hand, then {steps(run.root, run.id, 'status')}\nrun: {run.id}")
    return OK
