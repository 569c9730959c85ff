"""What files are told to be, outlines beside whole files, and what would take more memory than it has bytes."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.data.ranged_file import RangedFile
from core.folder import FileStore
from core.models import files
from core.models.weights import WeightsError, read, to_timm

torch.set_num_threads(1)

State = dict[str, Tensor]
STATE: State = {"a.weight": torch.randn(3, 4), "a.bias": torch.ones(3, dtype=torch.float16), "b": torch.tensor(7)}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 346000000\n"


class Counted(FileStore):
    """A store that knows how many bytes it was asked for."""

    taken = 0

    def get_range(self, key: str, start: int, size: int) -> bytes:
        data = super().get_range(key, start, size)
        self.taken += len(data)
        return data


def outline(path: Path) -> tuple[dict[str, Any], int]:
    """What is in a file, and how many bytes of it were read."""
    store, size = Counted(path.parent), path.stat().st_size
    return files.outline(cast(BinaryIO, RangedFile(store, path.name, size)), size, "there"), store.taken


WRITTEN: dict[str, Callable[[State, Path], None]] = {
    "w.pth": torch.save,
    "w.safetensors": save_file,
    "safetensors.bin": save_file,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_told_by_their_bytes_and_an_outline_has_the_names_and_shapes(name: str, tmp_path: Path) -> None:
    WRITTEN[name](STATE, tmp_path / name)
    whole, (shapes, _) = read(tmp_path / name), outline(tmp_path / name)
    assert all(torch.equal(whole[key], value) for key, value in STATE.items())
    assert {k: v.shape for k, v in to_timm(shapes).items()} == {k: v.shape for k, v in STATE.items()}


@pytest.mark.parametrize("name", WRITTEN)
def test_an_outline_reads_a_small_part_of_a_file(name: str, tmp_path: Path) -> None:
    WRITTEN[name]({f"blocks.{i}": torch.zeros(500_000) for i in range(8)}, tmp_path / name)
    shapes, taken = outline(tmp_path / name)
    assert shapes["blocks.7"].shape == (500_000,)
    assert taken < 100_000 < (tmp_path / name).stat().st_size


def onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x20" + bytes(40))


def legacy_5(path: Path) -> None:
    torch.save(STATE, path, pickle_protocol=5, _use_new_zipfile_serialization=False)


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (lambda path: path.write_text(POINTER), "a Git LFS pointer to a file of 346,000,000 bytes, not that"),
    "page": (lambda path: path.write_text("\n<!DOCTYPE html><title>Sign in</title>"), "a web page, perhaps one that"),
    "onnx": (onnx, "an ONNX model"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(3)), r"a NumPy archive \(.npz\)"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(3)), "a NumPy array"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(40)), "an HDF5 file"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(40)), "a compressed file: unpack it"),
    "json": (lambda path: path.write_text('{"weight_map": {}}'), "a JSON file; of weights in several files, name"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": np.ones(3)})), r"a plain pickle \(protocol 4\)"),
    "protocol 5": (lambda path: torch.save(STATE, path, pickle_protocol=5), "saved with pickle protocol 5, of which"),
    "legacy protocol 5": (legacy_5, "saved with pickle protocol 5, of which"),
    "zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a/readme", "x"), "a zip archive that torch.save did"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_whole_file_of_another_kind_is_called_what_it_is_and_not_damaged(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    write, said = OTHERS[kind]
    path = tmp_path / f"w{suffix}"
    write(path)
    for attempt in (lambda: read(path, "s3://bucket/w"), lambda: outline(path)):
        with pytest.raises(WeightsError, match=said) as caught:
            attempt()
        assert "damaged" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_paths_among_the_arguments_are_plain_data(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": {"output": Path("/out")}}, tmp_path / "w.pth")
    assert to_timm(read(tmp_path / "w.pth")).keys() == STATE.keys()


def test_an_index_names_its_files_and_no_key_is_in_two_of_them() -> None:
    index = json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}).encode()
    assert files.shards(index, "index") == ["1.safetensors", "2.safetensors"]
    for wrong in (b"{}", b"[]", b"no json", b'{"weight_map": 3}', b"[" * 100_000):
        with pytest.raises(WeightsError, match="index: no index of weights in several files"):
            files.shards(wrong, "index")
    with pytest.raises(WeightsError, match="index: a is in y and in another file"):
        files.join({"x": STATE | {"a": 1}, "y": {"a": 2}}, "index")


# ---- memory

START, TORCHSCRIPT = b"\x80\x02", {"a/constants.pkl": b""}


def archive(path: Path, pickled: bytes, how: int = zipfile.ZIP_STORED, **records: bytes) -> None:
    with zipfile.ZipFile(path, "w", how) as written:
        for name, data in {"a/data.pkl": pickled, "a/version": b"3\n", **records}.items():
            written.writestr(name, data)


def tensor(stored: int, size: int, stride: int) -> bytes:
    """A pickled module `__torch__.M` with one tensor, as TorchScript writes it."""
    numbers = [b"\x8a\x08" + struct.pack("<q", value) for value in (stored, size, stride)]
    storage = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + numbers[0] + b"tQK\0"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + numbers[1] + b"\x85" + numbers[2] + b"\x85"
    return b"}X\x01\0\0\0w" + rebuilt + b"\x89ccollections\nOrderedDict\n)RtRs"


def module(attributes: bytes) -> bytes:
    return START + b"c__torch__\nM\n)\x81" + attributes + b"b."


def doubled() -> bytes:
    """A module that holds another one twice, which holds another one twice, forty times."""
    body = START + b"c__torch__\nM\nq\x00)\x81q\x01"
    for i in range(1, 41):
        body += b"h\0)\x81}(X\x01\0\0\0ah%cX\x01\0\0\0bh%cubq%c" % (i, i, i + 1)
    return body + b"."


MEMO = START + b"}r" + struct.pack("<I", 1 << 29) + b"."  # takes 8.6 GB for a table of what the pickle holds
HUGE = 2_150_000_000
BOMBS: dict[str, Callable[[Path], None]] = {
    "memo of TorchScript": lambda path: archive(path, MEMO, **TORCHSCRIPT),
    "memo": lambda path: archive(path, MEMO),
    "one number shown often": lambda path: archive(
        path, module(tensor(1, HUGE, 0)), **TORCHSCRIPT, **{"a/data/0": bytes(4)}
    ),
    "compressed": lambda path: archive(
        path, module(tensor(10**6, 10**6, 1)), zipfile.ZIP_DEFLATED, **TORCHSCRIPT, **{"a/data/0": bytes(4 * 10**6)}
    ),
    "modules in modules": lambda path: archive(path, doubled(), **TORCHSCRIPT),
    "compressed beside": lambda path: archive(path, START + b"}.", zipfile.ZIP_DEFLATED, **{"a/order": bytes(10**7)}),
    "bytes on demand": lambda path: archive(
        path, START + b"}X\x01\0\0\0wc__builtin__\nbytearray\n\x8a\x05" + struct.pack("<q", 4 * HUGE)[:5] + b"\x85Rs."
    ),
    "expanded": lambda path: torch.save({"w": torch.zeros(1).expand(HUGE)}, path),
    "in itself": lambda path: torch.save(in_itself(), path),
}  # fmt: skip


def in_itself() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["model"] = state["state_dict"] = state
    return state


@pytest.mark.parametrize("kind", BOMBS)
def test_what_would_fill_the_memory_is_refused_before_it_does(kind: str, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "w.pt"
    BOMBS[kind](path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for attempt in (lambda: to_timm(read(path)), lambda: to_timm(outline(path)[0])):
        with pytest.raises(WeightsError):
            attempt()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
