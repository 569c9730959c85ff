"""How many ranks a run gets, on what device, with how many threads each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, inf
from typing import TYPE_CHECKING

from jobs.errors import UserError

if TYPE_CHECKING:
    from core.recipe import Recipe


@dataclass(frozen=True)
class Placement:
    ranks: int
    device: str  # cpu | cuda
    threads: int  # intra-op, per rank
    nodes: int = 1  # with equally many ranks each


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def allowed_ranks(recipe: Recipe) -> list[int]:
    """World sizes that share the canonical micro-batches of every stage evenly."""
    stages = [recipe.stage(name) for name in recipe.stage_names()]
    micro = gcd(*(s.batch // s.micro_batch for s in stages))
    return [n for n in range(1, micro + 1) if micro % n == 0]


def filling(recipe: Recipe, per_node: int) -> list[int]:
    """Those of the allowed ranks that leave no node of several half empty."""
    return [n for n in allowed_ranks(recipe) if n <= per_node or n % per_node == 0]


def place(recipe: Recipe, gpus: int) -> Placement:
    """Ranks on this machine.  Raises UserError when the wanted number cannot share the global batch."""
    launch, device = recipe.launch, device_of(recipe, gpus)
    cores = len(os.sched_getaffinity(0))
    room = max(gpus, 1) if device == "cuda" else cores
    ranks = _ranks(recipe, allowed_ranks(recipe), launch.ranks or (room if device == "cuda" else 2), room=room)
    threads = launch.threads or max(1, cores // ranks)
    return Placement(ranks, device, threads)


def spread(recipe: Recipe, per_node: int, gpus: int, cpus: int) -> Placement:
    """Ranks on nodes of `per_node` each, all of them full; one node unless the recipe asks for more.  gpus: per node,
    cpus: per rank.  Raises UserError."""
    ranks = _ranks(recipe, filling(recipe, per_node), recipe.launch.ranks or per_node, f" on nodes of {per_node}")
    return Placement(ranks, device_of(recipe, gpus), recipe.launch.threads or cpus, -(-ranks // per_node))


def demand(device: str, cpus: int) -> dict[str, float]:
    """What a rank takes of a node, in Ray's names."""
    return {"CPU": float(cpus), **({"GPU": 1.0} if device == "cuda" else {})}


def fits(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Ranks for which a node has room.  resources: of the node; each: of a rank, in Ray's names."""
    return min(int(resources.get(name, 0) // number) for name, number in each.items())


def gathered(recipe: Recipe, nodes: Sequence[Mapping[str, float]], cpus: int) -> Placement:
    """Ranks on nodes that differ: one for each GPU, or on CPU one for each node.  Raises UserError."""
    device = device_of(recipe, int(sum(node.get("GPU", 0) for node in nodes)))
    each = demand(device, cpus)
    room = sorted((fits(node, each) for node in nodes), reverse=True)
    usual = sum(room) if device == "cuda" else sum(count > 0 for count in room)
    ranks = _ranks(recipe, allowed_ranks(recipe), recipe.launch.ranks or max(usual, 1), room=max(sum(room), 1))
    filled = [sum(room[: n + 1]) for n in range(len(room))]
    full = next((n + 1 for n, count in enumerate(filled) if count >= ranks), len(room))
    return Placement(ranks, device, recipe.launch.threads or cpus, max(full, 1))


def filled(one: Placement, count: int, per_node: int) -> Placement:
    """Room for so many workers of a rank each, on as few nodes as hold them."""
    nodes = -(-count // per_node)
    return replace(one, ranks=nodes * -(-count // nodes), nodes=nodes)


def device_of(recipe: Recipe, gpus: int) -> str:
    return ("cuda" if gpus else "cpu") if recipe.launch.device == "auto" else recipe.launch.device


def typed(allowed: Sequence[int], most: float) -> str:
    """What to type for as many ranks as are allowed and there is room for."""
    return f'SET="launch.ranks={max((n for n in allowed if n <= most), default=1)}"'


def _ranks(recipe: Recipe, allowed: list[int], wanted: int, where: str = "", room: float = inf) -> int:
    """room: ranks that the machine at hand can do at once, for what is proposed."""
    asked = recipe.launch.ranks
    if asked and asked not in allowed:
        raise UserError(
            f"launch.ranks: {asked} ranks{where} cannot share the micro-batches of a global batch evenly; allowed: "
            f"{', '.join(map(str, allowed))}: {typed(allowed, min(asked, room))} "
            "(or change train.batch, train.micro_batch)"
        )
    return max(n for n in allowed if n <= wanted)
