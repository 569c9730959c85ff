"""Tensors of a TorchScript archive, which is how OpenAI published CLIP, without running anything that it holds."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

MARK = "constants.pkl"  # beside data.pkl, in archives of TorchScript only
MOST_PARTS = 100_000  # modules, tensors and settings by all their names: a module may hold another one twice
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    return any(name.split("/")[1:] == [MARK] for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile, name: str, whole: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by their names in the module; not whole: their shapes alone.

    name: of the archive's pickle.  Raises pickle.UnpicklingError when it needs anything but modules, tensors and plain
    data.
    """
    folder = name.removesuffix(".pkl") if whole else ""
    root = _Unpickler(io.BytesIO(archive.read(name)), archive, folder).load()
    return _tensors(root)


class _Module:
    """A module of the archive, whose class is code that is left alone: only its attributes are taken."""

    attributes: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


def _tensors(root: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    todo, seen = [("", root)], 0
    while todo:
        name, value = todo.pop()
        seen += 1
        if seen > MOST_PARTS:
            raise pickle.UnpicklingError("more parts than a network has")
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, _Module):
            prefix = f"{name}." if name else ""
            todo += [(f"{prefix}{key}", part) for key, part in reversed(value.attributes.items())]
    return found


class _Unpickler(pickle.Unpickler):
    """Knows modules, tensors and lists; every other name in the file is refused.

    folder: of the numbers; without it, tensors have none.
    """

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self._numbers = cache(self._read)  # many tensors may lie in one record

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
        if not self.folder or not count:
            return torch.empty(count, dtype=dtype, device="cpu" if self.folder else "meta")
        return torch.frombuffer(self._numbers(str(key)), dtype=dtype, count=count)

    def _read(self, key: str) -> bytearray:
        return bytearray(self.archive.read(f"{self.folder}/{key}"))


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _same(value: Any, *_: Any) -> Any:
    return value
