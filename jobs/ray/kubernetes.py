"""Runs on Kubernetes: a RayJob for each submission, in a Ray cluster that KubeRay makes and removes."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import NotReady, UserError
from jobs.launchers import Elsewhere, Look, OnSite, Order, tries
from jobs.placement import Placement, demand
from jobs.ray import command, manifest
from jobs.ray.command import KUBERNETES, tagged
from jobs.record import Run
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.ray.kube import Kube

MOST_ATTEMPTS = 10_000  # of a run, by whose numbers its RayJobs are named
OUT = REPOSITORY / "k8s" / "out"


class OnKubernetes(OnSite):
    """The RayJob's entry point sees to attempts, Ray Train starts the ranks in the pods of the worker group."""

    name = "ray"
    shares_tree = False  # an image holds its own code
    queues = True

    @cached_property
    def kube(self) -> Kube:
        from jobs.ray.kube import Kube

        own = self.cluster.kubernetes
        return Kube(own.namespace, own.context)

    def require(self, at: str) -> None:
        """Raises Elsewhere unless a run's record names the context and namespace that this machine is set up for, or
        none; and what finding these raises."""
        context, _, namespace = at.removeprefix(KUBERNETES).rpartition("/")
        own = self.kube.context, self.kube.namespace
        if context not in ("", own[0]) or namespace not in ("", own[1]):
            raise Elsewhere(
                f"by its record the run is in namespace {namespace!r} of the kube context {context!r}; this machine is "
                f"set up for {own[1]!r} of {own[0]!r}: nobody was asked; CLUSTER=... or kubectl config use-context "
                "says where to look"
            )

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        manifest.check(recipe, self.cluster, placement, root)
        self.kube.check()

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        return [self._submit(order, placement) for order in orders]

    def _submit(self, order: Order, placement: Placement) -> bool:
        run, name = order.run, manifest.job_name(tagged(order.run.id, order.run.root), order.attempt)
        at = f"{KUBERNETES}{self.kube.context}/{self.kube.namespace}"
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

    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        """Ranks that work read in the record that the run is cancelled, save and leave; what only waits is deleted."""
        try:
            job = _job(run, info)
            if at_once or not self.kube.working(job):
                return self.kube.delete(job)
        except (NotReady, UserError):
            return False
        return True

    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        return self.kube.look(_job(run, info))

    def logs(self, run: Run, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        """What the pods have said, over all attempts; the ranks' own words are in the store."""
        return self.kube.logs(_job(run, info))


def _job(run: Run, info: Mapping[str, Any]) -> str:
    """Of a run's record.  Raises Elsewhere: a RayJob of this name would be another run's."""
    job, own = str(info.get("job", "")), tagged(run.id, run.root)
    if not any(job == manifest.job_name(own, attempt) for attempt in (None, *range(1, MOST_ATTEMPTS))):
        raise Elsewhere(f"its record names a RayJob {job!r}, which is none of run {run.id}'s: nobody was asked")
    return job
