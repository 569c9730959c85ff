"""Where the ranks of several nodes meet: a store of torch's at one address of rank 0, found by knocking.

Rank 0 listens at each of its addresses, with no more behind it than a comparison of what comes with a word that the
run's folder holds. The first rank of another node that says the word has shown which network leads there; torch's
store then listens at that address alone, and its keys have a prefix that only the run's folder tells.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import select
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from core.storage import Store
from jobs.errors import NotReady

MEET_S = 300.0  # that ranks wait for each other at start
REACH_S = 5.0  # per address of rank 0
HEAR_S = 1.0  # in which a visitor must have said the word
LOOPBACK = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SECRET = "RETORT_MEETING_SECRET"  # in the environment so that it is blotted out of what is printed
Told = dict[str, Any]  # what rank 0 writes into the run's folder


def listen(run: Store, key: str, world: int, several: bool, wait_s: float) -> tuple[Any, str]:
    """Rank 0's part: torch's store, and this rank's address.  several: nodes.  Raises NotReady."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address = (_configured(os.environ) or _knocked(run, key, wait_s)) if several else LOOPBACK
    listener = socket.create_server((address, 0))  # at this address alone: by itself, torch takes all
    port = listener.getsockname()[1]
    # libuv's server outlives messages that are none; the other one waits for ever for the rest of one.
    store = TCPStore(address, port, world, is_master=True, wait_for_workers=False, use_libuv=True,
                     master_listen_fd=listener.detach())  # fmt: skip
    told = {"addresses": [address], "port": port, "secret": secrets.token_hex(16)}
    run.put(key, json.dumps(told).encode())
    return _private(store, told, address), address


def reach(run: Store, key: str, world: int, far: bool, wait_s: float) -> tuple[Any, str]:
    """Another rank's part.  far: it is on another node than rank 0.  Raises NotReady."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    told = _told(run, key, wait_s)
    if "word" in told:  # of those of rank 0's own node all addresses lead there, and another node must choose
        patience_s = wait_s if not far or _knock(told) else REACH_S
        told = _told(run, key, patience_s, settled=True) or told
    for address in () if "word" in told else told["addresses"]:
        with suppress(OSError):
            with socket.create_connection((address, told["port"]), REACH_S) as trial:
                own: str = trial.getsockname()[0]
            store = TCPStore(address, told["port"], world, is_master=False, wait_for_workers=False, use_libuv=True)
            return _private(store, told, address), own
    raise NotReady(
        f"rank 0 cannot be reached from {socket.gethostname()} on port {told['port']} of any of its addresses "
        f"({', '.join(told['addresses'])}): is there a network between the nodes that lets jobs connect?"
    )


def _private(store: Any, told: Told, address: str) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(told["port"]), SECRET: told["secret"]}
    return PrefixStore(told["secret"], store)


def _knocked(run: Store, key: str, wait_s: float) -> str:
    """The address at which a rank of another node has reached this one."""
    word, limit = secrets.token_hex(16), time.monotonic() + wait_s
    with ExitStack() as stack:
        doors = [stack.enter_context(door) for door in _doors([address for address, _ in addresses()])]
        told = {"addresses": [door.getsockname()[0] for door in doors], "port": doors[0].getsockname()[1], "word": word}
        run.put(key, json.dumps(told).encode())
        while (left := limit - time.monotonic()) > 0:
            for door in select.select(doors, [], [], left)[0]:
                if _says(door, word):
                    return str(door.getsockname()[0])
    raise NotReady(f"no rank of another node has reached rank 0 within {wait_s:.0f} s")


def _doors(places: Sequence[str], tries: int = 20) -> list[socket.socket]:
    """A socket that listens at each address, all on one port."""
    if not places:
        raise NotReady("this machine has no network but its own: ranks of other nodes cannot reach it")
    for left in reversed(range(tries)):
        with ExitStack() as stack:
            try:
                doors = [stack.enter_context(socket.create_server((places[0], 0)))]
                port = doors[0].getsockname()[1]
                doors += [stack.enter_context(socket.create_server((place, port))) for place in places[1:]]
            except OSError:  # the port is another's at one of them
                if not left:
                    raise
                continue
            stack.pop_all()
            return doors
    raise AssertionError("the last try raises")


def _says(door: socket.socket, word: str) -> bool:
    with suppress(OSError), door.accept()[0] as visitor:
        visitor.settimeout(HEAR_S)
        if hmac.compare_digest(visitor.recv(len(word)), word.encode()):
            visitor.sendall(b"1")
            return True
    return False


def _knock(told: Told) -> bool:
    """Whether rank 0 has answered, at the first address that leads to it."""
    for address in told["addresses"]:
        with suppress(OSError), socket.create_connection((address, told["port"]), REACH_S) as door:
            door.sendall(told["word"].encode())
            if door.recv(1):
                return True
    return False


def _told(run: Store, key: str, wait_s: float, settled: bool = False) -> Told:
    """What rank 0 has written; settled: only once it is at one address, else nothing after so long."""
    limit = time.monotonic() + wait_s
    while True:
        if run.size(key) is not None:
            told: Told = json.loads(run.get(key))
            if not settled or "word" not in told:
                return told
        if time.monotonic() > limit:
            if settled:
                return {}
            raise NotReady(f"rank 0 has not said within {wait_s:.0f} s where it is: see its log")
        time.sleep(0.2)


def _configured(environment: Mapping[str, str]) -> str:
    """The address of the network that the cluster file names for ranks, where this machine has it."""
    own = {name: address for address, name in reversed(addresses())}
    return next((own[environment[name]] for name in INTERFACES if environment.get(name) in own), "")


def addresses() -> list[tuple[str, str]]:
    """(IPv4 address, interface) of this machine's networks, loopback left out; the one its name stands for first."""
    import psutil

    found = [(entry.address, name) for name, entries in psutil.net_if_addrs().items() for entry in entries
             if entry.family == socket.AF_INET and not entry.address.startswith("127.")]  # fmt: skip
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = ""
    return sorted(found, key=lambda each: each[0] != named)


def interface(address: str) -> str:
    return next((name for own, name in addresses() if own == address), "lo")
