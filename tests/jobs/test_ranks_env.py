"""Where ranks that SLURM starts are, and how they find each other without names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from core.storage import open_store
from jobs import ranks_env
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


def test_slurm_s_variables_become_torch_s() -> None:
    found = ranks_env.from_scheduler(SLURM)
    ours = {"RETORT_NODE": "0", "RETORT_NODELIST": "", "RETORT_START": "7-0-1"}
    torch = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "6"}
    assert found == {**torch, **ours}
    assert ranks_env.from_scheduler({**SLURM, "OMP_NUM_THREADS": "2"})["OMP_NUM_THREADS"] == "2"


def test_a_rank_that_knows_its_place_keeps_it() -> None:
    assert ranks_env.from_scheduler({**SLURM, "RANK": "0"}) == {}
    assert ranks_env.from_scheduler({}) == {}


def test_who_has_an_address_already_does_not_look_for_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert ranks_env.meet(open_store(f"file://{tmp_path}"), 1) is None


def test_ranks_meet_through_the_store_on_a_port_that_the_kernel_picks(tmp_path: Path) -> None:
    root = f"file://{tmp_path}/run"
    given = ("SLURM", "MASTER", "RANK", "OMP")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    two = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, root],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **kept,
                **two,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
        )  # fmt: skip
        for rank in range(2)
    ]
    for rank, child in enumerate(ranks):
        out, error = child.communicate(timeout=120)
        assert child.returncode == 0, error
        assert out.startswith(f"2 rank {rank} of 2 on ")
        assert "OMP_NUM_THREADS=6" in out
        assert out.strip().endswith("hosts" if rank else f"hosts {socket.gethostname()}"), "no scheduler has said it"
    [entry] = open_store(root).list("rendezvous/")
    assert entry.key == "rendezvous/attempt-0001-7-0-1.json"
    about = json.loads(open_store(root).get(entry.key))
    assert about["port"] > 1024


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


def test_a_rank_0_that_cannot_be_reached_is_told_with_its_addresses(rank_5: None, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    about = {"addresses": ["127.0.0.1"], "port": 1, "token": "x"}
    store.put("rendezvous/attempt-0001-7-0-1.json", json.dumps(about).encode())
    with pytest.raises(NotReady, match=r"cannot be reached from .* on port 1 of any of its addresses \(127.0.0.1\)"):
        ranks_env.meet(store, 1)
