"""What lies in a tar of webdataset's kind, from its headers: members of one name up to the first dot are a sample.

The image is the first member with an image's suffix, one with nothing before the suffix (KEY.jpg, not KEY.seg.png) if
there is; the label is that of KEY.cls (digits), else `label`, `cls` or `class` of KEY.json; the text is KEY.txt, else
KEY.json if it has captions.  Nothing is unpacked and no image is decoded; large ones are not read either.  Tars that
were joined are read one behind the other.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from core import small_json
from core.data.ranged_file import RangedFile
from core.data.source import SUFFIXES, DataError
from core.storage import Store, crc32c

BLOCK = 512
_MOST_TEXT = 1 << 20  # bytes of a label or a text
_MOST_LABEL = (1 << 31) - 1
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # webdataset's split into key and suffix
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
               tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_TEXTS = ("captions", "caption", "tags")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. header: CRC32C of the block before its bytes, which holds its name, size and time."""

    key: str
    suffix: str
    offset: int
    size: int
    header: int
    small: bytes | None  # the content of a label or text


@dataclass(frozen=True)
class Found:
    """A sample. label: None without one."""

    key: str
    image: Member
    label: int | str | None
    text: Member | None


@dataclass
class Scan:
    samples: list[Found] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name, reason


class _Header(tarfile.TarInfo):
    """A member's header, of which tarfile would read extensions of any length into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:
        if self.type in _EXTENSIONS and self.size > _MOST_TEXT:
            raise tarfile.ReadError(f"a header of {self.size} bytes, where {_MOST_TEXT} are read at most")
        return super()._proc_member(tar)  # type: ignore[misc]  # tarfile's own place for this, without a stub


class _Unusable(Exception):  # noqa: N818 (says what the sample is)
    """A sample that cannot be taken; says why."""


def scan_tar(store: Store, key: str, size: int) -> Scan:
    """The samples of one tar of `size` bytes.  Raises DataError when it is cut short or no tar."""
    where = f"{store.uri}/{key}"
    scan = Scan()
    file = RangedFile(store, key, size)
    start: int | None = 0
    try:
        while start is not None:
            file.seek(start)
            options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "tarinfo": _Header}
            with tarfile.open(fileobj=file, mode="r:", **options) as tar:
                members = _members(tar, file, size, scan)
                for name, group in groupby(members, lambda member: member.key):
                    _take(name, list(group), scan)
                start = _next_content(file, tar.offset, size)
    except tarfile.TarError as error:
        if kind := _compression(file.at(0, BLOCK)):
            raise DataError(f"{where}: compressed by {kind} in spite of its name; uncompress it") from None
        behind = f"; what lies behind the tar's end, at byte {start}, is no further tar" if start else ""
        raise DataError(f"{where}: {error}{behind}: no whole tar; bring it again, or remove it") from None
    return scan


def _next_content(file: RangedFile, place: int, size: int) -> int | None:
    """Where the first block from `place` on lies that holds more than zeros, which fill a tar up; None without one."""
    while place < size:
        piece = file.at(place, BLOCK)
        if piece.strip(b"\0"):
            return place
        place += BLOCK
    return None


def _compression(head: bytes) -> str:
    return next((name for start, name in _MAGIC.items() if head.startswith(start)), "")


def _members(tar: tarfile.TarFile, file: RangedFile, size: int, scan: Scan) -> Iterator[Member]:
    while info := tar.next():
        tar.members.clear()  # type: ignore[attr-defined]  # or all of them stay in memory
        if info.isdir():
            continue
        named = _NAME.fullmatch(info.name)
        reason = _refused(info) or ("" if named else "no name with a suffix")
        if reason or named is None:
            scan.skipped.append((info.name, reason))
            continue
        if info.offset_data + info.size > size:
            raise tarfile.ReadError(f"cut short in {info.name!r}")
        header = crc32c(file.at(info.offset_data - BLOCK, BLOCK))
        suffix = named[2].lower()
        small = suffix in ("cls", "txt", "json") and info.size <= _MOST_TEXT
        content = file.at(info.offset_data, info.size) if small else None
        yield Member(named[1], suffix, info.offset_data, info.size, header, content)
    end: int = tar.offset  # where tarfile stops, without a word at a damaged header
    if file.at(end, BLOCK).strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {end}")


def _refused(info: tarfile.TarInfo) -> str:
    """Why a member is never looked at; empty if it may be."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "name is absolute or has '..'"
    if info.islnk() or info.issym():
        return f"link to {info.linkname!r}"
    if info.issparse():
        return "sparse file"
    return "" if info.isreg() else "device or pipe"


def _take(key: str, group: list[Member], scan: Scan) -> None:
    """Adds the sample that the members of one key are, or the reason why they are none."""
    images = [member for member in group if f".{member.suffix.rpartition('.')[2]}" in SUFFIXES]
    images.sort(key=lambda member: "." in member.suffix)  # 1.seg.png says something of 1.jpg
    beside = {member.suffix: member for member in reversed(group) if member.suffix in ("cls", "txt", "json")}
    try:
        if not images:
            raise _Unusable(f"no image among {', '.join(member.suffix for member in group)}")
        described = _described(beside)
        label = _digits(beside["cls"]) if "cls" in beside else _label(described)
        text = beside.get("txt") or (beside["json"] if any(name in described for name in _TEXTS) else None)
    except _Unusable as reason:
        scan.skipped.append((key, str(reason)))
        return
    scan.samples.append(Found(key, images[0], label, text))
    scan.skipped += [(f"{key}.{image.suffix}", "another image of the same sample") for image in images[1:]]


def _digits(member: Member) -> int:
    text = _content(member).strip()
    if not re.fullmatch(rb"\d{1,10}", text) or int(text) > _MOST_LABEL:
        raise _Unusable(f"label {text[:20]!r} in .cls is not digits")
    return int(text)


def _described(beside: dict[str, Member]) -> dict[str, object]:
    """The content of .json, as far as it is needed."""
    if "json" not in beside or {"cls", "txt"} <= beside.keys():
        return {}
    try:
        return small_json.parse(_content(beside["json"]).decode(), dict, beside["json"].key)
    except ValueError as error:
        if "cls" in beside:
            return {}  # a text less
        deep = isinstance(error, small_json.Excessive)
        raise _Unusable(f".json is {error}" if deep else ".json is no JSON object in UTF-8") from None


def _label(described: dict[str, object]) -> int | str | None:
    value = next((described[name] for name in ("label", "cls", "class") if name in described), None)
    if value is None or isinstance(value, str):
        return value
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_LABEL:
        raise _Unusable(f"label {str(value)[:20]} in .json is neither a number of a class nor a name")
    return value


def _content(member: Member) -> bytes:
    if member.small is None:
        raise _Unusable(f".{member.suffix} of {member.size} bytes is too large")
    return member.small
