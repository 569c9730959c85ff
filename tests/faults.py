"""A proxy in front of a real S3 server that does to chosen requests what bad networks and busy servers do."""

from __future__ import annotations

import http.client
import socketserver
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """One request on its way through the proxy. A fault may look at it, forward it, answer it or break it off."""

    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {self.path}")
        self.server.authorizations.append(self.headers.get("Authorization", ""))
        for fault in list(self.server.faults):
            if fault(self):
                return
        self.answer(self.forward())

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815 (names of the standard library)

    def forward(self) -> Answer:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, self.body, dict(self.headers))
            got = upstream.getresponse()
            return Answer(got.status, got.getheaders(), got.read())
        finally:
            upstream.close()

    def answer(self, answer: Answer, cut_at: int | None = None) -> None:
        """Pass an answer on; with `cut_at`, close the connection after so many bytes of its body."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in answer.headers if name.lower() == "content-length"), len(answer.body))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(answer.body[:cut_at])
        if cut_at is not None:
            self.hang_up()

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>planted</Message></Error>".encode()
        self.answer(Answer(status, [("Content-Type", "application/xml")], body))

    def hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


Fault = Callable[[Exchange], object]  # deals with the request: forwards, answers or breaks it off


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to `upstream` (a URL), but for what is planned. `seen` lists what came: "METHOD /path?query"."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.upstream = urlsplit(upstream).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Callable[[Exchange], bool]] = []  # asked in turn, until one has dealt with it
        self.seen: list[str] = []
        self.authorizations: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has hung up is no news here."""

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without the name look-up of http.server

    def plan(self, fault: Fault, method: str, times: int = 1, after: int = 0, having: str = "") -> None:
        """Let `fault` have `times` requests of this method with `having` in the path, behind the first `after`."""
        count = iter(range(after + times))

        def planned(exchange: Exchange) -> bool:
            if exchange.command != method or having not in exchange.path or next(count, -1) < after:
                return False
            fault(exchange)
            return True

        self.faults.append(planned)


def lose_answer(exchange: Exchange) -> None:
    """The server does as asked, the client never hears of it."""
    exchange.forward()
    exchange.hang_up()


def lose_request(exchange: Exchange) -> None:
    exchange.hang_up()


def cut_body(exchange: Exchange) -> None:
    answer = exchange.forward()
    exchange.answer(answer, cut_at=len(answer.body) // 2)


def refusal(status: int, code: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.refuse(status, code)
