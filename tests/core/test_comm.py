from __future__ import annotations

from typing import Any

import torch

from core.comm import Comm, StopFlag
from tests.ranks import run_ranks


def exchanged() -> dict[str, Any]:
    comm = Comm(torch.device("cpu"))
    own = torch.tensor([[float(comm.rank), 1.0]])
    flag = StopFlag(comm)
    heard = [flag.exchange(comm.rank == 1 and step == 2) for step in range(5)]
    flag.close()
    return {
        "gathered": comm.gather(own).tolist(),
        "mean": comm.mean(own.clone()).tolist(),
        "max": comm.max(own.clone()).tolist(),
        "sum": comm.sum(own.clone()).tolist(),
        "union": sorted(comm.union({"shared", f"rank {comm.rank} \u00fc" * (1 + comm.rank)})),
        "nothing": comm.union([]),
        "heard": heard,
    }


def test_ranks_hear_the_same_of_each_other() -> None:
    first, second = run_ranks(exchanged, 2)
    assert first == second
    assert first["gathered"] == [[0.0, 1.0], [1.0, 1.0]]
    assert (first["mean"], first["max"], first["sum"]) == ([[0.5, 1.0]], [[1.0, 1.0]], [[1.0, 2.0]])
    assert first["union"] == ["rank 0 \u00fc", "rank 1 \u00fc" * 2, "shared"]
    assert first["nothing"] == set()


def test_one_rank_s_wish_is_known_to_all_one_step_later_and_then_forgotten() -> None:
    assert run_ranks(exchanged, 2)[0]["heard"] == [False, False, False, True, False]


def test_alone_everything_works_without_a_process_group() -> None:
    comm, x = Comm(torch.device("cpu")), torch.tensor([3.0])
    flag = StopFlag(comm)
    assert comm.gather(x) is x
    assert [float(f(x)) for f in (comm.mean, comm.max, comm.sum)] == [3.0] * 3
    assert comm.union(["b", "a", "a"]) == {"a", "b"}
    assert [flag.exchange(False), flag.exchange(True)] == [False, True]
    flag.close()
    comm.barrier()
