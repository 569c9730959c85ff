"""What a bucket's client makes of the faults of networks and servers, and of wrong settings."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from core.bucket import S3Store
from core.bucket_client import S3Options
from core.storage import AccessDenied, ExpiredCredentials, MissingObject, StoreError, crc32c
from tests.core.test_storage import each_operation, in_forks, keys, use_from_forks
from tests.faults import Exchange, FaultyProxy, cut_body, lose_answer, lose_request, refusal

QUICK = S3Options(attempts=3, connect_timeout_s=2.0, read_timeout_s=30.0)
MIB = 1 << 20


@pytest.fixture
def quick(bucket: str, no_waiting: None) -> S3Store:
    return S3Store(bucket, QUICK)


class BucketBehaviour:
    """What holds for every S3 server, seen through a proxy that plants faults."""

    def test_forked_processes_share_no_connection(self, proxy: FaultyProxy, quick: S3Store) -> None:
        ports: list[int] = []
        proxy.faults.append(lambda exchange: ports.append(exchange.client_address[1]) is not None)
        for _ in range(3):
            quick.put("x", b"1")
        in_forks(2, lambda number: quick.get("x"))
        assert len(set(ports[:3])) == 1  # kept open between requests
        assert len(set(ports)) == 3
        use_from_forks(quick)

    def test_a_busy_server_is_asked_again(self, proxy: FaultyProxy, quick: S3Store) -> None:
        for status, code in [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")]:
            proxy.faults.clear()
            proxy.plan(refusal(status, code), "PUT", times=2)
            proxy.plan(refusal(status, code), "GET", times=2)
            quick.put("x", code.encode())
            assert quick.get("x") == code.encode()

    @pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests")])
    def test_asking_again_has_an_end(self, proxy: FaultyProxy, quick: S3Store, status: int, code: str) -> None:
        proxy.plan(refusal(status, code), "GET", times=100)
        with pytest.raises(StoreError, match=f"{code}.*{status}.*3 attempts"):
            quick.get("x")
        assert len(proxy.seen) == 3

    def test_the_winner_learns_of_it_though_the_answer_was_lost(self, proxy: FaultyProxy, quick: S3Store) -> None:
        proxy.plan(lose_answer, "PUT")
        assert quick.put_if_absent("log/1", b"mine") is True
        assert [line.split()[0] for line in proxy.seen] == ["PUT", "PUT", "HEAD"]
        assert quick.put_if_absent("log/1", b"mine") is False
        assert quick.get("log/1") == b"mine"

    def test_a_loser_whose_request_was_lost_is_told_so(self, proxy: FaultyProxy, quick: S3Store, bucket: str) -> None:
        def overtake(exchange: Exchange) -> None:
            proxy.faults.clear()
            assert S3Store(bucket, QUICK).put_if_absent("log/1", b"theirs") is True
            lose_request(exchange)

        proxy.plan(overtake, "PUT")
        assert quick.put_if_absent("log/1", b"mine") is False
        assert quick.get("log/1") == b"theirs"

    def test_a_race_without_a_verdict_is_run_again(self, proxy: FaultyProxy, quick: S3Store) -> None:
        proxy.plan(refusal(409, "ConditionalRequestConflict"), "PUT")
        assert quick.put_if_absent("log/1", b"mine") is True

    def test_a_torn_download_is_read_again(self, proxy: FaultyProxy, quick: S3Store, tmp_path: Path) -> None:
        data = os.urandom(100_000)
        quick.put("x", data)
        proxy.plan(cut_body, "GET", times=2)
        assert quick.get("x") == data
        proxy.plan(cut_body, "GET")
        assert quick.get_range("x", 10, 50_000) == data[10:50_010]
        proxy.plan(cut_body, "GET")
        quick.get_file("x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data

    def test_a_torn_download_is_never_visible(self, proxy: FaultyProxy, quick: S3Store, tmp_path: Path) -> None:
        (tmp_path / "copy").write_bytes(b"old")
        quick.put("x", bytes(100_000))
        before = sorted(os.listdir(tmp_path))
        proxy.plan(cut_body, "GET", times=100)
        with pytest.raises(StoreError):
            quick.get_file("x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == before

    def test_a_large_file_comes_down_in_parts(self, proxy: FaultyProxy, bucket: str, tmp_path: Path) -> None:
        store = S3Store(bucket, S3Options(range_bytes=10_000))
        data = os.urandom(95_000)
        store.put("x", data)
        store.get_file("x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        assert sum(line.startswith("GET") for line in proxy.seen) == 10

    @pytest.mark.parametrize("expected", [0, 95_000, 95_001, 120_000, 40_000, 1])
    def test_what_is_expected_changes_no_byte(self, bucket: str, tmp_path: Path, expected: int) -> None:
        store = S3Store(bucket, S3Options(range_bytes=10_000))
        data = os.urandom(95_000)
        store.put("x", data)
        with (tmp_path / "copy").open("wb") as file:
            assert store.load("x", file, expected) == (95_000, crc32c(data))
        assert (tmp_path / "copy").read_bytes() == data

    def test_a_file_overwritten_while_it_comes_down_is_not_mixed(
        self, proxy: FaultyProxy, bucket: str, tmp_path: Path
    ) -> None:
        store = S3Store(bucket, S3Options(range_bytes=10_000, threads=1))
        old, new = os.urandom(35_000), os.urandom(25_000)

        def overwrite(exchange: Exchange) -> None:
            S3Store(bucket).put("x", new)
            exchange.answer(exchange.forward())

        store.put("x", old)
        proxy.plan(overwrite, "GET", after=2)
        store.get_file("x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == new

    def test_a_large_file_goes_up_in_parts(self, proxy: FaultyProxy, bucket: str, tmp_path: Path) -> None:
        store = S3Store(bucket, S3Options(part_bytes=5 * MIB))
        data = os.urandom(11 * MIB + 1)
        (tmp_path / "file").write_bytes(data)
        store.put_file("x", tmp_path / "file")
        assert sum("partNumber=" in line for line in proxy.seen) == 3
        assert store.get("x") == data

    def test_an_upload_completed_without_an_answer_succeeds(
        self, proxy: FaultyProxy, bucket: str, tmp_path: Path, no_waiting: None
    ) -> None:
        store = S3Store(bucket, S3Options(part_bytes=5 * MIB))
        (tmp_path / "file").write_bytes(bytes(6 * MIB))
        proxy.plan(lose_answer, "POST", having="uploadId=")
        store.put_file("x", tmp_path / "file")
        assert store.size("x") == 6 * MIB

    def test_an_upload_that_fails_leaves_the_old_object(self, proxy: FaultyProxy, bucket: str, tmp_path: Path) -> None:
        store = S3Store(bucket, S3Options(part_bytes=5 * MIB))
        store.put("x", b"old")
        (tmp_path / "file").write_bytes(bytes(6 * MIB))
        proxy.plan(refusal(403, "AccessDenied"), "PUT", having="partNumber=2")
        with pytest.raises(AccessDenied):
            store.put_file("x", tmp_path / "file")
        assert store.get("x") == b"old"
        assert proxy.seen[-2].startswith("DELETE")  # the parts do not stay behind

    def test_expired_credentials_are_an_error_of_their_own(self, proxy: FaultyProxy, quick: S3Store) -> None:
        proxy.plan(refusal(400, "ExpiredToken"), "GET", times=100)
        for read in (lambda: quick.get("x"), lambda: quick.size("x"), lambda: keys(quick)):
            with pytest.raises(ExpiredCredentials, match="expired.*new ones"):
                read()

    def test_missing_rights_are_access_denied(self, proxy: FaultyProxy, quick: S3Store, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        for method in ("GET", "PUT", "DELETE"):
            proxy.plan(refusal(403, "AccessDenied"), method, times=100)
        for use in (*each_operation(quick, tmp_path), lambda: keys(quick)):
            with pytest.raises(AccessDenied, match="rights"):
                use()

    def test_a_bucket_that_does_not_exist_is_said_to_be_missing(self, bucket: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        store = S3Store("s3://no-such-bucket/x", QUICK)
        for use in (*each_operation(store, tmp_path), lambda: keys(store)):
            with pytest.raises(StoreError, match="no-such-bucket.*NoSuchBucket.*create it") as caught:
                use()
            assert not isinstance(caught.value, MissingObject)

    def test_no_message_or_pickle_holds_a_credential(
        self, bucket: str, proxy: FaultyProxy, aws_env: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        hidden = [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], "passed-token", "passed-word"]
        aws_env.setenv("AWS_SESSION_TOKEN", "passed-token")
        (tmp_path / "file").write_bytes(b"x")
        proxy.plan(refusal(403, "InvalidAccessKeyId"), "GET", times=1)
        proxy.plan(refusal(400, "ExpiredToken"), "GET", times=2)
        store = S3Store(bucket, S3Options(attempts=1))
        texts = [all_text(use) for use in [lambda: store.get("x"), lambda: store.get("x")]]
        aws_env.setenv("AWS_ENDPOINT_URL", "http://passed-key:passed-word@127.0.0.1:1")
        store = S3Store(bucket, S3Options(attempts=1))
        texts += [all_text(use) for use in each_operation(store, tmp_path)]
        texts += [repr(store), repr(vars(store)), pickle.dumps(store).decode("latin1")]
        assert [(secret, text) for secret in hidden for text in texts if secret in text] == []
        assert "127.0.0.1:1" in texts[-4]


class TestBucket(BucketBehaviour):
    pass


def all_text(use: Callable[[], object]) -> str:
    """The error of a failing action as a log would hold it, with all that hangs on it."""
    with pytest.raises(StoreError) as caught:
        use()
    error: BaseException | None = caught.value
    assert error is not None
    text = "".join(traceback.format_exception(error))
    while error is not None:
        text += f"{error!r} {vars(error)}"
        error = error.__cause__ or error.__context__
    return text


def test_renewed_credentials_are_read_without_a_restart(
    proxy: FaultyProxy, quick: S3Store, aws_env: pytest.MonkeyPatch
) -> None:
    file = Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"])
    aws_env.delenv("AWS_ACCESS_KEY_ID")
    aws_env.delenv("AWS_SECRET_ACCESS_KEY")
    file.write_text("[default]\naws_access_key_id = firstkey\naws_secret_access_key = x\n")
    quick.put("x", b"1")
    file.write_text("[default]\naws_access_key_id = secondkey\naws_secret_access_key = x\n")
    proxy.plan(refusal(400, "ExpiredToken"), "GET")
    assert quick.get("x") == b"1"
    assert ["firstkey" in line for line in proxy.authorizations] == [True, True, False]
    assert "secondkey" in proxy.authorizations[-1]


def test_no_credentials_at_all_are_access_denied(bucket: str, aws_env: pytest.MonkeyPatch) -> None:
    aws_env.delenv("AWS_ACCESS_KEY_ID")
    aws_env.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match="NoCredentialsError.*AWS_"):
        S3Store(bucket, QUICK).get("x")
    aws_env.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(AccessDenied, match="ProfileNotFound"):
        S3Store(bucket, QUICK).get("x")


def test_an_endpoint_where_nobody_listens_is_named(bucket: str, aws_env: pytest.MonkeyPatch, no_waiting: None) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        aws_env.setenv("AWS_ENDPOINT_URL", f"http://{host}")
        with pytest.raises(StoreError, match=f"no answer from {host} in 3 attempts.*AWS_ENDPOINT_URL"):
            S3Store(bucket, QUICK).put("x", b"")


def test_a_server_that_never_answers_is_given_up(bucket: str, aws_env: pytest.MonkeyPatch, no_waiting: None) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as mute:
        aws_env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(StoreError, match="no answer.*2 attempts.*ReadTimeout"):
            S3Store(bucket, S3Options(attempts=2, read_timeout_s=0.1)).get("x")


def test_an_endpoint_that_is_no_url_is_said_to_be_none(bucket: str, aws_env: pytest.MonkeyPatch) -> None:
    aws_env.setenv("AWS_ENDPOINT_URL", "passed-word@nonsense")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL is no URL") as caught:
        S3Store(bucket, QUICK).get("x")
    assert "passed-word" not in str(caught.value)


def test_old_servers_get_no_checksums_they_do_not_know(proxy: FaultyProxy, quick: S3Store) -> None:
    headers: list[str] = []

    def note(exchange: Exchange) -> bool:
        headers.extend(name.lower() for name in exchange.headers)
        return False

    proxy.faults.append(note)
    quick.put("x", b"1")
    quick.get("x")
    quick.delete("x")
    assert [name for name in headers if "checksum" in name or "trailer" in name] == []


def test_a_server_that_ignores_ranges_gives_no_wrong_bytes(proxy: FaultyProxy, quick: S3Store, tmp_path: Path) -> None:
    def forget_range(exchange: Exchange) -> None:
        del exchange.headers["Range"]
        exchange.answer(exchange.forward())

    quick.put("x", b"0123456789")
    proxy.plan(forget_range, "GET", times=100)
    assert quick.get_range("x", 3, 4) == b"3456"
    assert quick.size("x") == 10


def test_a_server_without_a_host_name_per_bucket_is_addressed_by_path(
    proxy: FaultyProxy, quick: S3Store, aws_env: pytest.MonkeyPatch
) -> None:
    aws_env.setenv("AWS_ENDPOINT_URL", proxy.url.replace("127.0.0.1", "localhost"))
    quick.put("x", b"")
    assert proxy.seen == [f"PUT /{quick.bucket}/{quick.prefix}x"]


def test_a_folder_mark_in_the_bucket_is_no_object(bucket: str, quick: S3Store) -> None:
    quick.put("a/b", b"")
    for mark in ("a/", ""):
        boto3.client("s3").put_object(Bucket=quick.bucket, Key=quick.prefix + mark, Body=b"")
    assert keys(quick) == ["a/b"]
