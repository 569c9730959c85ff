"""How a process talks to an S3 server: its client, made per process, and what each of the client's errors means.

Endpoint, credentials and region come from the usual AWS variables and config files; of these, messages quote the host.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

from core.storage import AccessDenied, ExpiredCredentials, MissingObject, StoreError

EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "TokenRetrievalError",
           "UnauthorizedSSOTokenError", "SSOTokenLoadError", "RuntimeError"}  # fmt: skip
DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "InvalidToken", "403",
          "SignatureDoesNotMatch", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound",
          "CredentialRetrievalError"}  # fmt: skip
HINTS = {
    "NoSuchBucket": "this bucket does not exist there: create it or correct the URI",
    "NotImplemented": "the server lacks what is asked of it, and no new try mends that: use another one",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
}


@dataclass(frozen=True)
class S3Options:
    """How patiently and in which portions a bucket is talked to."""

    attempts: int = 6
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0
    part_bytes: int = 16 << 20  # larger files go up in parts of this size
    range_bytes: int = 8 << 20  # larger files come down in ranges of this size
    threads: int = 4  # of one file that goes up or comes down
    page: int = 1000  # keys per listing request


_connecting: dict[int, threading.Lock] = {}  # by process: a fork may happen while the parent's is held


class Link:
    """The S3 client of the running process: made at first use and again after a fork, unpickling or `reset`."""

    def __init__(self, options: S3Options) -> None:
        self.options = options
        self._owned: tuple[int, Any] | None = None

    def client(self) -> Any:
        owned, pid = self._owned, os.getpid()
        if owned is None or owned[0] != pid:
            with _connecting.setdefault(pid, threading.Lock()):  # each takes a fifth of a second of the processor
                owned = self._owned
                if owned is None or owned[0] != pid:
                    owned = self._owned = (pid, _connect(self.options))
        return owned[1]

    def host(self) -> str:
        if self._owned is None:
            return "the S3 endpoint"
        return str(urlsplit(self._owned[1].meta.endpoint_url).netloc.rpartition("@")[2])

    def reset(self) -> None:
        self._owned = None

    def __reduce__(self) -> tuple[type[Link], tuple[S3Options]]:
        return Link, (self.options,)


def _connect(options: S3Options) -> Any:
    session = botocore.session.Session()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": options.attempts},
        connect_timeout=options.connect_timeout_s,
        read_timeout=options.read_timeout_s,
        tcp_keepalive=True,
        max_pool_connections=32,
        request_checksum_calculation="when_required",  # servers older than trailing checksums refuse them
        response_checksum_validation="when_required",
    )
    try:
        return session.create_client("s3", config=config)
    except ValueError:  # its text quotes the whole URL
        raise StoreError("AWS_ENDPOINT_URL is no URL of the form https://HOST:PORT: correct it") from None


def explained(error: Exception, where: str, host: str, attempts: int) -> StoreError:
    code = code_of(error)
    if code in ("NoSuchKey", "404"):
        return MissingObject(f"{where} does not exist at {host}")
    if code in EXPIRED:
        return ExpiredCredentials(f"{where}: the credentials for {host} have expired ({code}): provide new ones")
    if code in DENIED:
        return AccessDenied(
            f"{where}: {host} gives no access ({code}): check the AWS_* variables or profile and the rights to get, "
            "put, list and delete in this bucket (without the right to list, servers say the same of an absent object)"
        )
    if isinstance(error, HTTPClientError | ConnectionError):
        return StoreError(
            f"{where}: no answer from {host} in {attempts} attempts ({code}): check that the server runs, "
            "AWS_ENDPOINT_URL, name resolution, the proxy variables and, over https, AWS_CA_BUNDLE"
        )
    status = status_of(error)
    patience = f" after {attempts} attempts: try again later" if status >= 500 or status == 429 else ""
    known = "NotImplemented" if status == 501 else code
    hint = HINTS.get(known, f"the request failed{patience or ': check URI and server'}")
    return StoreError(f"{where}: {host} answers {code}{f' (HTTP {status})' if status else ''}: {hint}")


def code_of(error: Exception) -> str:
    return str(error.response["Error"]["Code"]) if isinstance(error, ClientError) else type(error).__name__


def status_of(error: Exception) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"]) if isinstance(error, ClientError) else 0
