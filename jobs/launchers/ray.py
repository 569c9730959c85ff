"""Runs on Ray: on the cluster at RAY_ADDRESS, or as a RayJob that KubeRay makes a cluster of its own for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.cluster import Cluster
from jobs.errors import NotReady, UserError
from jobs.launchers import Elsewhere, Launcher, Look, Order
from jobs.placement import Placement
from jobs.ray.address import OnCluster
from jobs.ray.api import reachable
from jobs.ray.command import KUBERNETES
from jobs.ray.kubernetes import OnKubernetes

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.record import Run


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

    def cancel(self, run: Run, info: Mapping[str, Any], at_once: bool = False) -> bool:
        try:
            return self._there(info).cancel(run, info, at_once)
        except (NotReady, UserError):
            return False

    def look(self, run: Run, info: Mapping[str, Any]) -> Look:
        try:
            return self._there(info).look(run, info)
        except (NotReady, UserError) as error:
            return Look(None, str(error))

    def logs(self, run: Run, info: Mapping[str, Any], attempt: int) -> dict[str, bytes]:
        try:
            return self._there(info).logs(run, info, attempt)
        except (NotReady, UserError):
            return {}

    def _here(self) -> Launcher:
        """Where a run would be submitted to from here.  Raises NotReady."""
        if address := _address():
            return self._on(address)
        if not reachable():
            raise NotReady("LAUNCHER=ray needs a Ray cluster, RAY_ADDRESS=http://head:8265, or a Kubernetes context "
                           "(kubectl config current-context) with the KubeRay operator")  # fmt: skip
        return OnKubernetes(self.cluster)

    def _there(self, info: Mapping[str, Any]) -> Launcher:
        """Where a run is, when that is where this machine is set up to look: no token goes to any other address.

        Raises Elsewhere, and what finding the kube context raises.
        """
        at, address = str(info.get("at", "")), _address()
        if at.startswith(KUBERNETES):
            kubernetes = self._on(KUBERNETES)
            assert isinstance(kubernetes, OnKubernetes)
            kubernetes.require(at)
            return kubernetes
        if at.rstrip("/") != address:
            own = f"RAY_ADDRESS is {address!r}" if address else "RAY_ADDRESS is not set"
            raise Elsewhere(f"by its record the run is on the Ray cluster at {at!r}, {own} here: nobody was asked")
        return self._on(address)

    def _on(self, at: str) -> Launcher:
        if at not in self._ways:
            self._ways[at] = OnKubernetes(self.cluster) if at == KUBERNETES else OnCluster(at, self.cluster)
        return self._ways[at]


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").rstrip("/")


LAUNCHER = Ray()
