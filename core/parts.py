"""How ranks confirm their parts of a checkpoint: each puts a description beside its file; who finds all may commit."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from core import manifest as manifests
from core import small_json
from core.manifest import Manifest, part
from core.snapshot import Part
from core.storage import Store

READERS = 16
REFUSED = "the state holds infinities or NaN"


def describe(manifest: Manifest | None, own: Part) -> bytes:
    """Content of rank-NNNN.json: what this rank wrote, and, from rank 0, what all ranks agree on."""
    about = {} if manifest is None else {"about": manifests.to_json(manifest)}
    return json.dumps({**about, "part": own.to_json()}).encode()


def collect(run: Store, key: str) -> Manifest | str | None:
    """The whole of the checkpoint in folder `key`; why it cannot be one; or None while parts are missing.

    Reads by 16 at a time: one request per rank, and one listing per thousand files.  Raises StoreError.
    """
    sizes = {e.key.removeprefix(f"{key}/"): e.size for e in run.list(f"{key}/")}
    if f"{part(0)}.json" not in sizes:
        return None
    try:
        return _whole(run, key, sizes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{key}: a part's description is unreadable: {error}"


def _whole(run: Store, key: str, sizes: dict[str, int]) -> Manifest | str | None:
    first = _read(run, f"{key}/{part(0)}.json")
    manifest = manifests.from_json(first["about"])
    names = [part(rank) for rank in range(manifest.world)]
    if any(f"{name}.json" not in sizes or f"{name}.safetensors" not in sizes for name in names):
        return None
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda name: _read(run, f"{key}/{name}.json"), names))
    found = [Part.from_json(content["part"]) for content in read]
    if not all(own.finite for own in found):
        return REFUSED
    files, slices = {}, []
    for name, own in zip(names, found, strict=True):
        file = f"{name}.safetensors"
        if sizes[file] != own.size:
            return f"{key}/{file} has {sizes[file]} bytes instead of {own.size}"
        files[file] = {"size": own.size, "crc32c": own.crc32c}
        slices += [replace(s, file=file) for s in own.slices]
    return replace(manifest, files=files, slices=slices)


def _read(run: Store, key: str) -> dict[str, Any]:
    content: dict[str, Any] = small_json.read(run, key, dict, small_json.LARGE)
    return content
