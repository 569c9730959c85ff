"""Cluster files: all that differs from site to site, in one strict YAML file per cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import cast

from core.merge import ConfigError, merge, nearest, read, to_object

FOLDER = Path(__file__).resolve().parent / "clusters"
CONTAINERS = ("", "apptainer", "pyxis")
OURS = ("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "mem", "time", "partition", "account",
        "qos", "reservation", "constraint", "signal", "requeue", "open-mode", "output", "error", "array", "dependency",
        "hold", "wckey")  # fmt: skip
VARIABLE, OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), re.compile(r"[a-z][a-z-]*")


@dataclass
class Cluster:
    """A SLURM cluster as one group of users sees it. Empty fields leave the choice to SLURM."""

    about: str = ""
    store: str = ""  # where runs go; a recipe, STORE= and SET= come first
    shared: list[str] = field(default_factory=list)  # folders that nodes see as this machine does; none = not known
    logs: str = ""  # shared folder for logs and batch scripts; "" = .retort/logs here
    python: str = ""  # interpreter that has Retort's packages, as nodes see it; "" = the one that submits
    container: str = ""  # apptainer | pyxis | "": straight on the nodes
    image: str = ""  # what the container is made from: a .sif or .sqsh file, or the address of a registry
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

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.tasks_per_node or self.gpus_per_node or 1


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


def _mistakes(cluster: Cluster) -> list[tuple[str, str]]:
    found = []
    for f in fields(Cluster):
        value = getattr(cluster, f.name)
        if isinstance(value, int | float) and value < 0:
            found.append((f.name, f"must not be negative, got {value}"))
        words = [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
        if f.name != "about" and any("\n" in word or "\r" in word for word in words):
            found.append((f.name, "must be one line"))
    if cluster.container not in CONTAINERS:
        found.append(("container", f"must be one of apptainer, pyxis or nothing, got {cluster.container!r}"))
    if bool(cluster.container) != bool(cluster.image):
        found.append(("image", "an image needs `container: apptainer` or `container: pyxis`, and they need an image"))
    if cluster.python and not cluster.container and not cluster.python.startswith("/"):
        found.append(("python", f"must be a path from the root, got {cluster.python}"))
    if cluster.gpu_type and not cluster.gpus_per_node:
        found.append(("gpu_type", "needs gpus_per_node"))
    if cluster.cpus_per_task < 1:
        found.append(("cpus_per_task", "must be at least 1"))
    for name in ("shared", "logs"):
        value = getattr(cluster, name)
        for path in [value] if isinstance(value, str) else value:
            if path and not path.startswith("/"):
                found.append((name, f"must be a path from the root, got {path}"))
    if cluster.store and not re.match(r"s3://[^/]|file:///", cluster.store):
        found.append(("store", f"{cluster.store!r} is neither s3://bucket/prefix nor file:///folder"))
    found += [("mounts", f"{mount!r} is not HOST:INSIDE") for mount in cluster.mounts if ":" not in mount]
    found += [("env", f"{name!r} cannot be a variable") for name in cluster.env if not VARIABLE.fullmatch(name)]
    found += [("env", f"{name} must be one line") for name, value in cluster.env.items() if "\n" in value]
    for name, value in cluster.extra.items():
        if not OPTION.fullmatch(name) or "\n" in value:
            found.append(("extra", f"{name!r} is not an option of sbatch; write it as in --{name}=VALUE, in one line"))
        if name in OURS:
            found.append(("extra", f"{name} is Retort's own to set; use the field of the cluster file or the recipe"))
    return found
