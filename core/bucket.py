"""The bucket side of `core.storage`: any S3-compatible server through botocore.

Relies on what all such servers have: whole and ranged GET, PUT with `If-None-Match: *`, multipart upload, listing by
version 2 and single DELETE; on no server-side checksum and no other condition. `open_store` imports it on demand.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from functools import partial, reduce
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError, ResponseStreamingError
from s3transfer.manager import TransferConfig, TransferManager

from core.bucket_client import EXPIRED, Link, S3Options, code_of, explained, status_of
from core.crc import joined
from core.storage import PIECE, Entry, MissingObject, Store, StoreError, check_key, check_prefix, check_range, crc32c
from core.threads import in_threads

T = TypeVar("T")
# Worth a new try though botocore gives up: a body that broke off, a race without a verdict, an upload completed twice.
AGAIN = {"ResponseStreamingError", "IncompleteReadError", "ConditionalRequestConflict", "OperationAborted",
         "NoSuchUpload"}  # fmt: skip
PAUSE_S = 0.5  # before the first new try; doubled for each further one


class _Part(NamedTuple):
    data: bytes
    total: int  # bytes of the whole object
    etag: str


class _Span(NamedTuple):
    """A part of an object that has been written to a file."""

    size: int  # bytes
    crc32c: int
    total: int  # bytes of the whole object
    etag: str


class S3Store(Store):
    """Objects below a prefix of a bucket."""

    def __init__(self, uri: str, options: S3Options = S3Options()) -> None:  # noqa: B008 (frozen)
        self.bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
        self.prefix = prefix and check_key(prefix, "prefix") + "/"
        self.uri = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self.options = options
        self._link = Link(options)

    def put(self, key: str, data: bytes) -> None:
        target = self._target(key)
        self._run(key, lambda client: client.put_object(**target, Body=data))

    def put_file(self, key: str, path: Path) -> None:
        name, part, threads = self._target(key)["Key"], self.options.part_bytes, self.options.threads
        config = TransferConfig(multipart_threshold=part, multipart_chunksize=part, max_request_concurrency=threads)

        def upload(client: Any) -> None:
            with TransferManager(client, config) as manager:
                manager.upload(str(path), self.bucket, name).result()

        self._run(key, upload)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._target(key)
        writer = {"writer": uuid.uuid4().hex}  # tells a repeated request of this call from anybody else's

        def create(client: Any) -> bool:
            try:
                client.put_object(**target, Body=data, IfNoneMatch="*", Metadata=writer)
            except ClientError as error:
                if code_of(error) != "PreconditionFailed":
                    raise
                return _metadata(client, target) == writer
            return True

        return self._run(key, create)

    def get(self, key: str) -> bytes:
        return self._fetch(key).data

    def get_range(self, key: str, start: int, size: int) -> bytes:
        check_range(start, size)
        return self._fetch(key, start, max(size, 1)).data[:size]

    def load(self, key: str, file: BinaryIO, expected: int = 0) -> tuple[int, int]:
        """By ranges, several at once over connections that stay open; each is tried again by itself."""
        part, threads, save = self.options.range_bytes, self.options.threads, partial(self._save, key, file)
        for _ in range(self.options.attempts):
            spans = in_threads(save, range(0, max(expected, 1), part), threads)
            first = spans[0]
            spans += in_threads(save, range(sum(span.size for span in spans), first.total, part), threads)
            spans = [first, *(span for span in spans[1:] if span.size)]
            if {span.etag for span in spans} == {first.etag} and sum(span.size for span in spans) == first.total:
                return first.total, reduce(_joined, spans).crc32c
            file.truncate(0)
        raise StoreError(f"{self.uri}/{key} changed each time while it was read: stop its writer, then read again")

    def size(self, key: str) -> int | None:
        try:
            return self._fetch(key, 0, 1).total  # unlike HEAD's, the answer says what is wrong: key, bucket or rights
        except MissingObject:
            return None

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix + check_prefix(prefix)}
        query |= {"MaxKeys": self.options.page} | ({"StartAfter": self.prefix + after} if after else {})
        while True:
            page = self._run(prefix, lambda client: client.list_objects_v2(**query))
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # the folder mark of some console
                    yield Entry(item["Key"][len(self.prefix) :], item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, *keys: str) -> None:
        targets = [self._target(key) for key in keys]

        def remove(key: str, target: dict[str, str]) -> None:
            self._run(key, lambda client: client.delete_object(**target))

        with ThreadPoolExecutor(self.options.threads) as pool:
            list(pool.map(remove, keys, targets))

    def abandoned(self, older_s: float, own: Callable[[str], bool], remove: bool) -> int:
        query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix}
        found, before = [], self.now() - older_s
        while True:
            page = self._run("", partial(_uploads, dict(query)))
            old = [upload for upload in page.get("Uploads", ()) if upload["Initiated"].timestamp() <= before]
            found += [upload for upload in old if own(upload["Key"][len(self.prefix) :])]
            if not page.get("IsTruncated"):
                break
            query |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for upload in found if remove else ():
            target = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._run(upload["Key"], partial(_abort, target))
        return len(found)

    def now(self) -> float:
        query = {"Bucket": self.bucket, "Prefix": self.prefix, "MaxKeys": 1}
        answer = self._run("", lambda client: client.list_objects_v2(**query))
        try:
            return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        except (KeyError, ValueError):
            host = self._link.host()
            raise StoreError(f"{self.uri}: {host} does not say what time it is: the age of nothing is known") from None

    def sub(self, prefix: str) -> S3Store:
        store = S3Store(f"{self.uri}/{check_key(prefix.rstrip('/'), 'prefix')}", self.options)
        store._link = self._link
        return store

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _fetch(self, key: str, start: int = 0, size: int | None = None) -> _Part:
        query = self._target(key) | ({} if size is None else {"Range": f"bytes={start}-{start + size - 1}"})

        def fetch(client: Any) -> _Part:
            if (answer := _answer(client, query)) is None:
                return _Part(b"", 0, "")
            data, span = _body(answer), answer.get("ContentRange")
            total = int(span.rpartition("/")[2]) if span else len(data)
            return _Part(data if span or size is None else data[start : start + size], total, answer["ETag"])

        return self._run(key, fetch)

    def _save(self, key: str, file: BinaryIO, start: int) -> _Span:
        """Write the range that begins at `start` to its place in a file."""
        query = self._target(key) | {"Range": f"bytes={start}-{start + self.options.range_bytes - 1}"}

        def save(client: Any) -> _Span:
            if (answer := _answer(client, query)) is None:
                return _Span(0, 0, 0, "")
            span, end, crc = answer.get("ContentRange"), start, 0
            for data in _pieces(answer):
                _write_at(file, end, data)
                end, crc = end + len(data), crc32c(data, crc)
            return _Span(end - start, crc, int(span.rpartition("/")[2]) if span else end, answer["ETag"])

        return self._run(key, save)

    def _run(self, key: str, action: Callable[[Any], T]) -> T:
        """`action` with this process's client; what botocore has not ridden out becomes one of the store's errors."""
        error: Exception
        renewed = False
        for attempt in range(self.options.attempts):
            try:
                return action(self._link.client())
            except (BotoCoreError, ClientError) as caught:
                error = caught
            except RuntimeError as caught:  # how botocore says that refreshed credentials are old ones
                if "still expired" not in str(caught):
                    raise
                error = caught
            if code_of(error) in EXPIRED and not renewed:
                renewed = True
                self._link.reset()  # a credentials file renewed by somebody is read again
            elif code_of(error) in AGAIN:
                time.sleep(random.uniform(0, PAUSE_S * 2**attempt))
            else:
                break
        # Raised outside the handler: botocore's own errors, which may quote a request, do not hang on ours.
        raise explained(error, f"{self.uri}/{key}", self._link.host(), self.options.attempts)


def _answer(client: Any, query: dict[str, str]) -> dict[str, Any] | None:
    """Of a get; None for a range that starts behind the object's end."""
    try:
        return cast(dict[str, Any], client.get_object(**query))
    except ClientError as error:
        if code_of(error) != "InvalidRange":
            raise
        return None


def _uploads(query: dict[str, Any], client: Any) -> Any:
    return client.list_multipart_uploads(**query)


def _abort(target: dict[str, str], client: Any) -> None:
    client.abort_multipart_upload(**target)


def _metadata(client: Any, target: dict[str, str]) -> dict[str, str]:
    try:
        return dict(client.head_object(**target)["Metadata"])
    except ClientError as error:
        if status_of(error) != 404:
            raise
        return {}


def _body(answer: dict[str, Any]) -> bytes:
    try:
        return bytes(answer["Body"].read())
    except ReadTimeoutError as error:  # told apart from a request that botocore has repeated already
        raise ResponseStreamingError(error=error) from error


def _pieces(answer: dict[str, Any]) -> Iterator[bytes]:
    try:
        while data := answer["Body"].read(PIECE):
            yield data
    except ReadTimeoutError as error:
        raise ResponseStreamingError(error=error) from error


def _joined(first: _Span, second: _Span) -> _Span:
    crc = joined(first.crc32c, second.crc32c, second.size)
    return first._replace(size=first.size + second.size, crc32c=crc)


def _write_at(file: BinaryIO, start: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, start)
        view, start = view[written:], start + written
