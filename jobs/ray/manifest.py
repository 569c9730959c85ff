"""Manifests of runs and of workers on Kubernetes: k8s/rayjob.yaml filled in from a recipe and a cluster file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import yaml

from core.merge import texts
from jobs.cluster import Cluster
from jobs.errors import line
from jobs.placement import Placement, demand, filled
from jobs.ray import command
from jobs.ray.pods import Document, Pods, given
from jobs.spec import REPOSITORY

if TYPE_CHECKING:
    from core.recipe import Recipe

TEMPLATE = REPOSITORY / "k8s" / "rayjob.yaml"
NAME_MAX, LABEL_MAX = 47, 63  # the operator makes longer names from a RayJob's
KUEUE = "kueue.x-k8s.io"
RUN = "retort.dev/run"  # pods with this label may reach each other and the store (k8s/base/network.yaml)


def job_name(run_id: str, attempt: int | None = None) -> str:
    """Name of a run's RayJob; another one for each of its submissions."""
    whole = run_id if attempt is None else f"{run_id}-{attempt:04d}"
    name = whole if whole[0].isalpha() else f"r-{whole}"
    return name if name == whole and len(name) <= NAME_MAX else _cut(name, NAME_MAX, whole)


def check(recipe: Recipe, cluster: Cluster, placement: Placement, root: str) -> None:
    """Raises UserError: what pods could not start or work with."""
    Pods(recipe, cluster, placement, {}).check(root)


def documents(
    recipe: Recipe, cluster: Cluster, placement: Placement, run_id: str, root: str, name: str, at: str,
    after: Sequence[str] = (),
) -> list[Document]:  # fmt: skip
    """The RayJob of a run, and what keeps the upkeep of nodes from taking its pods away.  Raises UserError.

    at: what the record will say of where the run is.  after: verbs for the run once it has succeeded.
    """
    check(recipe, cluster, placement, root)
    entry = command.line("python", run_id, root, name, at, placement, cluster.cpus_per_task, after=",".join(after))
    label = run_id if len(run_id) <= LABEL_MAX else _cut(run_id, LABEL_MAX, run_id)
    return _documents(recipe, cluster, placement, name, entry, {RUN: label}, {RUN: run_id})


def crew(
    recipe: Recipe, cluster: Cluster, one: Placement, count: int, name: str, arguments: Sequence[str]
) -> list[Document]:
    """As `documents`, of so many workers that run `python ARGUMENTS` and belong to no run.  one: what each gets.

    Raises UserError.
    """
    own = replace(recipe, launch=replace(recipe.launch, deadline_h=0.0, min_ranks=1))  # the others are of a run
    each = demand(one.device, cluster.cpus_per_task)
    entry = command.workers("python", arguments, count, each, one.threads, retried=True)
    return _documents(own, cluster, filled(one, count, cluster.per_node), name, entry, {RUN: name}, {})


def _documents(
    recipe: Recipe, cluster: Cluster, placement: Placement, name: str, entrypoint: str, labels: dict[str, str],
    annotations: dict[str, str],
) -> list[Document]:  # fmt: skip
    labels = {
        "app.kubernetes.io/part-of": "retort",  # the operator selects pods by its own app.kubernetes.io/name
        **labels,
        "retort.dev/job": name,
    }
    site = cluster.kubernetes
    job: Document = json.loads(json.dumps(yaml.safe_load(TEMPLATE.read_text())))  # what shares an anchor is copied
    queue = given({f"{KUEUE}/queue-name": site.queue, f"{KUEUE}/priority-class": site.priority})
    job["metadata"] = {
        "name": name,
        "namespace": site.namespace,
        "labels": labels | queue,
        **given({"annotations": annotations}),
    }
    own = {"entrypoint": entrypoint, **_limits(recipe, cluster)}
    job["spec"] = own | {key: value for key, value in job["spec"].items() if key not in own}
    ray = job["spec"]["rayClusterSpec"]
    ray |= {"rayVersion": metadata.version("ray"), "authOptions": {"mode": site.auth}}
    pods = Pods(recipe, cluster, placement, labels)
    pods.submitter(job["spec"]["submitterPodTemplate"])
    pods.head(ray["headGroupSpec"])
    pods.workers(ray["workerGroupSpecs"][0])
    least = {"head": 1, "worker": placement.nodes - 1}
    made = [job, *(_budget(job["metadata"], labels, role, count) for role, count in least.items() if count)]
    for key, text in (each for document in made for each in texts(document)):
        line(text, f"the manifest's {key}")
    return made


def render(documents: list[Document]) -> str:
    """The documents as a text for `kubectl apply`."""
    job = documents[0]["metadata"]
    about = (
        f"# Trains {job['annotations'][RUN]}. Made from k8s/rayjob.yaml, a recipe and a cluster file.\n"
        "# To submit it by hand: kubectl apply -f THIS_FILE; to be rid of it: kubectl delete -f THIS_FILE\n"
    )
    return about + str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True))


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Repeats what is equal, and quotes words that begin like a number, of which readers make different things."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        quoted = data[:1] in set("+-.0123456789")
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _limits(recipe: Recipe, cluster: Cluster) -> Document:
    site, limits_s = cluster.kubernetes, (math.ceil(recipe.launch.deadline_h * 3600), cluster.time_min * 60)
    return {
        "backoffLimit": site.backoff_limit,
        **given({"activeDeadlineSeconds": min(filter(None, limits_s), default=0)}),
        "ttlSecondsAfterFinished": site.ttl_s,
        **given({"suspend": bool(site.queue)}),  # until Kueue has room for it
    }


def _budget(job: Document, labels: dict[str, str], role: str, least: int) -> Document:
    """Of the pods of one role so many must stay; a share of them cannot be told, as a RayCluster does not scale."""
    selector = {"retort.dev/job": job["name"], "app.kubernetes.io/component": role}
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{job['name']}-{role}", "namespace": job["namespace"], "labels": labels},
        "spec": {"minAvailable": least, "selector": {"matchLabels": selector}},
    }


def _cut(text: str, limit: int, whole: str) -> str:
    """`text` in `limit` characters, another one for each `whole`."""
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{text[: limit - 9].rstrip('-')}-{digest}"
