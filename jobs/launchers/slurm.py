"""Runs as jobs of SLURM, submitted through submitit. SLURM starts them again; the batch script sees to the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import machine
from core.storage import StoreError
from jobs.cluster import Cluster
from jobs.errors import NotReady, UserError, redact
from jobs.launchers import Look, Looks, OnSite, Order
from jobs.placement import Placement
from jobs.record import IllegalMove, Run, State
from jobs.slurm import queue, script
from jobs.slurm.queue import SlurmError

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.slurm.script import Script


class Slurm(OnSite):
    """One task per rank under a batch script made from slurm/job.sbatch."""

    name = "slurm"
    queues = True

    def __init__(self, cluster: Cluster | None = None) -> None:
        super().__init__(cluster or Cluster())
        self.shares_tree = not self.cluster.container  # an image holds its own code
        self._looks = Looks()

    def at(self, cluster: Cluster) -> Slurm:
        return Slurm(cluster)

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        own = self.cluster
        queue.call("sinfo", "--noheader", "--format=%P")  # says in its own words why there is no SLURM here
        _check_shared(own, root)
        part = queue.partition(own.partition)
        per_node = placement.ranks // placement.nodes
        if part.state != "UP":
            raise NotReady(f"partition {part.name} is {part.state}: jobs in it do not start")
        most = min(part.nodes, part.max_nodes)
        if placement.nodes > most:
            raise UserError(f"launch.ranks: {placement.ranks} ranks need {placement.nodes} nodes of {per_node}; "
                            f"partition {part.name} gives a job {most:.0f} at most")  # fmt: skip
        if placement.device == "cuda":
            there = part.gpus_per_node.get(own.gpu_type, 0)
            if per_node > there:
                kinds = ", ".join(f"{n} {kind}" for kind, n in part.gpus_per_node.items() if kind)
                kinds = f" ({kinds})" if kinds else ""
                raise UserError(f"gpus_per_node: {per_node} {own.gpu_type or 'GPUs'} on a node are wanted; nodes of "
                                f"partition {part.name} have {there} at most{kinds}")  # fmt: skip
        cpus = per_node * own.cpus_per_task
        if cpus > part.cpus_per_node:
            raise UserError(f"cpus_per_task: {per_node} ranks of {own.cpus_per_task} CPUs need {cpus} on a node; nodes "
                            f"of partition {part.name} have {part.cpus_per_node} at most")  # fmt: skip
        if own.mem_gb * 1024 > part.mem_mb_per_node:
            raise UserError(f"mem_gb: {own.mem_gb:g} GB on a node are wanted; nodes of partition {part.name} have "
                            f"{part.mem_mb_per_node / 1024:.0f} at most")  # fmt: skip
        limit, lead_s = script.limit_min(recipe, own), script.lead_s(recipe)
        if 60 * (limit or part.default_time_min) <= lead_s:
            ends = limit or part.default_time_min
            raise UserError(f"time_min: jobs end after {ends:g} minutes, and {lead_s} s of them are for saving "
                            "(launch.grace_s and a minute): allow more, or set launch.grace_s lower")  # fmt: skip
        if limit > part.max_time_min:
            most = part.max_time_min
            raise UserError(f"time_min: {limit} minutes are wanted; partition {part.name} allows {most:.0f} at "
                            "most (a run goes on in its next attempt all the same)")  # fmt: skip

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        """One job, or an array of them: held until the runs' records name it, so that of two submissions one works."""
        from core.config import to_yaml

        runs, root = [order.run.id for order in orders], orders[0].run.root
        folder = self.folder()
        made = script.training(orders[0].recipe, self.cluster, placement, runs, root, folder)
        array = _sbatch(made, folder, hold=True)
        jobs = [array] if len(orders) == 1 else [f"{array}_{i}" for i in range(len(orders))]
        try:
            places = runs, root, folder, array, machine.named(orders[0].recipe)
            after = {verb: _sbatch(script.after(verb, self.cluster, placement, *places), folder)
                     for verb in orders[0].after}  # fmt: skip
        except SlurmError:
            queue.cancel(array)
            raise
        won: list[bool] = []
        try:
            for i, (order, job) in enumerate(zip(orders, jobs, strict=True)):
                later = {verb: own if len(orders) == 1 else f"{own}_{i}" for verb, own in after.items()}
                info = {**order.info, **asdict(placement), "launcher": self.name, "job": job, "after": later,
                        "slurm": queue.cluster_name(), "logs": str(folder / order.run.id)}  # fmt: skip
                won.append(_claim(order, info))
                if won[-1]:
                    order.run.write_recipe(to_yaml(order.recipe))
                else:
                    queue.cancel(job, *later.values())
            if any(won):
                queue.call("scontrol", "release", array)
        except BaseException as error:  # a job that stays held for ever would look as if it waited
            with suppress(SlurmError):
                queue.cancel(array, *after.values())
            for order, mine in zip(orders, won, strict=False):
                with suppress(IllegalMove, StoreError):
                    if mine:
                        order.run.move(State.FAILED, order.attempt, reason=f"not submitted: {redact(str(error))}")
            raise
        return won

    def render(self, run: Run, recipe: Recipe, placement: Placement) -> Path:
        folder, path = self.folder(), script.TEMPLATES / "out" / f"{recipe.name}.sbatch"
        if queue.answers():
            self.check(recipe, run.root, placement)
            folder.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
        path.parent.mkdir(exist_ok=True)
        path.write_text(script.training(recipe, self.cluster, placement, [run.id], run.root, folder).text)
        return path

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        folder = self.folder()
        job = _sbatch(script.workers(arguments, count, recipe, self.cluster, placement, folder), folder)
        logs = f"{folder}/job-{job}{'_*' if count > 1 else ''}.log"
        return f"SLURM job {job}: {count} workers; squeue --jobs={job} shows them, scancel {job} ends them; {logs}"

    def folder(self) -> Path:
        return script.folder(self.cluster)

    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ranks that work save and leave, and the batch script ends the job; one that waits leaves the queue."""
        try:
            number = queue.number(info.get("job"))
            job = queue.find(number) if _is_here(info) and _is_of(run, number) else None
            if job is None:
                return False
            queue.cancel(number, signal="TERM" if job.state == "RUNNING" and not at_once else "")
        except SlurmError:
            return False
        later = info.get("after")
        for waiting in later.values() if isinstance(later, dict) else ():
            with suppress(SlurmError):
                if _is_of(run, waiting):
                    queue.cancel(waiting)
        return True

    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        return self._looks.at(str(info.get("job")), lambda: self._look(run, info))

    def _look(self, run: Run, info: Mapping[str, Any]) -> Look:
        try:
            number = queue.number(info.get("job"))
        except SlurmError as error:
            return Look(None, str(error))
        try:
            if not _is_here(info):
                return Look(None)
            job = queue.find(number)
        except SlurmError:
            return Look(None)
        if job:
            return Look(True, f"SLURM job {number} {job}")
        how = queue.ended(number) or "not in the queue any more"
        said = _said(self.folder() / run.id, number) if info.get("logs") == str(self.folder() / run.id) else ""
        return Look(False, f"SLURM job {number} is {how}{said}")


LAUNCHER = Slurm()


def _claim(order: Order, info: dict[str, Any]) -> bool:
    try:
        order.run.move(State.QUEUED, order.attempt, **info)
    except IllegalMove:
        return False
    return True


def _is_here(info: Mapping[str, Any]) -> bool:
    """Whether a job is of this machine's SLURM, as far as the record says.  Raises SlurmError."""
    return not info.get("slurm") or info["slurm"] == queue.cluster_name()


def _is_of(run: Run, job: str) -> bool:
    """Whether a job bears the name of this run's, alone or in an array.  Raises SlurmError."""
    return queue.named(job) in script.names(run.id)


def _said(logs: Path, job: str) -> str:
    """What the job's newest step had to say of its end, where its log can be seen from here."""
    path = logs / f"said-{job.partition('_')[0]}.log"
    try:
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    except OSError:
        return ""
    return "".join(f"\n{line}" for line in dict.fromkeys(lines))


def _sbatch(made: Script, folder: Path, hold: bool = False) -> str:
    """Give the script to sbatch; returns the job's number.  Raises SlurmError with SLURM's words."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder.mkdir(parents=True, exist_ok=True)
    name = made.directives["job-name"]
    options = {key: value or True for key, value in made.directives.items() if key != "job-name"}
    executor = SlurmExecutor(folder=folder)
    executor.update_parameters(
        job_name=name, use_srun=False, stderr_to_stdout=True, time=None, wckey=None,
        additional_parameters={**options, **({"hold": True} if hold else {})},
    )  # fmt: skip
    try:
        # submitit's own route would pickle a function; what runs here is the script that can be read in slurm/
        return str(executor._submit_command(made.body).job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch refuses the job. SLURM says: {_words(str(error))}") from None


def _words(text: str) -> str:
    lines = [line for line in redact(text).splitlines() if line.startswith("sbatch: ")]
    return " ".join(line.removeprefix("sbatch: ") for line in lines) or redact(text).strip()


def _check_shared(cluster: Cluster, root: str) -> None:
    """Raises UserError, ConfigError when nodes cannot see the store, the Python or the image."""
    cluster.require_shared(root)
    if not cluster.container and cluster.python and not Path(cluster.python).exists():
        raise UserError(f"python: there is no {cluster.python} here; the nodes run it, so it must be in a folder that "
                        "they share with this machine")  # fmt: skip
    image = cluster.image
    if image and not cluster.container:
        raise UserError("container: the cluster file names an image; for SLURM say apptainer or pyxis as well")
    if image.startswith("/") and not Path(image).exists():
        raise UserError(f"image: there is no file {image}")
