"""Where a rank is and how it finds the others: one place for what torch, NCCL, gloo and OpenMP read."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping
from typing import Any

from core.storage import Store
from jobs import rendezvous
from jobs.errors import NotReady
from jobs.rendezvous import INTERFACES, MEET_S

FILE = "RETORT_MEETING_FILE"  # in which ranks of this machine meet
NODE, START = "RETORT_NODE", "RETORT_START"  # this node's number, in which start
NODELIST = "RETORT_NODELIST"  # for people
SHOWN = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", *INTERFACES)


def from_scheduler(given: Mapping[str, str]) -> dict[str, str]:
    """torch's variables and ours of a rank that SLURM started; empty where somebody has set them already."""
    if "RANK" in given or "SLURM_PROCID" not in given:
        return {}
    per_node = given.get("SLURM_STEP_TASKS_PER_NODE", given.get("SLURM_NTASKS_PER_NODE", "1"))
    return {
        "RANK": given["SLURM_PROCID"], "LOCAL_RANK": given["SLURM_LOCALID"],
        "WORLD_SIZE": given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS", "1")),
        "LOCAL_WORLD_SIZE": per_node.partition("(")[0],
        "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", given.get("SLURM_CPUS_PER_TASK", "1")),
        NODE: given.get("SLURM_NODEID", "0"), NODELIST: given.get("SLURM_JOB_NODELIST", ""),
        START: "-".join(given.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")),
    }  # fmt: skip


def describe() -> str:
    """One line for the log: which rank this is, where, and with what."""
    cpus = sorted(os.sched_getaffinity(0))
    here = {name: os.environ[name] for name in SHOWN if name in os.environ}
    return (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()} "
        f"(local rank {os.environ['LOCAL_RANK']}, CPUs {','.join(map(str, cpus))}): "
        + " ".join(f"{name}={value}" for name, value in here.items())
    )


def meet(run: Store, attempt: int) -> Any:
    """How ranks find each other, whatever their hosts' names resolve to: torch's store, through which they do.

    Ranks of one launcher on this machine have a file that nobody else may open. Others are told by rank 0, through the
    run's folder: of one node its loopback, of several the one network by which it is reached; the port is one that its
    kernel picks, so that no two jobs of a node can choose the same one. An address that the environment names is
    another program's.  Raises NotReady when rank 0 does not appear or cannot be reached.
    """
    if FILE in os.environ:
        return meet_in_file()
    rank, world, several = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _several_nodes()
    key = f"rendezvous/attempt-{attempt:04d}-{os.environ.get(START, '0')}.json"
    if rank == 0:
        store, own = rendezvous.listen(run, key, world, several, MEET_S)
    else:
        store, own = rendezvous.reach(run, key, world, os.environ.get(NODE, "0") != "0", MEET_S)
    if not several:
        _stay_here()
    for name in INTERFACES:
        os.environ.setdefault(name, rendezvous.interface(own))
    if not os.environ.get(NODELIST):
        _tell_hosts(store, rank, world)
    return store


def meet_in_file() -> Any:
    """torch's store in the file that a launcher on this machine has named: there is no port to reach."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    _stay_here()
    return FileStore(os.environ[FILE], int(os.environ["WORLD_SIZE"]))


def _stay_here() -> None:
    """Let ranks of one machine talk by its loopback, whichever network a cluster has for those of several."""
    os.environ |= dict.fromkeys(INTERFACES, "lo")


def _tell_hosts(store: Any, rank: int, world: int) -> None:
    """Let rank 0 know the host of each, where no scheduler says it."""
    store.set(f"host-{rank}", socket.gethostname())
    if rank == 0:
        keys = [f"host-{each}" for each in range(world)]
        _wait(store, *keys)
        os.environ[NODELIST] = ",".join(dict.fromkeys(store.get(key).decode() for key in keys))


def _several_nodes() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]


def _wait(store: Any, *keys: str) -> None:
    try:
        store.wait(list(keys), datetime.timedelta(seconds=MEET_S))
    except Exception as error:  # torch's own, which has no stable name
        raise NotReady(f"not all ranks have reached rank 0 within {MEET_S:.0f} s: {error}") from None
