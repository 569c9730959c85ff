"""An S3 server in this process, for `make demo`: on loopback, for requests that its own credentials have signed.

Whoever else uses the machine can reach the port; the server itself would do what anybody asks.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[..., Any]  # WSGI's start_response
SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,]+)/\d{8}/([^/,]+)/s3/aws4_request, ?SignedHeaders=([^,]+), ?"
                    r"Signature=([0-9a-f]{64})")  # fmt: skip


class Guarded:
    """A WSGI application that passes on what is signed with the credentials."""

    def __init__(self, application: Any, credentials: Any) -> None:
        self._application, self._credentials = application, credentials

    def __call__(self, environ: dict[str, Any], answer: Answer) -> Iterable[bytes]:
        if self._is_signed(environ):
            passed: Iterable[bytes] = self._application(environ, answer)
            return passed
        answer("403 Forbidden", [("Content-Type", "application/xml"), ("Connection", "close")])
        return [b"<Error><Code>SignatureDoesNotMatch</Code><Message>Not signed with its credentials.</Message></Error>"]

    def _is_signed(self, environ: dict[str, Any]) -> bool:
        """Whether signing the same request gives the same signature (AWS Signature Version 4)."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from werkzeug.datastructures import EnvironHeaders

        headers = EnvironHeaders(environ)
        found = SIGNED.fullmatch(headers.get("Authorization", ""))
        if not found or "x-amz-content-sha256" not in (names := found[3].split(";")) or "host" not in names:
            return False
        request = AWSRequest(environ["REQUEST_METHOD"], f"http://{headers.get('Host', '')}{environ['RAW_URI']}",
                             headers={name: headers.get(name, "") for name in names})  # fmt: skip
        request.context["timestamp"] = headers.get("X-Amz-Date", "")
        signer = S3SigV4Auth(self._credentials, "s3", found[2])
        text = signer.string_to_sign(request, signer.canonical_request(request))
        right = hmac.compare_digest(signer.signature(text, request), found[4])
        return right and hmac.compare_digest(found[1], self._credentials.access_key)


@contextmanager
def serving(bucket: str) -> Iterator[str]:
    """The server with an empty bucket, its credentials in the environment; yields its endpoint."""
    import boto3
    from botocore.credentials import Credentials
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    credentials = Credentials(secrets.token_hex(10), secrets.token_hex(20))
    application = Guarded(DomainDispatcherApplication(create_backend_app), credentials)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(name, None)
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key,
    }  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        boto3.Session(credentials.access_key, credentials.secret_key).client("s3").create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
