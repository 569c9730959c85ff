"""Cluster files: all that differs from site to site, in one strict YAML file per cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from core.merge import ConfigError, merge, nearest, read, to_object
from jobs.errors import is_secret
from jobs.ray.site import Kubernetes, Mistakes, mistakes, plain

FOLDER = Path(__file__).resolve().parent / "clusters"
CONTAINERS = ("", "apptainer", "pyxis")
OURS = ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "partition", "account",
        "qos", "reservation", "constraint", "signal", "requeue", "open-mode", "output", "error", "array", "dependency",
        "hold", "wckey")  # fmt: skip
VARIABLE, OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), re.compile(r"[a-z][a-z-]*")


@dataclass
class Cluster:
    """A cluster as one group of users sees it. Empty fields leave the choice to SLURM or Kubernetes.

    All launchers read the store, env, interface and what a node has, Kubernetes also image and time limit, a Ray
    cluster also shared and python; the rest, outside of `kubernetes`, is SLURM's.
    """

    about: str = ""
    store: str = ""  # where runs go; a recipe, STORE= and SET= come first
    shared: list[str] = field(default_factory=list)  # folders that nodes see as this machine does; none = not known
    logs: str = ""  # shared folder for logs and batch scripts; "" = .retort/logs here
    python: str = ""  # interpreter with Retort's packages, as nodes see it; "" = the one that submits; on Ray: `python`
    container: str = ""  # apptainer | pyxis | "": straight on the nodes
    image: str = ""  # what containers are made from: a .sif or .sqsh file, or the address of a registry
    mounts: list[str] = field(default_factory=list)  # HOST:INSIDE
    setup: list[str] = field(default_factory=list)  # lines of shell before anything else: module load ...
    env: dict[str, str] = field(default_factory=dict)  # further variables of all ranks
    interface: str = ""  # network between nodes, for NCCL and gloo; "" = the one by which rank 0 is reached
    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    gpus_per_node: int = 0
    gpu_type: str = ""
    tasks_per_node: int = 0  # ranks; 0 = one for each GPU, or one
    cpus_per_task: int = 1
    mem_gb: float = 0.0  # per node
    time_min: int = 0
    after_time_min: int = 60  # of the jobs that evaluate and export
    extra: dict[str, str] = field(default_factory=dict)  # other options of sbatch
    price_per_gpu_hour: float = 0.0
    price_per_gb_month: float = 0.0  # of the store
    kubernetes: Kubernetes = field(default_factory=Kubernetes)

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    def network(self) -> dict[str, str]:
        """Variables that name the network between nodes."""
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        return dict.fromkeys(names, self.interface) if self.interface else {}

    def require_shared(self, root: str) -> None:
        """Raises ConfigError when nodes cannot see the store, as far as the cluster file says."""
        path = root.removeprefix("file://")
        hidden = self.shared and not any(Path(path).is_relative_to(folder) for folder in self.shared)
        if root.startswith("file://") and hidden:
            raise ConfigError(
                f"store: the nodes do not see {path}; the cluster file says that they share {', '.join(self.shared)}: "
                "STORE=file:///shared/folder or STORE=s3://bucket/prefix"
            )


def load(name: str) -> Cluster:
    """A cluster by the name of its file in jobs/clusters, or by path; "" = SLURM's own choices.  Raises ConfigError."""
    if not name:
        return Cluster()
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"CLUSTER: there is no file {path}{nearest(name, names())} (there is: {', '.join(names())})")
    overlay = read(path)
    from omegaconf import OmegaConf

    found = cast(Cluster, to_object(merge(OmegaConf.structured(Cluster), Cluster, overlay)))
    for key, wrong in _mistakes(found):
        raise ConfigError(f"{overlay.place(key)}: {key}: {wrong}")
    return found


def names() -> list[str]:
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def _mistakes(cluster: Cluster) -> Mistakes:
    yield from plain(cluster)
    yield from ((f"kubernetes.{name}", wrong) for name, wrong in mistakes(cluster.kubernetes))
    if cluster.container not in CONTAINERS:
        yield "container", f"must be one of apptainer, pyxis or nothing, got {cluster.container!r}"
    if cluster.container and not cluster.image:
        yield "image", f"`container: {cluster.container}` needs an image"
    if cluster.image and not cluster.container and cluster.kubernetes == Kubernetes():
        yield "image", "an image needs `container: apptainer`, `container: pyxis` or a `kubernetes:` section"
    if cluster.python and not cluster.container and not cluster.python.startswith("/"):
        yield "python", f"must be a path from the root, got {cluster.python}"
    if cluster.gpu_type and not cluster.gpus_per_node:
        yield "gpu_type", "needs gpus_per_node"
    if cluster.cpus_per_task < 1:
        yield "cpus_per_task", "must be at least 1"
    for name in ("shared", "logs"):
        value = getattr(cluster, name)
        for path in [value] if isinstance(value, str) else value:
            if path and not path.startswith("/"):
                yield name, f"must be a path from the root, got {path}"
    if cluster.store and not re.match(r"s3://[^/]|file:///", cluster.store):
        yield "store", f"{cluster.store!r} is neither s3://bucket/prefix nor file:///folder"
    yield from (("mounts", f"{mount!r} is not HOST:INSIDE") for mount in cluster.mounts if ":" not in mount)
    for name in cluster.env:
        if not VARIABLE.fullmatch(name):
            yield "env", f"{name!r} cannot be a variable"
        if is_secret(name):
            yield "env", (f"{name} looks like a secret, and many read what is made of this file: on Kubernetes name a "
                          "Secret under kubernetes.secrets, on SLURM leave it to the files in ~/.aws")  # fmt: skip
    for name in cluster.extra:
        if not OPTION.fullmatch(name):
            yield "extra", f"{name!r} is not an option of sbatch; write it as in --{name}=VALUE"
        if name in OURS:
            yield "extra", f"{name} is Retort's own to set; use the field of the cluster file or the recipe"
