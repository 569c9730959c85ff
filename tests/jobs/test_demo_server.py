"""The demo's S3 server: nobody but who has its credentials gets anything from it."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Iterator
from urllib.error import HTTPError

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from core.storage import open_store
from jobs.demo_server import serving


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, dict[str, str]]]:
    """Its endpoint, and the environment of those who may use it."""
    before = dict(os.environ)
    with serving("demo") as endpoint:
        own = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        yield endpoint, own
    os.environ.clear()
    os.environ.update(before)


def test_a_store_works_with_its_credentials(
    server: tuple[str, dict[str, str]], aws_env: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name, value in server[1].items():
        aws_env.setenv(name, value)
    store, large = open_store("s3://demo/a store"), tmp_path_factory.mktemp("large") / "file"
    for key in ("x", "100% sure?.jpg", "a b+c&d=e", "r\u00e9torte/\u84b8\u7559"):
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
        assert [entry.key for entry in store.list(key)] == [key]
    assert store.get_range("x", 0, 1) == b"x"
    assert not store.put_if_absent("x", b"y")
    large.write_bytes(bytes(20 << 20))
    store.put_file("large", large)
    assert store.size("large") == 20 << 20
    assert open_store("s3://demo").now() > 0
    store.delete("x")
    assert store.size("x") is None


@pytest.mark.parametrize("kind", ["unsigned", "another key", "another secret"])
def test_strangers_get_nothing(kind: str, server: tuple[str, dict[str, str]]) -> None:
    endpoint, own = server
    key = "another" if kind == "another key" else own["AWS_ACCESS_KEY_ID"]
    secret = "another" if kind == "another secret" else own["AWS_SECRET_ACCESS_KEY"]
    config = Config(signature_version=UNSIGNED) if kind == "unsigned" else None
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config,
                          aws_access_key_id=key, aws_secret_access_key=secret)  # fmt: skip
    for action in (
        lambda: client.list_objects_v2(Bucket="demo"),
        lambda: client.put_object(Bucket="demo", Key="x", Body=b""),
        lambda: client.delete_bucket(Bucket="demo"),
    ):
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            action()


@pytest.mark.parametrize("path", ["/demo", "/moto-api/reset", "/moto-api/data.json"])
def test_what_else_it_could_be_asked_is_refused(path: str, server: tuple[str, dict[str, str]]) -> None:
    for method in ("GET", "POST"):
        with pytest.raises(HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(f"{server[0]}{path}", method=method))


def test_it_listens_on_loopback(server: tuple[str, dict[str, str]]) -> None:
    assert server[0].startswith("http://127.0.0.1:")
