"""What ranks exchange beside gradients: per-micro-batch statistics, log values, names, the wish to stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Comm:
    """The ranks of a run; every call works, and does nothing, with one rank and no process group."""

    def __init__(self, device: torch.device) -> None:
        ready = dist.is_available() and dist.is_initialized()
        self.device = device
        self.rank: int = dist.get_rank() if ready else 0
        self.world: int = dist.get_world_size() if ready else 1

    def gather(self, local: Tensor) -> Tensor:
        """(m, ...) on every rank -> (world * m, ...), rank by rank: the canonical order of micro-batches."""
        if self.world == 1:
            return local
        out = local.new_empty(self.world * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(out, local.contiguous())
        return out

    def mean(self, values: Tensor) -> Tensor:
        """Average over ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def max(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def sum(self, values: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def union(self, names: Iterable[str]) -> set[str]:
        """Names that any rank has, the same set on every rank. Synchronises."""
        own = sorted(names)
        if self.world == 1:
            return set(own)
        text = torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8, device=self.device)
        sizes = self.gather(torch.tensor([len(text)], device=self.device)).tolist()
        texts = self.gather(F.pad(text, (0, max(sizes) - len(text))).unsqueeze(0)).tolist()
        return {name for text, size in zip(texts, sizes, strict=True) for name in json.loads(bytes(text[:size]))}

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


class Wishes:
    """What ranks wish for, known to all of them one step later without a device synchronisation.

    Numbers travel by an asynchronous all-reduce (the largest wins) of a CPU tensor on its own gloo group: started at
    step n, read at n+1, so that all ranks leave the loop, or pass over a save, at the same step boundary.
    """

    def __init__(self, comm: Comm) -> None:
        self._group: Any = dist.new_group(backend="gloo") if comm.world > 1 else None
        self._flags: Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, *wishes: int) -> list[int]:
        """Offer this rank's wishes; returns the largest of all ranks at the previous call (alone: of this one)."""
        if self._group is None:
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._flags is not None:
            self.close()
            agreed = [int(n) for n in self._flags.numpy()]
        self._flags = torch.tensor(wishes, dtype=torch.int32)
        self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def settle(self, number: int) -> int:
        """The largest number of all ranks, now. Waits for the exchange in flight."""
        self.close()
        if self._group is None:
            return number
        flag = torch.tensor([number], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag.numpy()[0])

    def close(self) -> None:
        """Wait for the exchange in flight."""
        if self._work is not None:
            self._work.wait()
            self._work = None
