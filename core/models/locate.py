"""From a weights field of a recipe to a state dict: staged hub weights, a file, a bucket, or an earlier run."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from torch import Tensor

from core.models.weights import WeightsError, read
from core.storage import open_store, resolve


def weights_uri(weights: str, model: str, root: str) -> str:
    """Where the bytes of a weights field lie.

    hub | hub:<id> -> the copy that submit staged into the store; run:<id> -> that run's exported student;
    store:x, file:///x, s3://x -> as they say.
    """
    if weights == "hub" or weights.startswith("hub:"):
        hub_id = weights.removeprefix("hub").removeprefix(":") or f"timm/{model}"
        return f"{root}/weights/{hub_id.replace('/', '--')}/model.safetensors"
    if weights.startswith("run:"):
        return f"{root}/runs/{weights.removeprefix('run:')}/export/model.safetensors"
    return resolve(weights, root)


def read_weights(weights: str, model: str, root: str) -> dict[str, Tensor]:
    """State dict of a weights field.  Raises WeightsError, or StoreError when the bytes cannot be had."""
    return _fetch(weights_uri(weights, model, root))[0]


def digest(weights: str, model: str, root: str) -> str:
    """SHA-256 of the weight file."""
    return _fetch(weights_uri(weights, model, root))[1]


def _fetch(uri: str) -> tuple[dict[str, Tensor], str]:
    folder, _, name = uri.rpartition("/")
    if not name:
        raise WeightsError(f"weights {uri!r}: not the address of a file")
    with tempfile.TemporaryDirectory(prefix="retort-weights-") as temporary:
        path = Path(temporary) / name
        open_store(f"{folder}/").get_file(name, path)
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha.update(chunk)
        return read(path), sha.hexdigest()
