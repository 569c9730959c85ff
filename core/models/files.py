"""Weight files, read whole or as an outline: the names and shapes of their tensors, for which few bytes are read."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from core.models import kinds
from core.models.layouts.keys import WeightsError, few
from core.models.torchscript import is_torchscript, read_torchscript
from core.storage import StoreError

INDEX = ".index.json"  # ends the name of what lists the files of weights that are in several
MOST_INDEX = 16 << 20  # bytes


def read(path: str | Path, where: str = "") -> dict[str, Any]:
    """A checkpoint as its file holds it, on the CPU: safetensors, a torch archive of plain data, or TorchScript.

    where: what messages call the file.
    Raises:
        WeightsError: no such file, damaged, of another kind, or it needs pickled objects, which are never run.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{where or path}: no such weight file")
    with path.open("rb") as file:
        return _read(file, path.stat().st_size, where or str(path), path)


def outline(file: BinaryIO, size: int, where: str) -> dict[str, Any]:
    """A checkpoint with tensors of the right shapes and no numbers in them.  Raises as `read`, and StoreError."""
    return _read(file, size, where, None)


def shards(data: bytes, where: str) -> list[str]:
    """Files that an index names, in the order of their names.  Raises WeightsError."""
    try:
        listed: dict[str, str] = json.loads(data)["weight_map"]
        return sorted({str(name) for name in listed.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{where}: no index of weights in several files, which has a `weight_map`") from None


def join(parts: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Any]:
    """One checkpoint of several files.  Raises WeightsError where two have the same key."""
    joined: dict[str, Any] = {}
    for name, part in parts.items():
        if double := sorted(map(str, joined.keys() & part.keys())):
            raise WeightsError(f"{where}: {few(double[:1])} is in {few([name])} and in another file of the index")
        joined |= part
    return joined


def _read(file: BinaryIO, size: int, where: str, path: Path | None) -> dict[str, Any]:
    """path: where the file lies; None for an outline."""
    head = file.read(kinds.HEAD)
    file.seek(0)
    protocol = 2
    try:
        if kinds.is_safetensors(head):
            return _header(file, size) if path is None else dict(load_file(path, device="cpu"))
        kinds.refuse(head, where)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = kinds.check_archive(archive, size, where)
                with archive.open(name) as pickled:
                    protocol = kinds.check_pickle(cast(BinaryIO, pickled), where)
                if is_torchscript(archive):
                    return dict(read_torchscript(archive, name, whole=path is not None))
        elif kinds.is_legacy(head):
            file.seek(0)
            protocol = max(kinds.check_pickle(file, where) for _ in range(kinds.LEGACY_PICKLES))
        if protocol > 3:
            raise WeightsError(_refusal(where, "", protocol))
        file.seek(0)
        state = _load(file if path is None else path, skip=path is None)
    except (MemoryError, WeightsError, StoreError):
        raise
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        raise WeightsError(_refusal(where, str(error), protocol)) from None
    if not isinstance(state, dict):
        raise WeightsError(f"{where}: holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _load(source: BinaryIO | Path, skip: bool) -> Any:
    with torch.serialization.skip_data() if skip else nullcontext():
        return torch.load(source, map_location="cpu", weights_only=True)


def _header(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """Names and shapes of a safetensors file.  Raises ValueError and others for a damaged one."""
    length = int.from_bytes(file.read(8), "little")
    entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    if 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size:
        raise ValueError("cut off")
    return {name: torch.empty(entry["shape"], device="meta") for name, entry in entries.items()}


def _harmless() -> list[Any]:
    """Plain data that released checkpoints hold beside tensors: argument namespaces, paths and numeric arrays."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    numpy_1 = [(core._reconstruct, "numpy.core.multiarray._reconstruct"), (core.scalar, "numpy.core.multiarray.scalar")]
    numpy_2 = [core._reconstruct, core.scalar, np.ndarray, np.dtype]
    paths = [(pathlib.PosixPath, "pathlib.PosixPath"), (pathlib.PosixPath, "pathlib._local.PosixPath")]
    return [argparse.Namespace, *paths, *numpy_1, *numpy_2, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd")]


torch.serialization.add_safe_globals(_harmless())  # once: a context would take it from other threads that read


def _refusal(where: str, reason: str, protocol: int) -> str:
    if found := re.search(r"GLOBAL (\w[\w.]*)", reason):
        return (
            f"{where}: needs an object {found[1]}, and only plain data is read. If you trust the file, convert "
            "it once where it was made: safetensors.torch.save_file(state, 'weights.safetensors') with its state dict"
        )
    if protocol > 2:
        return (
            f"{where}: saved with pickle protocol {protocol}, of which only 2 is read, torch's own. If you trust the "
            "file, save its state dict once more: torch.save(state, path), or safetensors.torch.save_file(state, path)"
        )
    return f"{where}: damaged, or neither a safetensors file nor a torch archive; fetch it again or convert it"
