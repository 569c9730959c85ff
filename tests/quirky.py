"""A small S3 server in memory that lacks, by choice, what real ones that call themselves S3 have been seen to lack."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import parse_qs, unquote, urlsplit

NOW = datetime.now(UTC)


class QuirkyServer(http.server.ThreadingHTTPServer):
    """Bucket `bucket`; `seen` holds what came and how it was answered: "METHOD status"."""

    daemon_threads = True

    def __init__(self, quirks: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.quirks, self.objects, self.seen = quirks, dict[str, bytes](), list[str]()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is no news here."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: QuirkyServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.server.seen.append(f"{self.command} {status}")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def tag(self) -> dict[str, str]:
        quirks = self.server.quirks
        return {} if "no etag" in quirks else {"ETag": f'"{os.urandom(4).hex() if "new etag" in quirks else 1}"'}

    def do_GET(self) -> None:  # noqa: N802
        parts, objects, quirks = urlsplit(self.path), self.server.objects, self.server.quirks
        key, query = unquote(parts.path).removeprefix("/bucket").strip("/"), parse_qs(parts.query)
        if not key:
            return self.uploads() if "uploads" in parts.query else self.listing({k: v[0] for k, v in query.items()})
        if key not in objects:
            return self.refuse(404, "NoSuchKey")
        data, asked = objects[key], self.headers.get("Range")
        headers = {"Last_Modified": format_datetime(NOW, usegmt=True), **self.tag()}
        if not asked or "no range" in quirks:
            return self.answer(200, data, **headers)
        first, last = (int(word) for word in asked.removeprefix("bytes=").split("-"))
        first = 0 if "other range" in quirks else first
        if first >= len(data):
            return self.refuse(416, "InvalidRange")
        part = data[first : last + 1]
        span = f"bytes {first}-{first + len(part) - 1}/{'*' if 'no total' in quirks else len(data)}"
        return self.answer(206, part, Content_Range=span, **headers)

    do_HEAD = do_GET  # noqa: N815

    def listing(self, query: dict[str, str]) -> None:
        after, most, quirks = query.get("continuation-token", ""), int(query["max-keys"]), self.server.quirks
        after = "" if "same token" in quirks else after
        keys = [key for key in sorted(self.server.objects) if key.startswith(query.get("prefix", "")) and key > after]
        time = "" if "no time" in quirks else f"<LastModified>{NOW:%Y-%m-%dT%H:%M:%SZ}</LastModified>"
        items = "".join(f"<Contents><Key>{key}</Key><Size>1</Size>{time}</Contents>" for key in keys[:most])
        more = len(keys) > most
        token = f"<NextContinuationToken>{keys[most - 1]}</NextContinuationToken>" if more else ""
        token = "" if "no token" in quirks else token
        text = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}</ListBucketResult>"
        self.answer(200, text.encode(), Content_Type="application/xml")

    def uploads(self) -> None:
        text = "<ListMultipartUploadsResult><IsTruncated>true</IsTruncated></ListMultipartUploadsResult>"
        self.answer(200, text.encode(), Content_Type="application/xml")

    def do_PUT(self) -> None:  # noqa: N802
        key = unquote(urlsplit(self.path).path).removeprefix("/bucket/")
        data, quirks = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.server.quirks
        if "nothing" in quirks:
            return self.refuse(501, "NotImplemented")
        if self.headers.get("If-None-Match"):
            if "no conditions" in quirks or "no conditions, 400" in quirks:
                return self.refuse(501 if "no conditions" in quirks else 400, "NotImplemented")
            if key in self.server.objects and "ignores conditions" not in quirks:
                return self.refuse(412, "PreconditionFailed")
        self.server.objects[key] = data
        return self.answer(200, **self.tag())

    def do_POST(self) -> None:  # noqa: N802
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        text = "<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
        self.answer(200, text.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:  # noqa: N802
        self.server.objects.pop(unquote(urlsplit(self.path).path).removeprefix("/bucket/"), None)
        self.answer(204)


@contextmanager
def serving(*quirks: str) -> Iterator[tuple[QuirkyServer, str]]:
    """The server and its URL."""
    with QuirkyServer(quirks) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


Quirky = Callable[..., QuirkyServer]  # starts one for the rest of a test, with these quirks, as the environment's S3
