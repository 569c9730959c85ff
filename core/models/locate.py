"""From a weights field of a recipe to a state dict: staged hub weights, a file, a bucket, or an earlier run.

No hash of an upstream file is known beforehand. The first use of an address as weights records that of its bytes in the
store; other bytes at the same address are refused later.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from core.data.ranged_file import RangedFile
from core.models import files
from core.models.layouts.keys import few
from core.models.weights import WeightsError, detect
from core.storage import MissingObject, Store, StoreError, local_path, open_store, resolve

T = TypeVar("T")


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
    return use_weights(weights, model, root, _some)


def use_weights(weights: str, model: str, root: str, take: Callable[[dict[str, Any]], T]) -> T:
    """What `take` makes of the checkpoint of a weights field.  Raises as read_weights, and WeightsError of `take`, with
    the file's address before it.

    The file's hash is recorded only when `take` could use it: what proves to be no weights, or another network's, may
    be replaced.
    """
    return _use(weights_uri(weights, model, root), root, take)[0]


def outline(uri: str, opened: Callable[[str], Store] = open_store) -> dict[str, Any]:
    """Checkpoint at an address with tensors of the right shapes and no numbers in them; few bytes are read.

    opened: the store of an address.  Raises WeightsError, StoreError.
    """
    folder, name = _split(uri)
    store = opened(f"{folder}/")
    if not name.endswith(files.INDEX):
        return _outline(store, name, uri)
    names = files.shards(store.get_range(name, 0, files.MOST_INDEX), uri)
    if absent := [each for each in names if store.size(each) is None]:
        raise WeightsError(f"{uri}: names files that are not there: {few(absent)}")
    return files.join({each: _outline(store, each, f"{folder}/{each}") for each in names}, uri)


def _outline(store: Store, name: str, uri: str) -> dict[str, Any]:
    size = store.size(name)
    if size is None:
        raise MissingObject(f"{uri} does not exist")
    return files.outline(cast(BinaryIO, RangedFile(store, name, size)), size, uri)


def digest(weights: str, model: str, root: str) -> str:
    """SHA-256 of the weight file; of several, that of their hashes.  Raises as read_weights."""
    return _use(weights_uri(weights, model, root), root, _some)[1]


def recorded_digest(weights: str, model: str, root: str) -> str:
    """SHA-256 of the weight file as of its first use, which later uses are held to; no weights are read if it is known.

    Raises as read_weights.
    """
    return _recorded(weights_uri(weights, model, root), root) or digest(weights, model, root)


def record_key(uri: str, root: str) -> str:
    """Where the store keeps the SHA-256 of an address: beside files of its own, else among its weights."""
    own = f"{root.rstrip('/')}/"
    if uri.startswith(own):
        return f"{uri.removeprefix(own)}.sha256"
    return f"weights/sha256/{hashlib.sha256(uri.encode()).hexdigest()[:40]}"


def one_of_several(uri: str) -> str:
    """A line for the address of a file that is named as one part of several; empty for others."""
    several = re.search(r"([^/]*)-\d{5}-of-\d{5}(\.\w+)$", uri)
    return f"\n  it is one of several files: name their index, {several[1]}{several[2]}{files.INDEX}" if several else ""


def _some(state: dict[str, Any]) -> dict[str, Any]:
    detect(state)  # refuses what has no tensors
    return state


def _split(uri: str) -> tuple[str, str]:
    """URI of the folder, and the file's name in it."""
    folder, _, name = uri.rpartition("/")
    if not name:
        raise WeightsError(f"weights {uri!r}: not the address of a file")
    path = local_path(uri)
    return folder, path.name if path else name


def _fetch(uri: str) -> tuple[dict[str, Any], str]:
    """The checkpoint at an address and its SHA-256.  Raises WeightsError, StoreError."""
    folder, name = _split(uri)
    store = open_store(f"{folder}/")
    with tempfile.TemporaryDirectory(prefix="retort-weights-") as temporary:
        path = Path(temporary) / "weights"

        def one(each: str) -> tuple[dict[str, Any], str]:
            store.get_file(each, path)
            with path.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            return files.read(path, f"{folder}/{each}"), sha

        if not name.endswith(files.INDEX):
            return one(name)
        data = store.get_range(name, 0, files.MOST_INDEX)
        found = {each: one(each) for each in files.shards(data, uri)}
        text = "".join(f"{sha}  {each}\n" for each, (_, sha) in found.items())
        whole = files.join({each: part for each, (part, _) in found.items()}, uri)
        return whole, hashlib.sha256(text.encode()).hexdigest()


def _use(uri: str, root: str, take: Callable[[dict[str, Any]], T]) -> tuple[T, str]:
    """What `take` makes of a checkpoint, and its hash, which is compared with the recorded one, or recorded."""
    state, sha = _fetch(uri)
    known = _recorded(uri, root)
    _compare(uri, sha, known, root)
    try:
        taken = take(state)
    except WeightsError as error:
        raise WeightsError(f"{uri}: {error}{one_of_several(uri)}") from None
    if root and not known:
        with suppress(StoreError, OSError):  # a store that cannot be written keeps no record
            open_store(root).put_if_absent(record_key(uri, root), f"{sha}  {uri}\n".encode())
        _compare(uri, sha, _recorded(uri, root), root)  # another process may have been first
    return taken, sha


def _recorded(uri: str, root: str) -> str:
    """The hash of the first use of an address; empty where none is known."""
    try:
        return open_store(root).get(record_key(uri, root)).decode().split()[0] if root else ""
    except (StoreError, OSError, ValueError, IndexError):
        return ""


def _compare(uri: str, sha: str, known: str, root: str) -> None:
    if known and known != sha:
        place = f"{open_store(root).uri.rstrip('/')}/{record_key(uri, root)}"
        raise WeightsError(
            f"{uri} is not the file of its first use: its SHA-256 is {sha}, recorded was {known}. Put the first file "
            f"back, or, if the change is meant, remove the record {place}"
        )
