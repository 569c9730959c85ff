"""Runs on Ray: on the cluster at RAY_ADDRESS, or as a RayJob that KubeRay makes a cluster of its own for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.cluster import Cluster
from jobs.errors import NotReady
from jobs.launchers import Launcher, Look, Order
from jobs.placement import Placement
from jobs.ray.address import OnCluster, dashboard
from jobs.ray.api import reachable
from jobs.ray.command import KUBERNETES
from jobs.ray.kubernetes import OnKubernetes

if TYPE_CHECKING:
    from core.recipe import Recipe


class Ray(Launcher):
    """Ranks are workers of Ray Train; which of the two ways leads to them is in the environment and in the record."""

    name = "ray"
    shares_tree = False
    queues = True
    example = "kubernetes"

    def __init__(self, cluster: Cluster | None = None) -> None:
        self.cluster = cluster or Cluster()
        self._ways: dict[str, Launcher] = {}

    def at(self, cluster: Cluster) -> Ray:
        return Ray(cluster)

    def gpus(self) -> int:
        return self._here().gpus()

    def place(self, recipe: Recipe) -> Placement:
        return self._here().place(recipe)

    def check(self, recipe: Recipe, root: str, placement: Placement) -> None:
        self._here().check(recipe, root, placement)

    def submit(self, orders: Sequence[Order], placement: Placement) -> list[bool]:
        return self._here().submit(orders, placement)

    def workers(self, arguments: Sequence[str], count: int, recipe: Recipe, placement: Placement) -> str:
        return self._here().workers(arguments, count, recipe, placement)

    def by_hand(self) -> Launcher:
        return OnKubernetes(self.cluster)

    def cancel(self, info: Mapping[str, Any], at_once: bool = False) -> bool:
        return self._way(info["at"]).cancel(info, at_once)

    def look(self, info: Mapping[str, Any]) -> Look:
        return self._way(info["at"]).look(info)

    def logs(self, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        return self._way(info["at"]).logs(info, attempt)

    def _here(self) -> Launcher:
        """Where a run would be submitted to from here.  Raises NotReady, UserError."""
        address = os.environ.get("RAY_ADDRESS", "")
        if address:
            return self._way(dashboard(address))
        if not reachable():
            raise NotReady("LAUNCHER=ray needs a Ray cluster, RAY_ADDRESS=http://head:8265, or a Kubernetes context "
                           "(kubectl config current-context) with the KubeRay operator")  # fmt: skip
        return OnKubernetes(self.cluster)

    def _way(self, at: str) -> Launcher:
        if at not in self._ways:
            kubernetes = at.startswith(KUBERNETES)
            self._ways[at] = OnKubernetes(self.cluster, at) if kubernetes else OnCluster(at, self.cluster)
        return self._ways[at]


LAUNCHER = Ray()
