"""Batch scripts: slurm/*.sbatch filled in from a recipe and a cluster file."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from core import machine
from jobs.cluster import Cluster
from jobs.errors import PREEMPTED, line
from jobs.placement import Placement
from jobs.settings import Settings
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.recipe import Recipe

TEMPLATES = REPOSITORY / "slurm"
PREFIX = "retort-"  # of the names of jobs
NOTHING, CANCELLED = 10, 11  # exit codes of jobs.slurm.step: nothing to do here; end the job as cancelled
SIGNAL_EARLY_S = 60  # by which SLURM may send its signal too soon, and that starting again may take
# What the shell that submits may have set for other programs, and what would lead ranks or images astray.
FOREIGN = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
Directives = dict[str, str]


@dataclass(frozen=True)
class Script:
    """What sbatch is given: options, and the shell that comes after them."""

    directives: Directives
    text: str  # the whole file

    @property
    def body(self) -> str:
        """Without the first line and the options."""
        lines = self.text.splitlines()[1:]
        return "\n".join(line for line in lines if not line.startswith("#SBATCH ")).strip() + "\n"


def training(
    recipe: Recipe, cluster: Cluster, placement: Placement, runs: Sequence[str], root: str, logs: Path
) -> Script:
    """The job that trains one run, or an array of them."""
    per_node = placement.ranks // placement.nodes
    own = {
        "nodes": str(placement.nodes), "ntasks-per-node": str(per_node),
        **_resources(cluster, placement.device, per_node),
        "signal": f"USR2@{lead_s(recipe)}", "requeue": "", **_site(cluster, limit_min(recipe, cluster)),
    }  # fmt: skip
    words = {
        "ranks": str(placement.ranks), "per_node": str(per_node), "cpus": str(cluster.cpus_per_task),
        "bind": "--cpu-bind=cores " if placement.device == "cuda" else "",
        "wait": f"{max(recipe.launch.grace_s, 1):.0f}",
        "nothing": str(NOTHING), "again": str(PREEMPTED), "cancelled": str(CANCELLED),
    }  # fmt: skip
    about = f"Trains {', '.join(runs)}."
    words |= _of_runs(runs, root, placement)
    folders = machine.named(recipe)
    return _fill("job.sbatch", about, _name(runs), len(runs), logs, cluster, own, words, folders)


def after(
    verb: str, cluster: Cluster, placement: Placement, runs: Sequence[str], root: str, logs: Path, job: str,
    folders: Mapping[str, str] = MappingProxyType({}),
) -> Script:  # fmt: skip
    """The job that does `verb` on each run once its training has succeeded.  folders: variables of `core.machine`."""
    wait = f"{'aftercorr' if len(runs) > 1 else 'afterok'}:{job}"
    own = _share(cluster, placement.device)
    own |= {**_site(cluster, cluster.after_time_min), "dependency": wait, "kill-on-invalid-dep": "yes"}
    about = f"Does {verb} on {', '.join(runs)} after job {job}."
    words = {"verb": verb, **_of_runs(runs, root, placement)}
    return _fill("after.sbatch", about, _name(runs), len(runs), logs, cluster, own, words, folders)


def workers(
    arguments: Sequence[str], count: int, recipe: Recipe, cluster: Cluster, placement: Placement, logs: Path
) -> Script:
    """An array of processes that share their work through the store."""
    own = _share(cluster, placement.device)
    own |= {"signal": f"USR2@{SIGNAL_EARLY_S}", "requeue": "", **_site(cluster, cluster.time_min)}
    about = f"One of {count} workers on {recipe.name}: {shlex.join(arguments)}"
    words = {"arguments": shlex.join(arguments), "threads": str(placement.threads), "again": str(PREEMPTED)}
    name, folders = f"{recipe.name}-workers", machine.named(recipe)
    return _fill("workers.sbatch", about, name, count, logs, cluster, own, words, folders)


def lead_s(recipe: Recipe) -> int:
    """How long before its time limit a job is told to save."""
    return round(recipe.launch.grace_s) + SIGNAL_EARLY_S


def limit_min(recipe: Recipe, cluster: Cluster) -> int:
    """Time limit of the job: the cluster's, or what launch.time_limit_min needs where that is less; 0 = SLURM's."""
    wish = recipe.launch.time_limit_min
    needed = -(-int(wish * 60 + lead_s(recipe)) // 60) if wish else 0
    return min(filter(None, (needed, cluster.time_min)), default=0)


def _share(cluster: Cluster, device: str) -> Directives:
    """One rank's share of a node."""
    own = {"nodes": "1", "ntasks-per-node": "1", **_resources(cluster, device, 1)}
    if cluster.mem_gb:
        own["mem"] = f"{round(cluster.mem_gb * 1024 / cluster.per_node)}M"
    return own


def _of_runs(runs: Sequence[str], root: str, placement: Placement) -> dict[str, str]:
    return {"runs": shlex.join(runs), "store": shlex.quote(root), "threads": str(placement.threads)}


def names(run: str) -> tuple[str, str]:
    """Of the jobs that may train or follow up this run: its own, and an array's."""
    return f"{PREFIX}{_name([run])}", f"{PREFIX}{_name([run, run])}"


def _name(runs: Sequence[str]) -> str:
    return runs[0] if len(runs) == 1 else f"{runs[0].rpartition('-')[0]}-sweep"


def _resources(cluster: Cluster, device: str, tasks: int) -> Directives:
    found = {"cpus-per-task": str(cluster.cpus_per_task)}
    if device == "cuda":
        count = min(tasks, cluster.gpus_per_node) if cluster.gpus_per_node else tasks
        found["gpus-per-node"] = f"{cluster.gpu_type}:{count}" if cluster.gpu_type else str(count)
    if cluster.mem_gb:
        found["mem"] = f"{round(cluster.mem_gb * 1024)}M"
    return found


def _site(cluster: Cluster, time_min: int) -> Directives:
    named = {name: str(getattr(cluster, name)) for name in ("partition", "account", "qos", "reservation", "constraint")}
    time = {"time": f"{time_min // 60:02d}:{time_min % 60:02d}:00"} if time_min else {}
    return {**{name: value for name, value in named.items() if value}, **time, "open-mode": "append", **cluster.extra}


def _fill(
    template: str, about: str, name: str, tasks: int, logs: Path, cluster: Cluster, own: Directives,
    words: Mapping[str, str], folders: Mapping[str, str],
) -> Script:  # fmt: skip
    array = {"array": f"0-{tasks - 1}"} if tasks > 1 else {}
    directives = {"job-name": f"{PREFIX}{name}", **own, **array,
                  "output": f"{logs}/job-{'%A_%a' if array else '%j'}.log"}  # fmt: skip
    place, retort = _container(cluster)
    exports = {"OMP_NUM_THREADS": words["threads"], "PYTHONUNBUFFERED": "1", **cluster.network(), **cluster.env,
               **folders}  # fmt: skip
    exports["PYTHONSAFEPATH"] = "1"  # jobs work in the folder from which they were submitted
    if not cluster.container:
        exports["PYTHONPATH"] = str(REPOSITORY)
    given = {
        **words, "about": about, "template": template,
        "exports": " ".join(f"{key}={shlex.quote(value)}" for key, value in exports.items()),
        "logs": shlex.quote(str(logs)), "place": place,
        "retort": shlex.join(retort), "variables": " ".join([*(f.name.upper() for f in fields(Settings)), *FOREIGN]),
    }  # fmt: skip
    given = {name: line(value, f"the batch script's {name}") for name, value in given.items()}
    setup = "\n".join(line(each, "setup") for each in cluster.setup) or ": # nothing to set up"
    given |= {"directives": render(directives), "setup": setup}
    text = (TEMPLATES / template).read_text()
    return Script(directives, re.sub(r"@([a-z_]+)@", lambda found: given[found[1]], text))


def render(directives: Directives) -> str:
    """Raises UserError for what would be more than a line: in a batch script the next one is a command."""
    given = {key: f"={shlex.quote(value)}" if value else "" for key, value in directives.items()}
    return "\n".join(f"#SBATCH --{line(key + value, f'the option {key!r}')}" for key, value in given.items())


def _container(cluster: Cluster) -> tuple[str, list[str]]:
    """Options of srun, as shell, and the command that runs Python where Retort is."""
    if cluster.container == "apptainer":
        binds = [word for mount in cluster.mounts for word in ("--bind", mount)]
        nv = ["--nv"] if cluster.gpus_per_node else []
        return "", ["apptainer", "exec", "--pwd", "/", *nv, *binds, cluster.image, cluster.python or "python"]
    if cluster.container == "pyxis":
        mounts = [f"--container-mounts={','.join(cluster.mounts)}"] if cluster.mounts else []
        place = [f"--container-image={cluster.image}", *mounts, "--no-container-mount-home", "--container-workdir=/"]
        # Named, so that the steps of a job share one container instead of unpacking it three times.
        return f'{shlex.join(place)} "--container-name=retort-$SLURM_JOB_ID"', [cluster.python or "python"]
    return "", [cluster.python or sys.executable]


def folder(cluster: Cluster) -> Path:
    """Where logs and batch scripts lie."""
    return Path(cluster.logs) if cluster.logs else Path(os.getcwd()) / ".retort" / "logs"
