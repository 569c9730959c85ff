from __future__ import annotations

from typing import Any

import torch

from core.comm import Comm, Wishes
from tests.ranks import run_ranks


def exchanged() -> dict[str, Any]:
    comm = Comm(torch.device("cpu"))
    own = torch.tensor([[float(comm.rank), 1.0]])
    wishes = Wishes(comm)
    heard = [wishes.exchange(3 * comm.rank if step == 2 else 0, int(step == comm.rank)) for step in range(5)]
    largest = [wishes.exchange(*own) for own in [(comm.rank, 5 - comm.rank), (0, 0), (2, 1 - comm.rank), (0, 0)]]
    settled = wishes.settle(4 * comm.rank)
    wishes.exchange(comm.rank, 0)
    later = [wishes.settle(2 - comm.rank), wishes.exchange(0, 0), wishes.exchange(0, 0)]
    wishes.close()
    wishes.close()
    return {
        "gathered": comm.gather(own).tolist(),
        "mean": comm.mean(own.clone()).tolist(),
        "max": comm.max(own.clone()).tolist(),
        "sum": comm.sum(own.clone()).tolist(),
        "union": sorted(comm.union({"shared", f"rank {comm.rank} \u00fc" * (1 + comm.rank)})),
        "nothing": comm.union([]),
        "heard": heard,
        "largest": largest,
        "settled": settled,
        "later": later,
    }


def test_ranks_hear_the_same_of_each_other() -> None:
    first, second = run_ranks(exchanged, 2)
    assert first == second
    assert first["gathered"] == [[0.0, 1.0], [1.0, 1.0]]
    assert (first["mean"], first["max"], first["sum"]) == ([[0.5, 1.0]], [[1.0, 1.0]], [[1.0, 2.0]])
    assert first["union"] == ["rank 0 \u00fc", "rank 1 \u00fc" * 2, "shared"]
    assert first["nothing"] == set()


def test_wishes_of_ranks_are_known_to_all_one_step_later_and_then_forgotten() -> None:
    for rank in run_ranks(exchanged, 2):
        assert rank["heard"] == [[0, 0], [0, 1], [0, 1], [3, 0], [0, 0]]
        assert rank["largest"] == [[0, 0], [1, 5], [0, 0], [2, 1]], "the largest of each, for itself"


def test_ranks_settle_on_the_largest_at_once_and_forget_no_wish_over_it() -> None:
    for rank in run_ranks(exchanged, 2):
        assert rank["settled"] == 4
        assert rank["later"] == [2, [1, 0], [0, 0]]


def test_alone_everything_works_without_a_process_group() -> None:
    comm, x = Comm(torch.device("cpu")), torch.tensor([3.0])
    wishes = Wishes(comm)
    assert comm.gather(x) is x
    assert [float(f(x)) for f in (comm.mean, comm.max, comm.sum)] == [3.0] * 3
    assert comm.union(["b", "a", "a"]) == {"a", "b"}
    assert [wishes.exchange(0, 2), wishes.exchange(1, 0)] == [[0, 2], [1, 0]]
    assert wishes.settle(3) == 3
    wishes.close()
    comm.barrier()
