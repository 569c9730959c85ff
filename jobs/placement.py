"""How many ranks a run gets, on what device, with how many threads each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from jobs.errors import UserError

if TYPE_CHECKING:
    from core.config import Recipe


@dataclass(frozen=True)
class Placement:
    ranks: int
    device: str  # cpu | cuda
    threads: int  # intra-op, per rank


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def allowed_ranks(recipe: Recipe) -> list[int]:
    """World sizes that share the canonical micro-batches of every stage evenly."""
    stages = [recipe.stage(name) for name in recipe.stage_names()]
    micro = gcd(*(s.batch // s.micro_batch for s in stages))
    return [n for n in range(1, micro + 1) if micro % n == 0]


def place(recipe: Recipe, gpus: int) -> Placement:
    """Ranks on this machine.  Raises UserError when the wanted number cannot share the global batch."""
    launch, allowed = recipe.launch, allowed_ranks(recipe)
    device = ("cuda" if gpus else "cpu") if launch.device == "auto" else launch.device
    wanted = launch.ranks or (max(gpus, 1) if device == "cuda" else 2)
    if launch.ranks and launch.ranks not in allowed:
        raise UserError(
            f"launch.ranks: {launch.ranks} ranks cannot share the micro-batches of a global batch evenly; "
            f"allowed: {', '.join(map(str, allowed))} (or change train.batch, train.micro_batch)"
        )
    ranks = max(n for n in allowed if n <= wanted)
    threads = launch.threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    return Placement(ranks, device, threads)
