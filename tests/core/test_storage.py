"""One semantics for folders and buckets, and what folders alone promise."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.bucket import S3Store
from core.bucket_client import S3Options
from core.folder import FileStore
from core.storage import AccessDenied, MissingObject, Store, StoreError, crc32c, open_store, resolve

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

    def test_a_store_tells_the_time_by_which_it_dates_entries(self, store: Store) -> None:
        store.put("x", b"1")
        [entry] = store.list()
        assert entry.modified - 2 < store.now() < entry.modified + 60
        assert keys(store) == ["x"]

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
    with pytest.raises(StoreError, match="'/tmp/x' has no scheme: write file:///tmp/x"):
        resolve("/tmp/x", "s3://bucket/root")


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
    for put, key in ((store.put, "a/x"), (store.put_if_absent, "a/x"), (store.put, "b")):
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


def test_a_confined_folder_neither_lists_nor_deletes_through_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x").write_bytes(b"")
    store = FileStore(tmp_path / "root")
    store.put("own/x", b"")
    for name in ("linked", "own/linked"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/own/file").symlink_to(tmp_path / "elsewhere/x")
    confined = store.confined()
    assert keys(confined) == ["own/x"]
    assert keys(confined.sub("linked")) == keys(confined, "linked/") == []
    confined.delete("linked/x", "own/linked/x")
    confined.sub("own").sub("linked").delete("x")
    assert (tmp_path / "elsewhere/x").exists()
    confined.sub("own").delete("x")
    assert keys(store) == ["linked/x", "own/file", "own/linked/x"], "what is no link goes as ever"


def test_only_temporary_files_of_our_own_making_and_place_are_abandoned_ones(tmp_path: Path) -> None:
    ours, theirs, linked = f".tmp-{'a' * 32}", ".tmp-editor", f".tmp-{'b' * 32}"
    (tmp_path / "elsewhere").mkdir()
    store = FileStore(tmp_path / "root")
    store.put("own/x", b"")
    store.put("other/x", b"")
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    for path in (f"root/own/{ours}", f"root/own/{theirs}", f"root/other/{ours}", f"elsewhere/{linked}"):
        (tmp_path / path).touch()
        os.utime(tmp_path / path, (0, 0))
    assert store.abandoned(60.0, lambda key: key != f"other/{ours}", remove=True) == 1
    assert (tmp_path / "root/other" / ours).exists()
    assert (tmp_path / "elsewhere" / linked).exists()
    assert not (tmp_path / "root/own" / ours).exists()
    assert (tmp_path / "root/own" / theirs).exists()
