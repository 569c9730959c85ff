"""Checks of the machine that a run would use, each one line: ok, or FAIL with the way to mend it."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from core import sockets
from core.private import FOLDERS, flaw, own_folder
from core.storage import StoreError
from jobs import inputs, launchers
from jobs.errors import NOT_READY, OK, redact
from jobs.placement import Placement, gpu_count
from jobs.settings import Settings
from jobs.slurm import queue
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.recipe import Recipe

DISK_GB, SHM_GB = 5, 1
SHOWN_PACKAGES, TRIAL_SAMPLES, TRIAL_IMAGES, COLLECTIVE_S = 5, 8, 2, 120.0


@dataclass(frozen=True)
class Finding:
    name: str
    text: str
    fix: str = ""  # empty: all is well

    def __str__(self) -> str:
        line = f"{'FAIL' if self.fix else 'ok  '}  {self.name}: {self.text}"
        return f"{line}\n      -> {self.fix}" if self.fix else line


def main(settings: Settings) -> int:
    """Print all findings; returns 0 when all is well, else 3."""
    failed = 0
    for finding in examine(settings):
        print(finding, flush=True)
        failed += bool(finding.fix)
    print("all is well" if not failed else f"{failed} to mend")
    return NOT_READY if failed else OK


def examine(settings: Settings) -> Iterator[Finding]:
    recipe = settings.load_recipe() if settings.recipe and not settings.quick else None
    yield python()
    yield packages()
    yield disk("disk", Path.cwd(), DISK_GB, "free some, or work in another folder")
    yield disk("shared memory", Path("/dev/shm"), SHM_GB, 'containers: --shm-size=8g; or SET="loader.workers=0"')
    if settings.quick:
        return
    root = settings.root(recipe)
    yield compute()
    yield store(root)
    yield trial("temporary folders", "see above; TMPDIR names another place", lambda: folders(recipe))
    yield trial("collectives", "run `python -m jobs.collective cpu` by hand to see more", lambda: collective(recipe))
    if settings.cluster or queue.answers():
        yield trial("SLURM", "see the cluster file", lambda: scheduler(settings, recipe, root))
    if recipe:
        yield from needs(recipe, root)


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fix = "" if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.11"
    return Finding("python", version, fix)


def packages(lock: Path = REPOSITORY / "requirements.lock") -> Finding:
    """Installed versions against the lock file's."""
    wanted = dict(re.findall(r"^([\w.-]+)==([^\s;]+)(?= \\$)", lock.read_text(), re.MULTILINE))
    found = {name: _installed(name) for name in wanted}
    wrong = [f"{name} {found[name] or 'missing'} instead of {v}" for name, v in wanted.items() if found[name] != v]
    if not wrong:
        return Finding("packages", f"{len(wanted)} as locked")
    more = f" and {len(wrong) - SHOWN_PACKAGES} more" if len(wrong) > SHOWN_PACKAGES else ""
    return Finding("packages", f"{', '.join(wrong[:SHOWN_PACKAGES])}{more}", "make setup")


def compute() -> Finding:
    cores, gpus = len(os.sched_getaffinity(0)), gpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Finding("compute", f"{cores} cores, {memory:.0f} GB memory, {gpus} GPUs")


def disk(name: str, folder: Path, need_gb: float, fix: str) -> Finding:
    free_gb = shutil.disk_usage(folder).free / 1e9
    lack = "" if free_gb >= need_gb else f"{need_gb} GB are needed: {fix}"
    return Finding(name, f"{free_gb:.0f} GB free under {folder}", lack)


def store(root: str) -> Finding:
    lack = inputs.check_store(root)
    if lack:
        return Finding("store", lack.what, lack.how)
    return Finding("store", f"{root} reads, writes, and of two writers one wins")


def needs(recipe: Recipe, root: str) -> Iterator[Finding]:
    """A recipe's inputs, and when they are there one batch and one forward pass."""
    lacks = [lack for lack in inputs.missing(recipe, root, gpu_count()) if not lack.what.startswith("store:")]
    for lack in lacks:
        yield Finding("inputs", lack.what, lack.how)
    if not lacks:
        yield Finding("inputs", "all there, or made by submit")
    yield trial("data", "see data.source", lambda: decode(recipe, root))
    yield trial("student", "see student.name, student.args and student.weights", lambda: forward(recipe, root))


def trial(name: str, fix: str, attempt: Callable[[], str]) -> Finding:
    """What `attempt` says, or that it raised."""
    try:
        return Finding(name, attempt())
    except Exception as error:  # whatever is wrong with this machine: it is what the user wants to read
        return Finding(name, redact(f"{type(error).__name__}: {error}"), fix)


def scheduler(settings: Settings, recipe: Recipe | None, root: str) -> str:
    """The partition that jobs go to, when it gives the recipe what it wants.  Raises JobError."""
    cluster = settings.site()
    part = queue.partition(cluster.partition)
    if recipe:
        launcher = launchers.find("slurm").at(cluster)
        launcher.check(recipe, root, launcher.place(recipe))
    gpus = part.gpus_per_node.get("", 0)
    return f"partition {part.name}: {part.nodes} nodes, of {part.cpus_per_node} CPUs and {gpus} GPUs"


def folders(recipe: Recipe | None) -> str:
    """Where processes of this machine keep files and open sockets, when it is theirs alone.  Raises StoreError."""
    for folder in map(own_folder, FOLDERS):
        if wrong := flaw(folder):
            raise StoreError(f"{folder}: {wrong}")
    if recipe:
        from core.inputs import shard_cache

        shard_cache(recipe.loader)
    usual, short = tempfile.gettempdir(), sockets.place()
    return usual if short == usual else f"{usual}; sockets in {short}, as its name is too long for them"


def collective(recipe: Recipe | None) -> str:
    """An all-reduce over this machine's GPUs, else between two processes on the CPU.  Raises RuntimeError."""
    from jobs.launchers.fork_server import ForkServer
    from jobs.launchers.ranks import Ranks, common_environment

    gpus = gpu_count() if recipe is None or recipe.launch.device != "cpu" else 0
    placement = Placement(gpus, "cuda", 1) if gpus else Placement(2, "cpu", 1)
    command = [sys.executable, "-m", "jobs.collective", placement.device]
    preload, env = ["torch.distributed"], common_environment(placement)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(ForkServer(preload, env, Path(folder) / "imports.log")) as server,
    ):
        ranks = Ranks(server, command, placement, Path(folder))
        try:
            for _ in range(placement.ranks):
                ended = ranks.next_exit(COLLECTIVE_S)
                if ended is None or ended.code != 0:
                    log = ranks.log(ended.rank if ended else 0).read_text(errors="replace").strip().splitlines()
                    raise RuntimeError(log[-1] if log else "no answer in time")
        finally:
            ranks.kill()
    return f"all-reduce over {placement.ranks} ranks on {placement.device}"


def decode(recipe: Recipe, root: str) -> str:
    """Read and decode a few samples from all over the training images."""
    import numpy as np

    from core.data.decode import to_tensor
    from core.data.source import DataError
    from core.data.subset import training_source
    from core.storage import resolve

    uri = resolve(recipe.data.source, root)
    if recipe.data.source in inputs.provided(recipe) and inputs.is_empty(uri):
        return f"{recipe.data.source} is made by submit"
    source = training_source(recipe.data, recipe.seed, root)
    bad = 0
    for i in np.linspace(0, len(source) - 1, TRIAL_SAMPLES).astype(int):
        try:
            to_tensor(source.read(int(i)).data)
        except DataError:
            bad += 1
    if bad == TRIAL_SAMPLES:
        raise DataError(f"{uri}: none of {bad} samples can be decoded")
    return f"{len(source)} samples; {TRIAL_SAMPLES - bad} of {TRIAL_SAMPLES} tried can be decoded"


def forward(recipe: Recipe, root: str) -> str:
    import torch

    from core.models.students import build_student

    size = recipe.stage(recipe.stage_names()[0]).img_size
    model, _ = build_student(recipe.student, size, recipe.seed, root)
    with torch.inference_mode():
        out = model.eval()(torch.zeros(TRIAL_IMAGES, 3, size, size))
    count = sum(p.numel() for p in model.parameters())
    return f"{recipe.student.name}, {count / 1e6:.1f} M parameters, {tuple(out.shape)} from {size} px"


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
