"""What a weight file is, told from its bytes and not from its name, and what is refused before it is unpacked."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import IO, Any, cast

from core.models.layouts.keys import WeightsError

HEAD = 512  # bytes that tell what a file is
MOST_HEADER = 100_000_000  # bytes of a safetensors header, as its own library has it
MOST_PICKLE = 64 << 20  # bytes of the pickle of a torch archive, beside which the tensors lie
LEGACY_PICKLES = 5  # at the start of what torch.save wrote before it wrote zip archives
LEGACY = re.compile(rb"\x80.(\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", re.DOTALL)  # torch's mark, as a pickle
Operations = Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]
UNREAD = ("code/", "extra/")  # parts of TorchScript that nothing here reads
LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/.*?^size (\d+)$", re.DOTALL | re.MULTILINE)
OTHERS = (
    (rb"\s*(?i:<!doctype html|<html|<\?xml)", "a web page, perhaps one that asks for a login: download the file anew"),
    (rb"\x08[\x01-\x14][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX model: export the network's state dict instead"),
    (rb"\x93NUMPY", "a NumPy array: save a state dict of tensors instead"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them: convert it to PyTorch's names and tensors first"),
    (rb"GGUF", "a GGUF file: take the weights that it was made from"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed file: unpack it first"),
    (rb".{257}ustar", "a tar archive: unpack it first"),
    (rb"\s*[{\[]", "a JSON file; of weights in several files, name the index: model.safetensors.index.json"),
)


def is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= MOST_HEADER


def is_legacy(head: bytes) -> bool:
    """Whether torch.save wrote it before it wrote zip archives."""
    return LEGACY.match(head) is not None


def refuse(head: bytes, where: str) -> None:
    """Raises WeightsError, saying what it is, for a file of another known kind."""
    if pointer := LFS.match(head):
        raise WeightsError(
            f"{where}: a Git LFS pointer to a file of {int(pointer[1]):,} bytes, not that file itself: run `git lfs "
            "pull` in its repository, or download the file, and put it in this place"
        )
    for pattern, what in OTHERS:
        if re.match(pattern, head, re.DOTALL):
            raise WeightsError(f"{where}: no weight file but {what}")
    if head.startswith(b"\x80") and not is_legacy(head):
        raise WeightsError(
            f"{where}: a plain pickle (protocol {head[1:2].hex().lstrip('0')}), and these may run anything: save the "
            "tensors with torch.save or safetensors.torch.save_file"
        )


def check_archive(archive: zipfile.ZipFile, size: int, where: str) -> str:
    """Name of the pickle in an archive of torch.  Raises WeightsError for others, and for one that would unpack to more
    than the file's bytes."""
    records = [record for record in archive.infolist() if not _inside(record).startswith(UNREAD)]
    pickles = [record for record in records if _inside(record) == "data.pkl"]
    if not pickles:
        numpy = any(record.filename.endswith(".npy") for record in records)
        what = "a NumPy archive (.npz)" if numpy else "a zip archive that torch.save did not write"
        raise WeightsError(f"{where}: no weight file but {what}: save a state dict of tensors instead")
    packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if packed or sum(record.file_size for record in records) > size:
        raise WeightsError(f"{where}: its parts are compressed or lie over each other, which torch.save never does")
    if pickles[0].file_size > MOST_PICKLE:
        raise WeightsError(
            f"{where}: {pickles[0].file_size:,} bytes of pickled objects beside its tensors, of which at most "
            f"{MOST_PICKLE:,} are read: save the state dict alone"
        )
    return pickles[0].filename


def _inside(record: zipfile.ZipInfo) -> str:
    """A record's name below the archive's one folder."""
    return record.filename.partition("/")[2]


def check_pickle(file: IO[bytes], where: str) -> int:
    """The protocol of the pickle that begins here, whose end the file is left at.

    Raises WeightsError where a few bytes of it would fill the memory, and ValueError for what is no pickle.
    """
    protocol = 0
    for count, (code, argument, _) in enumerate(cast("Operations", pickletools.genops(file))):
        if code.name == "PROTO":
            protocol = argument
        far = code.name.endswith("PUT") and argument > count + 0xFF  # a memo is a list as long as its last place
        if far or code.name == "GLOBAL" and "bytearray" in argument:
            raise WeightsError(f"{where}: its pickle is not one that torch.save writes")
    return protocol
