"""Runs on Kubernetes: a RayJob for each submission, in a Ray cluster that KubeRay makes and removes."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cluster import Cluster
from jobs.errors import NotReady, UserError
from jobs.launchers import Look, OnSite, Order, tries
from jobs.placement import Placement, demand
from jobs.ray import command, manifest
from jobs.ray.command import KUBERNETES, tagged
from jobs.record import Run
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.ray.kube import Kube

OUT = REPOSITORY / "k8s" / "out"


class OnKubernetes(OnSite):
    """The RayJob's entry point sees to attempts, Ray Train starts the ranks in the pods of the worker group."""

    name = "ray"
    shares_tree = False  # an image holds its own code
    queues = True

    def __init__(self, cluster: Cluster, at: str = "") -> None:
        """at: of a run that is somewhere already; else where the cluster file says."""
        super().__init__(cluster)
        self._context, _, self._namespace = at.removeprefix(KUBERNETES).rpartition("/")

    @cached_property
    def kube(self) -> Kube:
        from jobs.ray.kube import Kube

        own = self.cluster.kubernetes
        return Kube(self._namespace or own.namespace, self._context or own.context)

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        manifest.check(recipe, self.cluster, placement, root)
        self.kube.check()

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        return [self._submit(order, placement) for order in orders]

    def _submit(self, order: Order, placement: Placement) -> bool:
        run, name = order.run, manifest.job_name(tagged(order.run.id, order.run.root), order.attempt)
        at = f"{KUBERNETES}{self.kube.context}/{self.cluster.kubernetes.namespace}"
        info = {**order.info, **asdict(placement), "launcher": self.name, "job": name, "at": at,
                "image": self.cluster.image}  # fmt: skip
        made = manifest.documents(order.recipe, self.cluster, placement, run.id, run.root, name, at, order.after)
        return tries.submit(order, info, lambda: self.kube.create(made))

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        name = manifest.job_name(f"{recipe.name}-workers-{uuid.uuid4().hex[:6]}")
        self.kube.create(manifest.crew(recipe, self.cluster, placement, count, name, arguments))
        each = command.told(demand(placement.device, self.cluster.cpus_per_task))
        where = [f"--context={self.kube.context}"] * bool(self.kube.context) + [f"--namespace={self.kube.namespace}"]
        kubectl = shlex.join(["kubectl", *where])
        return (
            f"RayJob {name}: {count} workers of {each}; {kubectl} get rayjob {name} shows how it is, "
            f"{kubectl} logs --follow --tail=-1 --selector=job-name={name} what they say, "
            f"{kubectl} delete rayjob {name} ends them"
        )

    def render(self, run: Run, recipe: Recipe, placement: Placement) -> Path:
        name, path = manifest.job_name(tagged(run.id, run.root)), OUT / f"{recipe.name}.yaml"
        own = self.cluster.kubernetes
        at = f"{KUBERNETES}{own.context}/{own.namespace}"
        made = manifest.documents(recipe, self.cluster, placement, run.id, run.root, name, at)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(manifest.render(made))
        return path

    def cancel(self, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ranks that work read in the record that the run is cancelled, save and leave; what only waits is deleted."""
        try:
            if at_once or not self.kube.working(info["job"]):
                return self.kube.delete(info["job"])
        except (NotReady, UserError):
            return False
        return True

    def look(self, info: Mapping[str, Any]) -> Look:
        return self.kube.look(info["job"])

    def logs(self, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        """What the pods have said, over all attempts; the ranks' own words are in the store."""
        return self.kube.logs(info["job"])
