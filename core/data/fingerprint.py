"""One short name for a lot of data: equal names, equal data, wherever the data lie."""

from __future__ import annotations

import hashlib


def fingerprint(kind: str, *parts: bytes | str | memoryview) -> str:
    """SHA-256 as 64 hexadecimal digits over a kind and its parts, of which each counts with its length."""
    digest = hashlib.sha256()
    for part in (kind, *parts):
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else memoryview(part).cast("B")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
