"""From a weights field of a recipe to a state dict: staged hub weights, a file, a bucket, or an earlier run.

No hash of an upstream file is known beforehand. The first use of an address records that of its bytes in the store;
other bytes at the same address are refused later.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from core.models.weights import WeightsError, read
from core.storage import MissingObject, StoreError, open_object, open_store, resolve


def weights_uri(weights: str, model: str, root: str) -> str:
    """Where the bytes of a weights field lie.

    hub | hub:<id> -> the copy that submit staged into the store; run:<id> -> that run's exported student;
    store:x, file:///x, s3://x -> as they say.  Raises StoreError for a path without a scheme.
    """
    if weights == "hub" or weights.startswith("hub:"):
        hub_id = weights.removeprefix("hub").removeprefix(":") or f"timm/{model}"
        return f"{root}/weights/{hub_id.replace('/', '--')}/model.safetensors"
    if weights.startswith("run:"):
        return f"{root}/runs/{weights.removeprefix('run:')}/export/model.safetensors"
    return resolve(weights, root)


def read_weights(weights: str, model: str, root: str) -> dict[str, Any]:
    """Checkpoint of a weights field, as its file holds it.

    Raises WeightsError, also when the bytes are not those of the first use, or StoreError when they cannot be had.
    """
    return _fetch(weights_uri(weights, model, root), root)[0]


def digest(weights: str, model: str, root: str) -> str:
    """SHA-256 of the weight file.  Raises as read_weights."""
    return _fetch(weights_uri(weights, model, root), root)[1]


def recorded_digest(weights: str, model: str, root: str) -> str:
    """SHA-256 of the weight file as of its first use, which later uses are held to; no weights are read if it is known.

    Raises as read_weights.
    """
    uri = weights_uri(weights, model, root)
    try:
        return open_store(root).get(record_key(uri, root)).decode().split()[0]
    except MissingObject:
        return _fetch(uri, root)[1]


def record_key(uri: str, root: str) -> str:
    """Where the store keeps the SHA-256 of an address: beside files of its own, else among its weights."""
    own = f"{root.rstrip('/')}/"
    if uri.startswith(own):
        return f"{uri.removeprefix(own)}.sha256"
    return f"weights/sha256/{hashlib.sha256(uri.encode()).hexdigest()[:40]}"


def _fetch(uri: str, root: str) -> tuple[dict[str, Any], str]:
    store, name = open_object(uri)
    if not name:
        raise WeightsError(f"weights {uri!r}: not the address of a file")
    with tempfile.TemporaryDirectory(prefix="retort-weights-") as temporary:
        path = Path(temporary) / name
        store.get_file(name, path)
        with path.open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
        _compare(uri, sha, root)
        return read(path), sha


def _compare(uri: str, sha: str, root: str) -> None:
    """Record a file's hash, or compare it with the recorded one; a store that cannot be written keeps no record."""
    if not root:
        return
    store, key = open_store(root), record_key(uri, root)
    try:
        new = store.put_if_absent(key, f"{sha}  {uri}\n".encode())
        known = sha if new else store.get(key).decode().split()[0]
    except (StoreError, OSError):
        return
    if known != sha:
        raise WeightsError(
            f"{uri} is not the file of its first use: its SHA-256 is {sha}, recorded was {known}. Put the first file "
            f"back, or, if the change is meant, remove the record {store.uri.rstrip('/')}/{key}"
        )
