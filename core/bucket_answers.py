"""What the answers of an S3 server must hold. A server that leaves it out is unfit, which is said with what to do."""

from __future__ import annotations

import re
from typing import Any

from botocore.exceptions import ClientError

from core.bucket_client import code_of, status_of
from core.storage import UnfitStore

LACKS = {
    "condition": "does not know conditional puts (If-None-Match), by which of two writers one wins",
    "etag": "answers without ETag, by which the parts of a large object are known to belong together",
    "range": "ignores Range: asked for a part of an object it sends another, or the whole",
    "token": "cuts a listing off without saying where it goes on (IsTruncated without a new continuation token)",
    "entry": "lists objects without their key, size or time",
}
HOW = ("this is how that server works, and no new try mends it: use another server or a newer release of it, go to it "
       "without the proxy or cache between, or keep things in a shared folder (file:///...)")  # fmt: skip
SPAN = re.compile(r"bytes (\d+)-\d+/(\d+)")


def unfit(lack: str, where: str, host: str) -> UnfitStore:
    return UnfitStore(f"{where}: {host} {LACKS[lack]}: {HOW}")


def knows_no_conditions(error: ClientError) -> bool:
    """Whether a conditional put was refused for its condition."""
    return status_of(error) == 501 or code_of(error) in ("NotImplemented", "NotSupported", "UnsupportedOperation")


def total_of(answer: dict[str, Any], start: int) -> int | None:
    """Bytes of the whole object by the answer to a ranged get; None when it came whole, -1 when another part came."""
    if not (span := answer.get("ContentRange")):
        return None
    found = SPAN.fullmatch(span.strip())
    return int(found[2]) if found and int(found[1]) == start else -1


def following(page: dict[str, Any], names: dict[str, str], query: dict[str, Any]) -> dict[str, Any] | None:
    """The part of the next query that continues a listing, None at its end.  names: of the query by the answer's.

    Raises KeyError when the answer holds none, or the same again: the listing would have no end.
    """
    if not page.get("IsTruncated"):
        return None
    found = {ours: page[theirs] for theirs, ours in names.items()}
    if all(query.get(name) == value for name, value in found.items()):
        raise KeyError(*names)
    return found
