"""Tars without an index: which samples they hold, what is passed over and why, and how little of them is read."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest

from core.bucket import S3Store
from core.data.ranged_file import LOCAL_PROBE, PROBE
from core.data.sentences import sentence
from core.data.source import DataError, Source, open_source, passed_over
from core.data.tar_scan import scan_tar
from core.data.tar_source import TarSource
from core.data.tar_table import tar_table
from core.folder import FileStore
from core.storage import Store, StoreError, open_store
from tests.core.data.images import encode, jpeg, pixels
from tests.core.data.tars import labelled, special, tar

pytestmark = pytest.mark.usefixtures("scans")


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "set")


def opened(store: Store, **tars: bytes) -> Source:
    for name, data in tars.items():
        store.put(f"{name}.tar", data)
    return open_source(store.uri)


def keys(source: Source) -> list[str]:
    return [source.read(i).key for i in range(len(source))]


def test_samples_of_all_tars_are_numbered_through(store_uri: str) -> None:
    images = [jpeg(i) for i in range(5)]
    source = opened(open_store(store_uri), b=labelled(images[3:], 3), a=labelled(images[:3]))
    assert isinstance(source, TarSource)
    assert source.shard_sizes.tolist() == [3, 2]
    assert keys(source) == [f"set/{i:04d}" for i in range(5)]
    assert [source.read(i).data for i in range(5)] == images
    assert [source.label(i) for i in range(5)] == [source.read(i).label for i in range(5)] == [0, 1, 2, 0, 1]
    assert source.classes == ["0", "1", "2"]
    assert pickle.loads(pickle.dumps(source)).read(4).data == images[4]


def test_names_of_numbered_classes_come_from_the_file_beside(store: FileStore) -> None:
    store.put("classes.txt", "Katze\nHund\nKüken\n".encode())
    assert opened(store, a=labelled([jpeg(0)] * 3)).classes == ["Katze", "Hund", "Küken"]
    store.put("classes.txt", b"cat\n")
    with pytest.raises(DataError, match=r"label 2 is beyond the 1 classes of classes.txt"):
        open_source(store.uri)


def test_labels_and_texts_come_from_json(store: FileStore) -> None:
    about = [{"class": "dog", "caption": "a dog"}, {"label": "cat", "captions": ["one", "two"]}, {"class": "dog"}]
    members = [pair for i, d in enumerate(about) for pair in ((f"{i}.jpg", jpeg(i)), (f"{i}.json", json.dumps(d)))]
    source = opened(store, a=tar(*members))
    assert source.classes == ["cat", "dog"]
    assert [source.label(i) for i in range(3)] == [1, 0, 1]
    assert [source.text(i) and sentence(source.text(i), 0.9) for i in range(3)] == ["a dog", "two", ""]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_texts_before_or_behind_the_image_and_long_or_foreign_names(store: FileStore, format: int) -> None:
    long, image = f"größe/{'x' * 150}", jpeg(0)
    members = [
        ("a.txt", "before"),
        ("a.webp", image),
        (f"{long}.JPG", image),
        (f"{long}.txt", "behind ☕"),
        ("b.png", b""),
    ]
    source = opened(store, a=tar(*members, format=format))
    assert keys(source) == ["a", long, "b"]
    assert [source.text(i) for i in range(3)] == ["before", "behind ☕", ""]
    assert [source.read(i).data for i in range(3)] == [image, image, b""]
    assert source.classes == []
    assert source.label(0) == -1


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("/etc/x.jpg", b"x"), "absolute or has '..'"),
        (("../x.jpg", b"x"), "absolute or has '..'"),
        (("a/../../x.jpg", b"x"), "absolute or has '..'"),
        (special("l.jpg", tarfile.SYMTYPE, "/etc/passwd"), "link to '/etc/passwd'"),
        (special("l.jpg", tarfile.LNKTYPE, "good.jpg"), "link to 'good.jpg'"),
        (special("d.jpg", tarfile.CHRTYPE), "device or pipe"),
        (special("d.jpg", tarfile.FIFOTYPE), "device or pipe"),
        (("README", b"x"), "no name with a suffix"),
        (("a/._x.jpg", b"x"), "no name with a suffix"),
        (("x.npy", b"x"), "no image among npy"),
    ],
)
def test_what_is_no_sample_is_passed_over_with_a_reason(store: FileStore, member: Any, reason: str) -> None:
    source = opened(store, a=tar(member, ("good.jpg", jpeg(0)), special("folder", tarfile.DIRTYPE)))
    assert keys(source) == ["good"]
    ((name, why),) = source.skipped
    assert name.startswith("a.tar: ")
    assert reason in why


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"cls": b"cat"}, "label b'cat' in .cls is not digits"),
        ({"cls": b"-1"}, "is not digits"),
        ({"cls": b"99999999999"}, "is not digits"),
        ({"cls": b"caf\xe9"}, "is not digits"),
        ({"cls": b"1" * ((1 << 20) + 1)}, "is too large"),
        ({"json": b'{"label": 1.5}'}, "neither a number"),
        ({"json": b'{"label": "caf\xe9"}'}, "no JSON object in UTF-8"),
        ({"json": b"[1]"}, "no JSON object"),
        ({"json": b"[" * 100_000}, "more than 64 lists and objects in each other"),
        ({"json": b'{"class": "dog", "a": ' + b"[" * 500 + b"]" * 500 + b"}"}, "more than 64 lists and objects"),
    ],
)
def test_a_sample_whose_label_cannot_be_read_is_left_out(
    store: FileStore, beside: dict[str, bytes], reason: str
) -> None:
    source = opened(store, a=tar(*((f"x.{s}", d) for s, d in beside.items()), ("x.jpg", b""), ("y.jpg", jpeg(0))))
    assert keys(source) == ["y"]
    assert reason in source.skipped[0][1]


def test_names_that_are_not_utf8_are_kept_and_texts_that_are_not_are_errors(store: FileStore) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    source = opened(store, a=tar((f"{name}.jpg", jpeg(0)), (f"{name}.txt", b"caf\xe9"), format=tarfile.GNU_FORMAT))
    assert keys(source) == [name]
    with pytest.raises(DataError, match=r"a.tar: the text of 'caf.*' is not UTF-8"):
        source.text(0)


def test_a_second_image_of_a_sample_is_passed_over(store: FileStore) -> None:
    source = opened(store, a=tar(("x.left.jpg", jpeg(0)), ("x.right.jpg", jpeg(1))))
    assert source.read(0).data == jpeg(0)
    assert source.skipped == [("a.tar: x.right.jpg", "another image of the same sample")]


def test_an_image_of_the_plain_name_comes_before_what_says_something_of_it(store: FileStore) -> None:
    source = opened(store, a=tar(("x.seg.png", encode(pixels(3), "PNG")), ("x.jpg", jpeg(1))))
    assert source.read(0).data == jpeg(1)
    assert source.skipped == [("a.tar: x.seg.png", "another image of the same sample")]


def test_tars_that_were_joined_are_read_to_the_end(store: FileStore) -> None:
    first, second = labelled([jpeg(0), jpeg(1)]), labelled([jpeg(2)], 2)
    source = opened(store, a=first + bytes(100_352) + second)
    assert keys(source) == ["set/0000", "set/0001", "set/0002"]
    assert [source.read(i).data for i in range(3)] == [jpeg(0), jpeg(1), jpeg(2)]
    with pytest.raises(DataError, match=rf"b.tar: .*at byte {len(first)}, is no further tar: no whole tar"):
        opened(store, b=first + b"rubbish" * 200)


def test_a_compressed_tar_is_called_one_whatever_its_name(store: FileStore) -> None:
    data = labelled([jpeg(0)])
    for name in ("b.tgz", "c.tar.gz"):
        store.put(name, gzip.compress(data))
    source = opened(store, a=data)
    assert [name for name, _ in source.skipped] == ["b.tgz", "c.tar.gz"]
    (line,) = passed_over(source)
    assert line.startswith("2 x a compressed tar cannot be read by the sample")
    with pytest.raises(DataError, match=r"d.tar: compressed by gzip in spite of its name; uncompress it"):
        opened(store, d=gzip.compress(data))


def test_names_and_numbers_as_labels_do_not_go_together(store: FileStore) -> None:
    with pytest.raises(DataError, match="some labels are numbers, others names such as 'cat'"):
        opened(store, a=tar(("x.jpg", b""), ("x.cls", "1"), ("y.jpg", b""), ("y.json", '{"class": "cat"}')))


@pytest.mark.parametrize("cut", [100, 700, 1500, 4000])
def test_a_tar_that_is_cut_short_is_named(store: FileStore, cut: int) -> None:
    with pytest.raises(DataError, match=r"set/a.tar: .*no whole tar; bring it again"):
        opened(store, a=tar(("x.jpg", b"1" * 500), ("y.jpg", b"2" * 9000))[:cut])


@pytest.mark.parametrize("cut", [6140, 6000, 2000])
def test_a_tar_that_is_cut_within_what_is_passed_over_is_named(store: FileStore, cut: int) -> None:
    with pytest.raises(DataError, match=r"set/a.tar: .*no whole tar; bring it again"):
        opened(store, a=tar(("x.jpg", jpeg(0)[:500]), ("README.md", b"2" * 4600))[:cut])


def test_a_tar_with_a_damaged_header_is_named(store: FileStore) -> None:
    data = bytearray(labelled([b"1" * 500, b"2" * 500]))
    data[2048 + 100] ^= 1
    with pytest.raises(DataError, match=r"set/a.tar: no header at byte 2048: no whole tar"):
        opened(store, a=bytes(data))


@pytest.mark.parametrize(("format", "long"), [(tarfile.PAX_FORMAT, "comment"), (tarfile.GNU_FORMAT, "name")])
def test_headers_of_megabytes_are_not_read_into_memory(store: FileStore, format: int, long: str) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as made:
        info = tarfile.TarInfo("1.jpg" if long == "comment" else f"{'x' * (3 << 20)}.jpg")
        info.pax_headers = {"comment": "x" * (3 << 20)}
        made.addfile(info)
    with pytest.raises(DataError, match=r"a header of 31457\d\d bytes, where 1048576 are read at most"):
        opened(store, first=file.getvalue())


def test_tars_of_anything_else_are_explained(store: FileStore) -> None:
    with pytest.raises(DataError, match=r"no sample with an image in 1 tars; the first thing passed over: a.tar: n01"):
        opened(store, a=tar(("n01440764.tar", b"x")))


def test_images_beside_an_archive_stay_a_folder_of_images(store: FileStore) -> None:
    store.put("cat/1.jpg", jpeg(0))
    assert opened(store, original=labelled([jpeg(1)])).classes == ["cat"]


def test_a_tar_that_changed_after_it_was_scanned_is_refused(store: FileStore) -> None:
    source = opened(store, a=labelled([jpeg(i) for i in range(3)]))
    store.put("a.tar", labelled([jpeg(i) for i in range(3)], first=9))
    with pytest.raises(DataError, match=r"a.tar: sample 0 is not where it was found; the tar has changed"):
        source.read(0)
    assert keys(open_source(store.uri)) == [f"set/{i:04d}" for i in range(9, 12)], "scanned again"


def test_tars_are_scanned_once_on_a_machine(store: FileStore, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(store, a=labelled([jpeg(0)]), b=tar(("x.jpg", b""), ("y.npy", b"")))
    assert first.skipped
    assert list(scans.iterdir())
    monkeypatch.setattr("core.data.tar_table.scan_tar", None)
    again = open_source(store.uri)
    assert again.fingerprint() == first.fingerprint()
    assert keys(again) == keys(first)
    assert (again.skipped, again.classes) == (first.skipped, first.classes)


def test_fingerprints_differ_with_members_labels_and_texts(store: FileStore) -> None:
    sets = [
        [("x.jpg", b"1"), ("x.cls", "1"), ("x.txt", "t")],
        [("y.jpg", b"1"), ("y.cls", "1"), ("y.txt", "t")],
        [("x.jpg", b"22"), ("x.cls", "1"), ("x.txt", "t")],
        [("x.jpg", b"1"), ("x.cls", "0"), ("x.txt", "t")],
        [("x.jpg", b"1"), ("x.cls", "1"), ("x.txt", "tt")],
    ]
    names = {opened(FileStore(store.root / str(i)), a=tar(*members)).fingerprint() for i, members in enumerate(sets)}
    assert len(names) == 5
    assert opened(FileStore(store.root / "elsewhere"), a=tar(*sets[0])).fingerprint() in names


class Asked:
    """Counts what is asked of a store."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sizes: list[int] = []

    def get_range(self, key: str, start: int, size: int) -> bytes:
        self.sizes.append(size)
        return super().get_range(key, start, size)  # type: ignore[misc, no-any-return]


class AskedFolder(Asked, FileStore):
    pass


class AskedBucket(Asked, S3Store):
    pass


def test_in_a_bucket_large_members_are_skipped_and_close_headers_come_together(bucket: str) -> None:
    store = AskedBucket(bucket)
    large = [(f"{i}.jpg", b"\1" * (3 << 20)) for i in range(8)]
    store.put("large.tar", tar(*large))
    store.put("small.tar", tar(*((f"{i}.jpg", b"\1" * 20_000) for i in range(400))))
    for name, samples, requests, share in (("large", 8, 12, 0.02), ("small", 400, 9, 1.01)):
        store.sizes.clear()
        size = store.size(f"{name}.tar") or 0
        assert len(scan_tar(store, f"{name}.tar", size).samples) == samples
        assert len(store.sizes) <= requests
        assert sum(store.sizes) < share * size + PROBE


def test_in_a_folder_little_more_than_headers_is_read(tmp_path: Path) -> None:
    store = AskedFolder(tmp_path)
    store.put("a.tar", tar(*((f"{i}.jpg", b"\1" * 100_000) for i in range(50))))
    assert len(scan_tar(store, "a.tar", store.size("a.tar") or 0).samples) == 50
    assert sum(store.sizes) <= 52 * LOCAL_PROBE, "of each header, the end, and what lies behind it"


def test_a_table_survives_being_kept(store: FileStore, tmp_path: Path) -> None:
    store.put("a.tar", tar(("ü.jpg", jpeg(0)), ("ü.cls", "3"), ("b.txt", "no image")))
    first, again = (tar_table(store, list(store.list()), tmp_path / "kept") for _ in range(2))
    assert (again.samples, again.classes, again.skipped, again.keys) == (
        first.samples,
        first.classes,
        first.skipped,
        first.keys,
    )
    assert again.rows.tobytes() == first.rows.tobytes()
    assert again.key_ends.tolist() == [2]


def test_scans_are_kept_where_only_this_user_can_read_and_plant_them(store: FileStore, scans: Path) -> None:
    store.put("a.tar", labelled([jpeg(0)]))
    open_source(store.uri)
    (kept,) = scans.glob("retort-scans-*")
    assert kept.stat().st_mode & 0o777 == 0o700
    kept.chmod(0o777)
    with pytest.raises(StoreError, match=f"scans of tars, {kept}: others may write to it"):
        open_source(store.uri)


def test_the_lock_of_a_scan_empties_no_file_that_a_link_leads_to(store: FileStore, scans: Path, tmp_path: Path) -> None:
    store.put("a.tar", labelled([jpeg(0)]))
    open_source(store.uri)
    (lock,) = scans.glob("retort-scans-*/*.lock")
    (tmp_path / "thesis").write_text("years of work")
    lock.unlink()
    lock.symlink_to(tmp_path / "thesis")
    with pytest.raises(OSError, match="symbolic link"):
        open_source(store.uri)
    assert (tmp_path / "thesis").read_text() == "years of work"
