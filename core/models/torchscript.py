"""Tensors of a TorchScript archive, which is how OpenAI published CLIP, without running anything that it holds."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MARK = "constants.pkl"  # beside data.pkl, in archives of TorchScript only
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.split("/")[1:] == [MARK] for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the module.

    Raises pickle.UnpicklingError when the archive needs anything but modules, tensors and plain data.
    """
    with zipfile.ZipFile(path) as archive:
        folder = archive.namelist()[0].split("/")[0]
        root = _Unpickler(io.BytesIO(archive.read(f"{folder}/data.pkl")), archive, f"{folder}/data/").load()
    return dict(_tensors(root, ""))


class _Module:
    """A module of the archive, whose class is code that is left alone: only its attributes are taken."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        for key, part in value.attributes.items():
            yield from _tensors(part, f"{name}.{key}" if name else key)


class _Unpickler(pickle.Unpickler):
    """Knows modules, tensors and lists; every other name in the file is refused."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild, ("collections", "OrderedDict"): OrderedDict,
        }  # fmt: skip
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _same
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        data = self.archive.read(f"{self.folder}{key}")
        return torch.frombuffer(bytearray(data), dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset).clone()


def _same(value: Any, *_: Any) -> Any:
    return value
