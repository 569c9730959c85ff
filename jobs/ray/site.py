"""The part of a cluster file that Kubernetes alone reads: where a run's objects go, and what its pods are given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
LABEL = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")
NAMES = ("namespace", "queue", "priority", "priority_class", "service_account", "secrets", "config_maps",
         "pull_secrets")  # fmt: skip
CHOICES = {
    "auth": ("token", "disabled"), "operator": ("Equal", "Exists"),
    "effect": ("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
}  # fmt: skip
Mistakes = Iterator[tuple[str, str]]


@dataclass
class Toleration:
    """Of a taint of nodes."""

    key: str = ""
    operator: str = "Equal"  # Equal | Exists
    value: str = ""
    effect: str = ""  # NoSchedule | PreferNoSchedule | NoExecute; "" = all of them
    seconds: int = 0  # for which NoExecute is borne; 0 = for ever


@dataclass
class Kubernetes:
    """Empty fields leave the choice to the cluster."""

    namespace: str = "retort"
    context: str = ""  # of the kubeconfig; "" = its current one
    queue: str = ""  # Kueue's LocalQueue
    priority: str = ""  # Kueue's WorkloadPriorityClass: who is admitted first
    priority_class: str = ""  # of the pods: who is evicted last
    node_selector: dict[str, str] = field(default_factory=dict)  # labels of the nodes that train
    tolerations: list[Toleration] = field(default_factory=list)
    rdma: str = ""  # resource of the fabric's device plugin, such as rdma/hca
    rdma_count: int = 1  # per worker pod
    host_network: bool = False  # of worker pods; network policies do not hold there
    shm_gb: float = 0.0  # /dev/shm, out of mem_gb; 0 = a quarter of it
    cache_gb: float = 0.0  # /cache on the node's disk; 0 = the recipe's loader.cache_gb and room for checkpoints
    cache_path: str = ""  # folder of the nodes for /cache, which outlives pods; "" = one that ends with its pod
    service_account: str = "retort"
    secrets: list[str] = field(default_factory=list)  # whose keys become variables: credentials of the store
    config_maps: list[str] = field(default_factory=list)  # likewise: endpoint, region
    pull_secrets: list[str] = field(default_factory=list)
    head_cpus: int = 2
    head_mem_gb: float = 8.0
    ttl_s: int = 300  # for which pods stay after the end, to be looked at
    backoff_limit: int = 3  # new Ray clusters for one submission, when the head is evicted
    run_as: int = 1000  # user and group of all processes
    auth: str = "token"  # what Ray asks of its clients: token | disabled


def mistakes(site: Kubernetes) -> Mistakes:
    """(field, what is wrong with it)."""
    yield from plain(site)
    for name in NAMES:
        value = getattr(site, name)
        for word in [value] if isinstance(value, str) else value:
            if word and not NAME.fullmatch(word):
                yield name, f"{word!r} cannot be a name: lower-case letters, digits, - and ."
    for name in ("namespace", "head_cpus", "head_mem_gb", "run_as", "rdma_count"):
        if not getattr(site, name):
            yield name, "pods do not run as root" if name == "run_as" else "must not be empty"
    if site.auth not in CHOICES["auth"]:
        yield "auth", f"must be one of {', '.join(CHOICES['auth'])}, got {site.auth!r}"
    if site.priority and not site.queue:
        yield "priority", "is Kueue's and needs queue; the pods' own is priority_class"
    if site.rdma and not RESOURCE.fullmatch(site.rdma):
        yield "rdma", f"{site.rdma!r} is not the name of a resource, such as rdma/hca"
    if site.cache_path and not site.cache_path.startswith("/"):
        yield "cache_path", f"must be a path from the root, got {site.cache_path}"
    if site.cache_path and site.cache_gb:
        yield "cache_gb", "is of a folder that ends with its pod; loader.cache_gb of the recipe limits cache_path"
    for label, value in site.node_selector.items():
        if not label or not LABEL.fullmatch(value):
            yield "node_selector", f"{label}: {value!r} is not a label of a node"
    for toleration in site.tolerations:
        yield from _wrong(toleration)


def plain(settings: Any) -> Mistakes:
    """What holds for every field: numbers are not negative."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, int | float) and value < 0:
            yield f.name, f"must not be negative, got {value}"


def _wrong(toleration: Toleration) -> Mistakes:
    for name, wrong in plain(toleration):
        yield "tolerations", f"{name} {wrong}"
    for name in ("operator", "effect"):
        value = getattr(toleration, name)
        if value not in CHOICES[name]:
            yield "tolerations", f"{name} must be one of {', '.join(filter(None, CHOICES[name]))}, got {value!r}"
    if toleration.operator == "Exists" and toleration.value:
        yield "tolerations", f"{toleration.key}: `operator: Exists` takes no value"
    if toleration.operator == "Equal" and not toleration.key:
        yield "tolerations", "a key is missing, or `operator: Exists` for taints of any key"
    if toleration.seconds and toleration.effect != "NoExecute":
        yield "tolerations", f"{toleration.key}: seconds need `effect: NoExecute`"
