"""The pods of a RayJob: the templates of k8s/rayjob.yaml filled in from a recipe and a cluster file."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core import machine
from jobs.cluster import Cluster
from jobs.errors import UserError
from jobs.placement import Placement
from jobs.ray.site import Toleration

if TYPE_CHECKING:
    from core.recipe import Recipe

ENDING_S = 60  # that Ray may take to end once the ranks have left
SPARE_GB = 50  # of /cache, for checkpoints on their way
WRITABLE = ("/cache", "/tmp")  # noqa: S108 - in pods, whose other folders are read-only
Document = dict[str, Any]


@dataclass(frozen=True)
class Pods:
    """What the recipe, the cluster file and the placement say of pods."""

    recipe: Recipe
    cluster: Cluster
    placement: Placement
    labels: dict[str, str]

    @property
    def ranks(self) -> int:
        """Of one worker pod."""
        return self.placement.ranks // self.placement.nodes

    @property
    def grace_s(self) -> int:
        return math.ceil(self.recipe.launch.grace_s)

    @property
    def shm_gb(self) -> float:
        return self.cluster.kubernetes.shm_gb or self.cluster.mem_gb / 4

    def check(self, root: str) -> None:
        """Raises UserError: what pods could not start or work with."""
        site, recipe, mem_gb = self.cluster.kubernetes, self.recipe, self.cluster.mem_gb
        if not self.cluster.image:
            raise UserError("image: Kubernetes needs image, the address of what `make image` makes, in a cluster file: "
                            "CLUSTER=mine, a copy of jobs/clusters/kubernetes.yaml")  # fmt: skip
        if root.startswith("file://"):
            raise UserError(f"store: pods do not see {root}: STORE=s3://bucket/prefix")
        if shlex.quote(root) != root:
            raise UserError(f"store: {root!r} goes through two shells to the head: keep to letters, digits and -_./")
        if not mem_gb:
            raise UserError("mem_gb: Kubernetes needs to know the memory of a worker pod; set it in the cluster file")
        if self.shm_gb >= mem_gb:
            raise UserError(f"kubernetes.shm_gb: {self.shm_gb:g} GB for /dev/shm leave nothing of the {mem_gb:g} GB "
                            "(mem_gb) of a pod, of which they are a part")  # fmt: skip
        if 0 < site.cache_gb < recipe.loader.cache_gb:
            raise UserError(f"kubernetes.cache_gb: {site.cache_gb:g} GB cannot hold loader.cache_gb, which is "
                            f"{recipe.loader.cache_gb:g}: SET=loader.cache_gb={site.cache_gb * 0.8:g}")  # fmt: skip
        for key, path in (("loader.cache_dir", recipe.loader.cache_dir), ("checkpoint.spool", recipe.checkpoint.spool)):
            if path and not path.startswith(WRITABLE):
                raise UserError(f"{key}: pods can write under {' and '.join(WRITABLE)} only, not {path}: SET={key}=")

    def submitter(self, pod: Document) -> None:
        self._common(pod, "submitter", {})

    def head(self, group: Document) -> None:
        site, pod = self.cluster.kubernetes, group["template"]
        stop_s = str(self.grace_s + ENDING_S)
        self._common(pod, "head", {**self.cluster.env, "RAY_JOB_STOP_WAIT_TIME_S": stop_s})
        self._ray(pod, {"cpu": str(site.head_cpus), "memory": _mebi(site.head_mem_gb)})

    def workers(self, group: Document) -> None:
        cluster, site, nodes = self.cluster, self.cluster.kubernetes, self.placement.nodes
        least = -(-self.recipe.launch.min_ranks // self.ranks) or nodes
        group |= {"replicas": nodes, "minReplicas": min(least, nodes), "maxReplicas": nodes}
        cpus = str(self.ranks * cluster.cpus_per_task)
        gpus = str(self.ranks if self.placement.device == "cuda" else 0)
        group["rayStartParams"] |= {"num-cpus": cpus, "num-gpus": gpus}
        pod = group["template"]
        threads = {"OMP_NUM_THREADS": str(self.placement.threads)}
        self._common(pod, "worker", {**threads, **cluster.network(), **cluster.env, **machine.named(self.recipe)})
        wanted = {"cpu": cpus, "memory": _mebi(cluster.mem_gb)}
        selector = dict(site.node_selector)
        if self.placement.device == "cuda":
            wanted["nvidia.com/gpu"] = gpus
            selector |= given({"nvidia.com/gpu.product": cluster.gpu_type})
        if site.rdma:
            wanted[site.rdma] = str(site.rdma_count)
        self._ray(pod, wanted)
        pod["spec"] |= given({"nodeSelector": selector, "hostNetwork": site.host_network})
        if site.host_network:
            pod["spec"]["dnsPolicy"] = "ClusterFirstWithHostNet"  # else the head's name means nothing there
        self._volumes(pod["spec"]["volumes"])

    def _common(self, pod: Document, role: str, variables: dict[str, str]) -> None:
        site, spec, container = self.cluster.kubernetes, pod["spec"], pod["spec"]["containers"][0]
        pod["metadata"]["labels"] = {**self.labels, "app.kubernetes.io/component": role}
        container["image"] = self.cluster.image
        auth = {"RAY_AUTH_MODE": "disabled"} if site.auth == "disabled" else {}  # else the operator sets it
        variables = {each["name"]: each["value"] for each in container["env"]} | auth | variables
        container["env"] = [{"name": name, "value": value} for name, value in variables.items()]
        spec["serviceAccountName"] = site.service_account or "default"
        spec["securityContext"] |= dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), site.run_as)
        spec |= given({
            "imagePullSecrets": [{"name": name} for name in site.pull_secrets],
            "priorityClassName": site.priority_class,
            "tolerations": [_toleration(each) for each in site.tolerations],
        })  # fmt: skip

    def _ray(self, pod: Document, resources: dict[str, str]) -> None:
        """What head and workers have in common."""
        site, container = self.cluster.kubernetes, pod["spec"]["containers"][0]
        container["resources"] = {"requests": resources, "limits": dict(resources)}
        secrets = [{"secretRef": {"name": name}} for name in site.secrets]
        maps = [{"configMapRef": {"name": name}} for name in site.config_maps]
        container |= given({"envFrom": [*maps, *secrets]})
        pod["spec"]["terminationGracePeriodSeconds"] = self.grace_s + ENDING_S
        container["lifecycle"]["preStop"]["exec"]["command"][-1] = str(self.grace_s)

    def _volumes(self, volumes: list[Document]) -> None:
        site = self.cluster.kubernetes
        named = {volume["name"]: volume for volume in volumes}
        named["shm"]["emptyDir"]["sizeLimit"] = _mebi(self.shm_gb)
        cache_gb = site.cache_gb or self.recipe.loader.cache_gb + SPARE_GB
        named["cache"]["emptyDir"]["sizeLimit"] = f"{math.ceil(cache_gb)}G"
        if site.cache_path:
            del named["cache"]["emptyDir"]
            named["cache"]["hostPath"] = {"path": site.cache_path, "type": "Directory"}


def given(fields: dict[str, Any]) -> Document:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value}


def _toleration(each: Toleration) -> Document:
    rest = {"key": each.key, "value": each.value, "effect": each.effect, "tolerationSeconds": each.seconds}
    return {"operator": each.operator, **given(rest)}


def _mebi(gb: float) -> str:
    """Memory as Kubernetes counts it; mem_gb is of 1024 MiB, as on SLURM."""
    return f"{gb:.0f}Gi" if gb == int(gb) else f"{round(gb * 1024)}Mi"
