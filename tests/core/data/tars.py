"""Tars as other tools write them, for the data tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence


def tar(*members: tuple[str, bytes | str] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files (name, content) and of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                content = member[1].encode() if isinstance(member[1], str) else member[1]
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def labelled(images: Sequence[bytes], first: int = 0) -> bytes:
    """Samples with the labels 0, 1, 2, 0, ..."""
    members: list[tuple[str, bytes | str]] = []
    for i, image in enumerate(images, first):
        members += [(f"set/{i:04d}.cls", str(i % 3)), (f"set/{i:04d}.jpg", image)]
    return tar(*members)
