"""Where ranks that SLURM starts are, and how they find each other without names."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import pytest

from core.storage import open_store
from jobs import ranks_env, rendezvous
from jobs.errors import NotReady

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
         "SLURM_CPUS_PER_TASK": "6", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1"}  # fmt: skip
MEET = """
import os, sys
from core.storage import open_store
from jobs import ranks_env
os.environ |= ranks_env.from_scheduler(os.environ)
store = ranks_env.meet(open_store(sys.argv[1]), 1)
import torch.distributed as dist
dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
import torch
value = torch.ones(1)
dist.all_reduce(value)
print(int(value), ranks_env.describe(), "hosts", os.environ["RETORT_NODELIST"])
dist.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """What ranks that have met leave in the environment is gone after each test."""
    with mock.patch.dict(os.environ):
        for name in rendezvous.INTERFACES:
            os.environ.pop(name, None)
        yield


def test_slurm_s_variables_become_torch_s() -> None:
    found = ranks_env.from_scheduler(SLURM)
    ours = {"RETORT_NODE": "0", "RETORT_NODELIST": "", "RETORT_START": "7-0-1"}
    torch = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "6"}
    assert found == {**torch, **ours}
    assert ranks_env.from_scheduler({**SLURM, "OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def test_a_rank_that_knows_its_place_keeps_it() -> None:
    assert ranks_env.from_scheduler({**SLURM, "RANK": "0"}) == {}
    assert ranks_env.from_scheduler({}) == {}


def started(root: str, *each: dict[str, str]) -> list[subprocess.Popen[str]]:
    """Ranks that meet, each with these variables beside those of SLURM."""
    given = ("SLURM", "MASTER", "RANK", "OMP", "GLOO", "NCCL", "RETORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    own = {**kept, **SLURM, "SLURM_STEP_NUM_TASKS": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    return [
        subprocess.Popen([sys.executable, "-c", MEET, root], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env={**own, "SLURM_PROCID": str(rank), **given})  # fmt: skip
        for rank, given in enumerate(each)
    ]


def said(ranks: list[subprocess.Popen[str]], listening: set[str]) -> list[str]:
    """What ranks that end well say; listening: where they may do so, at some time."""
    found = set[str]()
    while any(rank.poll() is None for rank in ranks):
        found |= {place for rank in ranks for place in listeners(rank.pid)}
        time.sleep(0.01)
    assert found <= listening
    ends = [rank.communicate(timeout=120) for rank in ranks]
    for rank, (_, error) in zip(ranks, ends, strict=True):
        assert rank.returncode == 0, error
    return [out for out, _ in ends]


def listeners(pid: int) -> set[str]:
    """Addresses at which a process listens now."""
    try:
        connections = psutil.Process(pid).net_connections()
    except psutil.Error:  # it has just ended
        return set()
    return {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}


def test_ranks_of_one_node_meet_through_the_store_and_listen_on_loopback_alone(tmp_path: Path) -> None:
    root = f"file://{tmp_path}/run"
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NNODES": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9",
                "GLOO_SOCKET_IFNAME": "eth0"}  # fmt: skip
    ranks = started(root, *({**one_node, "SLURM_LOCALID": str(rank)} for rank in range(2)))
    outs = said(ranks, {"127.0.0.1", "::ffff:127.0.0.1"})
    [entry] = open_store(root).list("rendezvous/")
    assert entry.key == "rendezvous/attempt-0001-7-0-1.json"
    about = json.loads(open_store(root).get(entry.key))
    assert about["addresses"] == ["127.0.0.1"]
    assert about["port"] > 1024
    for rank, out in enumerate(outs):
        assert out.startswith(f"2 rank {rank} of 2 on ")
        assert "OMP_NUM_THREADS=6" in out
        assert about["secret"] not in out
        assert out.strip().endswith("hosts" if rank else f"hosts {socket.gethostname()}"), "no scheduler has said it"


def test_ranks_of_several_nodes_meet_at_one_address_of_rank_0(tmp_path: Path) -> None:
    (address, name), *_ = rendezvous.addresses() or [pytest.skip("this machine has no network")]
    root = f"file://{tmp_path}/run"
    two_nodes = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    ranks = started(root, *({**two_nodes, "SLURM_NODEID": str(rank)} for rank in range(2)))
    for rank, out in enumerate(said(ranks, {place for place, _ in rendezvous.addresses()})):
        assert out.startswith(f"2 rank {rank} of 2 on ")
        assert f"MASTER_ADDR={address} " in out
        assert f"GLOO_SOCKET_IFNAME={name}" in out
    [entry] = open_store(root).list("rendezvous/")
    about = json.loads(open_store(root).get(entry.key))
    assert about["addresses"] == [address]


def test_the_network_that_the_cluster_file_names_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "addresses", lambda: [("10.0.0.7", "eth0"), ("10.1.0.7", "ib0")])
    assert rendezvous._configured({"NCCL_SOCKET_IFNAME": "ib0"}) == "10.1.0.7"
    assert rendezvous._configured({"GLOO_SOCKET_IFNAME": "^docker"}) == ""


def test_ranks_of_a_launcher_here_meet_in_its_file_whatever_address_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RETORT_MEETING_FILE", f"{tmp_path}/store")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    before = listeners(os.getpid())
    store = ranks_env.meet(open_store(f"file://{tmp_path}"), 1)
    store.set("key", "value")
    assert (tmp_path / "store").stat().st_size
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert listeners(os.getpid()) == before


@pytest.fixture
def rank_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the rank that SLURM's variables describe."""
    for name, value in {**ranks_env.from_scheduler(SLURM), **SLURM}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def test_a_rank_0_that_does_not_appear_is_an_error_that_says_so(
    rank_5: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks_env, "MEET_S", 0.1)
    with pytest.raises(NotReady, match="rank 0 has not said within"):
        ranks_env.meet(open_store(f"file://{tmp_path}"), 1)


def test_the_store_outlives_bad_messages_and_its_keys_are_not_those_that_strangers_know(tmp_path: Path) -> None:
    from torch.distributed import TCPStore

    run = open_store(f"file://{tmp_path}")
    store, _ = rendezvous.listen(run, "told.json", 2, several=False, wait_s=1.0)
    store.set("default_pg/0", "right")
    told = json.loads(run.get("told.json"))
    for message in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), HEAD + b"\1" + b"\xff" * 8, HEAD + b"\1" + b"\0" * 4,
                    HEAD + b"\1" + _text(b"x") + _text(b"no number") + b"\4" + _text(b"x") + b"\1" * 8):  # fmt: skip
        stranger = socket.create_connection(("127.0.0.1", told["port"]))
        stranger.sendall(message)
        assert store.get("default_pg/0") == b"right"
    stranger = TCPStore("127.0.0.1", told["port"], 2, is_master=False, wait_for_workers=False)
    assert not stranger.check(["default_pg/0"])
    stranger.set("default_pg/0", "wrong")
    assert store.get("default_pg/0") == b"right"


HEAD = b"\0" + struct.pack("<I", 0x3C85F7CE)  # what torch's clients begin with


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def test_only_who_knows_the_word_shows_rank_0_its_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "addresses", lambda: [("127.0.0.1", "lo"), ("127.0.0.2", "lo")])
    monkeypatch.setattr(rendezvous, "HEAR_S", 0.2)
    run = open_store(f"file://{tmp_path}")
    with ThreadPoolExecutor(1) as pool:
        address = pool.submit(rendezvous._knocked, run, "told.json", 60.0)
        told = rendezvous._told(run, "told.json", 60.0)
        assert told["addresses"] == ["127.0.0.1", "127.0.0.2"]
        silent = socket.create_connection(("127.0.0.1", told["port"]))
        assert not rendezvous._knock({**told, "word": "0" * 32})
        assert rendezvous._knock({**told, "addresses": ["127.0.0.2"]})
        assert address.result(60) == "127.0.0.2"
        silent.close()


def test_rank_0_says_so_when_no_other_node_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "addresses", lambda: [("127.0.0.1", "lo")])
    with pytest.raises(NotReady, match="no rank of another node has reached rank 0 within"):
        rendezvous.listen(open_store(f"file://{tmp_path}"), "told.json", 2, several=True, wait_s=0.2)


def test_a_rank_0_that_cannot_be_reached_is_told_with_its_addresses(rank_5: None, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    about = {"addresses": ["127.0.0.1"], "port": 1, "token": "x"}
    store.put("rendezvous/attempt-0001-7-0-1.json", json.dumps(about).encode())
    with pytest.raises(NotReady, match=r"cannot be reached from .* on port 1 of any of its addresses \(127.0.0.1\)"):
        ranks_env.meet(store, 1)
