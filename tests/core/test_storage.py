"""One semantics for folders and buckets, and what a bucket's client makes of the faults of networks and servers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import socket
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from core.bucket import S3Store
from core.bucket_client import S3Options
from core.storage import (
    AccessDenied,
    ExpiredCredentials,
    FileStore,
    MissingObject,
    Store,
    StoreError,
    crc32c,
    open_store,
    resolve,
)
from tests.faults import Exchange, FaultyProxy, cut_body, lose_answer, lose_request, refusal

QUICK = S3Options(attempts=3, connect_timeout_s=2.0, read_timeout_s=30.0)
MIB = 1 << 20


def keys(store: Store, prefix: str = "", after: str = "") -> list[str]:
    return [entry.key for entry in store.list(prefix, after)]


def in_forks(count: int, action: Callable[[int], object]) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=action, args=(number,)) for number in range(count)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        child.kill()
    assert [child.exitcode for child in children] == [0] * count


def use_from_forks(store: Store) -> None:
    """Four children of a process that has used the store use it all at once."""
    for number in range(4):
        store.put(f"{number}", b"%d" % number * 1000)
    start = multiprocessing.get_context("fork").Barrier(4)

    def child(number: int) -> None:
        start.wait(60)
        for _ in range(10):
            assert store.get(f"{number}") == b"%d" % number * 1000
        store.put(f"done-{number}", b"")

    in_forks(4, child)
    assert keys(store, "done") == [f"done-{number}" for number in range(4)]


def each_operation(store: Store, tmp_path: Path, key: str = "x") -> Iterator[Callable[[], object]]:
    """Every operation on one object; `tmp_path` holds a file named file."""
    yield lambda: store.put(key, b"")
    yield lambda: store.put_file(key, tmp_path / "file")
    yield lambda: store.put_if_absent(key, b"")
    yield lambda: store.get(key)
    yield lambda: store.get_range(key, 0, 1)
    yield lambda: store.get_file(key, tmp_path / "copy")
    yield lambda: store.size(key)
    yield lambda: store.delete(key)


@pytest.fixture
def store(store_uri: str) -> Store:
    return open_store(store_uri)


class StoreBehaviour:
    """What holds for every store; `store` says which."""

    def test_put_is_read_back_and_overwritten(self, store: Store) -> None:
        store.put("a/b", b"first")
        store.put("a/b", b"second, and longer")
        assert store.get("a/b") == b"second, and longer"
        assert store.size("a/b") == 18
        assert keys(store) == ["a/b"]

    def test_empty_objects_are_objects(self, store: Store, tmp_path: Path) -> None:
        store.put("nothing", b"")
        store.get_file("nothing", tmp_path / "copy")
        assert store.get("nothing") == b""
        assert store.size("nothing") == 0
        assert store.get_range("nothing", 0, 5) == b""
        assert (tmp_path / "copy").read_bytes() == b""

    def test_ranges_are_slices(self, store: Store) -> None:
        data = bytes(range(100))
        store.put("x", data)
        for start, size in [(0, 1), (0, 100), (10, 20), (90, 100), (100, 1), (500, 3), (5, 0)]:
            assert store.get_range("x", start, size) == data[start : start + size]
        for start, size in [(-1, 5), (0, -1)]:
            with pytest.raises(StoreError, match="range"):
                store.get_range("x", start, size)

    def test_an_absent_object_is_said_to_be_missing_by_name(self, store: Store, tmp_path: Path) -> None:
        store.put("folder/object", b"")
        for key in ("absent", "folder", "folder/absent", "no/such/folder"):
            for read in (
                lambda key: store.get(key),
                lambda key: store.get_range(key, 0, 1),
                lambda key: store.get_file(key, tmp_path / "copy"),
            ):
                with pytest.raises(MissingObject, match=key):
                    read(key)
            assert store.size(key) is None
        assert not list(tmp_path.glob("copy*"))

    def test_odd_names_are_kept(self, store: Store) -> None:
        names = ["100% sure?.jpg", "a b+c&d=e", "r\u00e9torte/\u84b8\u7559", "x" * 200, "~'\"#[]{}|\\^`;:@!$*(),"]
        for name in names:
            store.put(name, name.encode())
        assert keys(store) == sorted(names)
        assert [store.get(name).decode() for name in names] == names

    def test_list_is_in_key_order_by_prefix_and_after(self, store: Store) -> None:
        names = [
            "a",
            "b-1",
            "b.1",
            "b/1",
            "b/2/x",
            "b0",
            "c/d/e/f",
            "\u00e9",
        ]  # "-" and "." sort before "/", "0" behind
        for name in names:
            store.put(name, name.encode())
        found = list(store.list())
        assert [entry.key for entry in found] == sorted(names)
        assert [entry.size for entry in found] == [len(name.encode()) for name in sorted(names)]
        for prefix in ("", "b", "b/", "b/2", "b/2/", "c/d", "c/d/e/f", "zzz", "a/"):
            for after in ("", "a", "b", "b/", "b/1", "b/2/x", "b/9", "b0", "c/d/e", "zzz"):
                expected = [name for name in sorted(names) if name.startswith(prefix) and name > after]
                assert keys(store, prefix, after) == expected, (prefix, after)

    def test_list_pages_through_all(self, store: Store) -> None:
        if isinstance(store, S3Store):
            store = S3Store(store.uri, S3Options(page=10))
        names = [f"{i:03d}" for i in range(25)]
        for name in names:
            store.put(name, b"")
        assert keys(store) == names
        assert keys(store, after="004") == names[5:]

    def test_entries_say_when_they_were_written(self, store: Store, tmp_path: Path) -> None:
        (tmp_path / "now").touch()
        store.put("x", b"")
        (entry,) = store.list()
        assert abs(entry.modified - (tmp_path / "now").stat().st_mtime) < 60

    def test_files_come_and_go_whole(self, store: Store, tmp_path: Path) -> None:
        data = os.urandom(3 * MIB + 17)
        (tmp_path / "source").write_bytes(data)
        store.put_file("deep/file", tmp_path / "source")
        store.get_file("deep/file", tmp_path / "new/folder/copy")
        assert (tmp_path / "new/folder/copy").read_bytes() == data
        assert os.listdir(tmp_path / "new/folder") == ["copy"]

    def test_putting_an_absent_file_says_which(self, store: Store, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            store.put_file("x", tmp_path / "nowhere")
        assert keys(store) == []

    def test_put_if_absent_never_overwrites(self, store: Store) -> None:
        assert store.put_if_absent("log/0", b"mine") is True
        assert store.put_if_absent("log/0", b"theirs") is False
        assert store.put_if_absent("log/0", b"mine") is False  # equal bytes make no winner
        assert store.get("log/0") == b"mine"
        store.delete("log/0")
        assert store.put_if_absent("log/0", b"theirs") is True
        assert keys(store) == ["log/0"]

    def test_a_race_of_eight_has_one_winner(self, store: Store) -> None:
        start = threading.Barrier(8)

        def run(number: int, turn: int) -> bool:
            start.wait(60)
            return store.put_if_absent(f"log/{turn}", b"%d" % number)

        with ThreadPoolExecutor(8) as pool:
            for turn in range(5):
                won = list(pool.map(run, range(8), [turn] * 8))
                assert won.count(True) == 1
                assert store.get(f"log/{turn}") == b"%d" % won.index(True)

    def test_readers_see_the_old_or_the_new_object(self, store: Store) -> None:
        versions = [bytes([i]) * 200_000 for i in range(4)]
        store.put("x", versions[0])
        done = threading.Event()

        def overwrite() -> None:
            for turn in range(12):
                store.put("x", versions[turn % 4])
            done.set()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(overwrite)
            while not done.is_set() and not writer.done():
                assert store.get("x") in versions
            writer.result()

    def test_delete_takes_many_and_forgives_absent_ones(self, store: Store) -> None:
        for name in ("a/b/1", "a/b/2", "c"):
            store.put(name, b"")
        store.delete("a/b/1", "a/b/2", "absent", "no/such/folder/x")
        store.delete()
        assert keys(store) == ["c"]
        store.put("a", b"where a folder was")
        assert keys(store) == ["a", "c"]

    def test_sub_is_the_same_store_further_down(self, store: Store) -> None:
        runs = store.sub("runs/")
        runs.sub("7").put("record", b"r")
        assert keys(store) == ["runs/7/record"]
        assert keys(runs) == ["7/record"]
        assert runs.uri == f"{store.uri}/runs"
        assert open_store(runs.uri).get("7/record") == b"r"

    @pytest.mark.parametrize(
        "key", ["../x", "a/../../x", "..", "/x", "/", "", ".", "./x", "a//b", "a/", "a/.", ".tmp-1", "a\0b"]
    )
    def test_keys_that_lead_elsewhere_are_refused(self, store: Store, tmp_path: Path, key: str) -> None:
        (tmp_path / "file").write_bytes(b"x")
        for use in (*each_operation(store, tmp_path, key), lambda: store.delete("a", key)):
            with pytest.raises(StoreError, match="relative"):
                use()
        assert keys(store) == []

    @pytest.mark.parametrize("prefix", ["..", "../", "a/../..", "/", "/etc", "a//b", "./a", ".tmp-1"])
    def test_prefixes_that_lead_elsewhere_are_refused(self, store: Store, prefix: str) -> None:
        for use in (lambda: keys(store, prefix), lambda: store.sub(prefix)):
            with pytest.raises(StoreError, match="relative"):
                use()

    def test_pickled_stores_work(self, store: Store) -> None:
        store.put("a/x", b"1")
        assert pickle.loads(pickle.dumps(store)).get("a/x") == b"1"
        assert pickle.loads(pickle.dumps(store.sub("a"))).get("x") == b"1"

    def test_forked_processes_read_and_write(self, store: Store) -> None:
        use_from_forks(store)


class TestStore(StoreBehaviour):
    pass


# ---- names


def test_uris_that_name_no_store_are_refused_with_the_valid_forms() -> None:
    for uri in ("", "/tmp/x", "file://tmp/x", "file:/tmp/x", "s3://", "s3://a b/x", "http://host/x", "gs://bucket/x"):
        with pytest.raises(StoreError, match="s3://BUCKET/PREFIX.*file:///FOLDER"):
            open_store(uri)
    with pytest.raises(StoreError) as caught:
        open_store("s3://key:hidden@bucket/x")
    assert "hidden" not in str(caught.value)


def test_a_store_uri_opens_the_same_store_again(tmp_path: Path) -> None:
    for name in ("plain", "with space", "100%25", "a%b", "\u00e9"):
        folder = tmp_path / name
        FileStore(folder).put("x", name.encode())
        assert open_store(FileStore(folder).uri).get("x") == name.encode()
    assert open_store((tmp_path / "with space").as_uri()).get("x") == b"with space"
    assert open_store("s3://bucket/a/b/").uri == "s3://bucket/a/b"
    assert open_store("s3://bucket").uri == "s3://bucket"


def test_resolve_reads_store_as_the_configured_root() -> None:
    assert resolve("store:a/b", "s3://bucket/root") == "s3://bucket/root/a/b"
    assert resolve("store:a/b", "file:///root/") == "file:///root/a/b"
    for uri in ("s3://other/x", "file:///x", "hub", "run:abc"):
        assert resolve(uri, "s3://bucket/root") == uri


def test_crc32c_is_the_castagnoli_polynomial() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's CRC


# ---- folders


def test_a_put_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        real_fsync(handle)

    def noted(name: str) -> None:
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (steps.append(name), real(*args))[1])

    monkeypatch.setattr(os, "fsync", fsync)
    noted("replace")
    noted("link")
    store = FileStore(tmp_path)
    store.put("x", b"1")
    store.put_if_absent("y", b"2")
    assert steps == ["sync file", "replace", "sync folder", "sync file", "link", "sync folder"]


def test_a_writer_killed_in_the_middle_leaves_the_old_object(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    store.put("a/x", b"old")

    def die(*args: object) -> None:
        os._exit(0)

    def child(number: int) -> None:
        os.replace = os.link = die  # type: ignore[assignment]
        store.put("a/x", b"new")

    in_forks(1, child)
    assert store.get("a/x") == b"old"
    assert keys(store) == ["a/x"]
    assert len(os.listdir(tmp_path / "store/a")) == 2  # what it had written is there, but under no name


def test_a_repeated_link_still_tells_the_winner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system that has lost the answer of a link repeats it and reports that the name is taken."""
    real = os.link

    def twice(*args: Path) -> None:
        real(*args)
        real(*args)

    monkeypatch.setattr(os, "link", twice)
    store = FileStore(tmp_path)
    assert store.put_if_absent("x", b"1") is True
    assert store.put_if_absent("x", b"2") is False


def test_a_full_disk_leaves_the_old_object_and_no_litter(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("x", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StoreError, match="x: File too large"):
            store.put("x", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.get("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_without_rights_is_access_denied(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    tmp_path.chmod(0o711)

    def child(number: int) -> None:
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(AccessDenied, match="owner and mode"):
            FileStore(tmp_path / "closed").put("x", b"")

    in_forks(1, child)


def test_a_key_below_another_key_is_refused_in_a_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put("a", b"1")
    store.put("b/c", b"2")
    for key in ("a/x", "b"):
        for put in (store.put, store.put_if_absent):
            with pytest.raises(StoreError, match=f"{store.uri}/{key}: "):
                put(key, b"3")
    assert [store.get("a"), store.get("b/c")] == [b"1", b"2"]
    assert keys(store) == ["a", "b/c"]


def test_deleting_empties_folders_up_to_the_root(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "root")
    store.put("a/b/c", b"")
    store.delete("a/b/c")
    assert os.listdir(tmp_path / "root") == []


def test_a_folder_pruned_under_a_writer_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = uuid.uuid4

    def name_after_pruning() -> uuid.UUID:
        monkeypatch.setattr(uuid, "uuid4", real)
        (tmp_path / "a").rmdir()
        return real()

    monkeypatch.setattr(uuid, "uuid4", name_after_pruning)
    FileStore(tmp_path).put("a/x", b"1")
    assert FileStore(tmp_path).get("a/x") == b"1"


def test_a_folder_of_links_is_followed_once(tmp_path: Path) -> None:
    (tmp_path / "photos/cats").mkdir(parents=True)
    (tmp_path / "photos/cats/1.jpg").write_bytes(b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/2.jpg").write_bytes(b"22")
    (tmp_path / "photos/dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/cats/all").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/broken.jpg").symlink_to(tmp_path / "nowhere")
    assert keys(FileStore(tmp_path / "photos")) == ["cats/1.jpg", "dogs/2.jpg"]


# ---- buckets


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
        store = S3Store(bucket, S3Options(part_bytes=10_000))
        data = os.urandom(95_000)
        store.put("x", data)
        store.get_file("x", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        assert sum(line.startswith("GET") for line in proxy.seen) == 10

    def test_a_file_overwritten_while_it_comes_down_is_not_mixed(
        self, proxy: FaultyProxy, bucket: str, tmp_path: Path
    ) -> None:
        store = S3Store(bucket, S3Options(part_bytes=10_000, threads=1))
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
