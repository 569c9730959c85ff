"""Where a rank is and how it finds the others: one place for what torch, NCCL, gloo and OpenMP read."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

from core.storage import Store
from jobs.errors import NotReady

MEET_S = 300.0  # that ranks wait for each other at start
REACH_S = 5.0  # per address of rank 0
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
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
    """How ranks that a scheduler started find each other, whatever their hosts' names resolve to.

    Rank 0 listens on a port that its kernel picks, so that no two jobs of a node can choose the same one, and writes
    its addresses into the run's folder; the others take the first that answers, and all use the network on which it
    did. Returns torch's store, None where MASTER_ADDR says it already.  Raises NotReady when rank 0 does not appear or
    cannot be reached.
    """
    if "MASTER_ADDR" in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    key = f"rendezvous/attempt-{attempt:04d}-{os.environ.get(START, '0')}.json"
    store, own = _listen(run, key, world) if rank == 0 else _reach(run, key, world)
    if _several_nodes():  # ranks of one node need no network
        for name in INTERFACES:
            os.environ.setdefault(name, _interface(own))
    if not os.environ.get(NODELIST):
        _tell_hosts(store, rank, world)
    return store


def _tell_hosts(store: Any, rank: int, world: int) -> None:
    """Let rank 0 know the host of each, where no scheduler says it."""
    store.set(f"host-{rank}", socket.gethostname())
    if rank == 0:
        keys = [f"host-{each}" for each in range(world)]
        _wait(store, *keys)
        os.environ[NODELIST] = ",".join(dict.fromkeys(store.get(key).decode() for key in keys))


def _listen(run: Store, key: str, world: int) -> tuple[Any, str]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = socket.create_server(("", 0))
    port = listener.getsockname()[1]
    found = [address for address, _ in _addresses()]
    token = secrets.token_hex(8)
    store = TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False,
                     master_listen_fd=listener.detach())  # fmt: skip
    store.set("retort", token)
    os.environ |= {"MASTER_ADDR": found[0] if found else "127.0.0.1", "MASTER_PORT": str(port)}
    run.put(key, json.dumps({"addresses": [*found, "127.0.0.1"], "port": port, "token": token}).encode())
    reached = os.environ["MASTER_ADDR"]
    if _several_nodes():
        _wait(store, "reached")
        reached = store.get("reached").decode()  # the address that ranks of other nodes have found
    return store, reached


def _reach(run: Store, key: str, world: int) -> tuple[Any, str]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    about = json.loads(_appear(run, key))
    far = os.environ.get(NODE, "0") != "0"
    for address in about["addresses"]:
        try:
            with socket.create_connection((address, about["port"]), REACH_S) as trial:
                own = trial.getsockname()[0]
        except OSError:
            continue
        store = TCPStore(address, about["port"], world, is_master=False, wait_for_workers=False)
        if store.get("retort").decode() == about["token"]:
            if far:
                store.set("reached", address)
            elif _several_nodes():  # here every address answers; that one must serve all
                _wait(store, "reached")
                own = store.get("reached").decode()
            os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(about["port"])}
            return store, own
    raise NotReady(
        f"rank 0 cannot be reached from {socket.gethostname()} on port {about['port']} of any of its addresses "
        f"({', '.join(about['addresses'])}): is there a network between the nodes that lets jobs connect?"
    )


def _several_nodes() -> bool:
    return os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]


def _appear(run: Store, key: str) -> bytes:
    limit = time.monotonic() + MEET_S
    while run.size(key) is None:
        if time.monotonic() > limit:
            raise NotReady(f"rank 0 has not said within {MEET_S:.0f} s where it is: see its log")
        time.sleep(0.2)
    return run.get(key)


def _wait(store: Any, *keys: str) -> None:
    import datetime

    try:
        store.wait(list(keys), datetime.timedelta(seconds=MEET_S))
    except Exception as error:  # torch's own, which has no stable name
        raise NotReady(f"no rank of another node has reached rank 0 within {MEET_S:.0f} s: {error}") from None


def _addresses() -> list[tuple[str, str]]:
    """(IPv4 address, interface) of this machine's networks, loopback left out; the one its name stands for first."""
    import psutil

    found = [(entry.address, name) for name, entries in psutil.net_if_addrs().items() for entry in entries
             if entry.family == socket.AF_INET and not entry.address.startswith("127.")]  # fmt: skip
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted(found, key=lambda each: each[0] != named)


def _interface(address: str) -> str:
    return next((name for own, name in _addresses() if own == address), "lo")
