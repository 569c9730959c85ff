"""What a commit costs where 1,024 ranks have saved: requests, seconds and bytes of the manifest, on a real server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import pytest
import timm
import torch
from torch import nn

from core import commits, parts
from core.checkpoint import newest
from core.fragments import KINDS
from core.manifest import Manifest, Position, Slice, part
from core.models.heads import Ladder
from core.optim import decay_groups
from core.snapshot import Part
from core.storage import Store, open_store
from tests.faults import FaultyProxy

pytestmark = pytest.mark.system
WORLD, TENSORS = 1024, 805
TINY = b"\0" * 16  # stands in for a rank's tensors, whose slices are described at their true size
T = TypeVar("T")
Run = tuple[str, int, int]  # of a tensor: name, first element, elements


def vit_g() -> nn.Module:
    """1.1 G parameters without memory: a ViT-g student and a ladder of heads on 30 of its blocks."""
    with torch.device("meta"):
        student = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0)
        student.norm.requires_grad_(False)
        ladder = Ladder(1408, {"teacher": 1024}, range(30), 40, hidden=16, last_hidden=16)
        return nn.ModuleDict({"encoder": student, "lp": ladder})


def cut(module: nn.Module, world: int) -> Iterator[list[Run]]:
    """What each rank owns at ZeRO 1: every group of parameters is one flat vector, cut by rank."""
    owned: list[list[Run]] = [[] for _ in range(world)]
    for group in decay_groups(module.named_parameters(), 0.05):
        share = -(-sum(p.numel() for p in group["params"]) // (2 * world)) * 2
        at = 0
        for name, parameter in zip(group["names"], group["params"], strict=True):
            begin, end = at, at + parameter.numel()
            for rank in range(begin // share, (end - 1) // share + 1):
                first, last = max(begin, rank * share), min(end, (rank + 1) * share)
                owned[rank].append((name, first - begin, last - first))
            at = end
    yield from owned


def described(runs: list[Run]) -> Part:
    slices, end, draw = [], 8, random.Random(0)
    for name, start, numel in runs:
        for kind in KINDS:
            size = 4 * numel
            slices.append(Slice(name, kind, start, numel, "F32", end, size, draw.getrandbits(32)))
            end += size
    return Part(len(TINY), draw.getrandbits(32), True, slices)


def agreed(module: nn.Module) -> Manifest:
    shapes = {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}
    place = Position("main", 200, 200, False, 819_200)
    return Manifest(place, "f" * 64, 0, 1, WORLD, 1, 200, time.time(), shapes)


def put_all(store: Store, manifest: Manifest, owned: list[Part]) -> None:
    def put(rank: int) -> None:
        store.put(f"{manifest.key}/{part(rank)}.safetensors", TINY)
        store.put(f"{manifest.key}/{part(rank)}.json", parts.describe(None if rank else manifest, owned[rank]))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, range(WORLD)))


def timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def test_a_checkpoint_of_1024_ranks_is_committed_in_one_request_a_rank_and_a_few_more(
    bucket: str, request: pytest.FixtureRequest
) -> None:
    module, store = vit_g(), open_store(f"{bucket}/runs/wide")
    manifest, owned = agreed(module), [described(runs) for runs in cut(module, WORLD)]
    assert len(manifest.shapes) == TENSORS
    put_all(store, manifest, owned)

    whole, collect_s = timed(lambda: parts.collect(store, manifest.key))
    assert isinstance(whole, Manifest), whole
    number, commit_s = timed(lambda: commits.commit(store, whole, 0))
    found, newest_s = timed(lambda: newest(store))
    assert number == 1
    assert found == replace(whole, number=1)
    assert found.slices == [replace(s, file=f"{part(rank)}.safetensors") for rank in range(WORLD)
                            for s in owned[rank].slices]  # fmt: skip
    assert len(found.files) == WORLD

    proxy: FaultyProxy = request.getfixturevalue("proxy")
    watched = open_store(store.uri)
    again = parts.collect(watched, manifest.key)
    assert again == whole
    assert commits.commit(watched, whole, number) == 2
    seen = list(proxy.seen)
    last = newest(store)
    assert last is not None
    assert last.number == 2

    lists, puts = (sum(sign in line for line in seen) for sign in ("list-type=2", "PUT "))
    size, about = store.size(commits.key(2)), store.size(f"{manifest.key}/{part(1)}.json")
    print(f"\n{WORLD} ranks, {TENSORS} tensors, {len(whole.slices)} slices: {len(seen)} requests ({lists} listings, "
          f"{puts} put), collect {collect_s:.2f} s, commit {commit_s:.2f} s, newest {newest_s:.2f} s, "
          f"manifest {size} bytes, a rank's description {about} bytes")  # fmt: skip
    assert puts == 1
    assert lists <= 4
    assert WORLD <= len(seen) <= WORLD + 8
