"""Servers that lack what a store is made of: said as their property, never as a passing trouble or somebody's doing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.bucket import S3Store
from core.bucket_client import S3Options
from core.storage import StoreError, UnfitStore, crc32c
from tests.quirky import Quirky

URI = "s3://bucket/p"
OPTIONS = S3Options(attempts=2, range_bytes=1000, part_bytes=5 << 20, page=2)


def test_a_server_without_quirks_is_fit(quirky: Quirky, tmp_path: Path) -> None:
    server = quirky()
    store = S3Store(URI, OPTIONS)
    data = os.urandom(3500)
    server.objects["p/x"] = data
    with (tmp_path / "x").open("wb") as file:
        assert store.load("x", file, 3500) == (3500, crc32c(data))
    assert [entry.key for entry in store.list()] == ["x"]


@pytest.mark.parametrize("quirk", ["no token", "same token"])
def test_a_listing_that_is_cut_off_without_a_token_has_an_end(quirky: Quirky, quirk: str) -> None:
    server = quirky(quirk)
    store = S3Store(URI, OPTIONS)
    server.objects |= {f"p/{i}": b"" for i in range(5)}
    with pytest.raises(UnfitStore, match=r"cuts a listing off .* no new try mends it: use another server"):
        list(store.list())
    with pytest.raises(UnfitStore, match="cuts a listing off"):
        store.abandoned(0, lambda key: True, remove=False)


def test_entries_without_a_time_are_told(quirky: Quirky) -> None:
    server = quirky("no time")
    store = S3Store(URI, OPTIONS)
    server.objects["p/x"] = b""
    with pytest.raises(UnfitStore, match="without their key, size or time"):
        list(store.list())


def test_without_etags_a_small_object_is_read_and_a_large_one_refused(quirky: Quirky, tmp_path: Path) -> None:
    server = quirky("no etag")
    store = S3Store(URI, OPTIONS)
    server.objects |= {"p/small": b"123", "p/large": bytes(3500)}
    assert (store.get("small"), store.get_range("large", 3499, 9), store.size("large")) == (b"123", b"\0", 3500)
    store.get_file("small", tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"123"
    with pytest.raises(UnfitStore, match="answers without ETag"):
        store.get_file("large", tmp_path / "large")
    (tmp_path / "file").write_bytes(bytes(6 << 20))
    with pytest.raises(UnfitStore, match="answers without ETag"):
        store.put_file("parts", tmp_path / "file")


@pytest.mark.parametrize(("quirk", "status"), [("no conditions", 501), ("no conditions, 400", 400)])
def test_a_server_without_conditional_puts_is_not_tried_again(quirky: Quirky, quirk: str, status: int) -> None:
    server = quirky(quirk)
    store = S3Store(URI, OPTIONS)
    with pytest.raises(UnfitStore, match="does not know conditional puts") as caught:
        store.put_if_absent("x", b"")
    assert "try again later" not in str(caught.value)
    assert server.seen == [f"PUT {status}"]


@pytest.mark.parametrize("quirk", ["no range", "other range", "no total"])
def test_ranges_that_are_not_honoured_blame_the_server_not_a_writer(quirky: Quirky, quirk: str, tmp_path: Path) -> None:
    server = quirky(quirk)
    store = S3Store(URI, OPTIONS)
    server.objects["p/large"] = os.urandom(3500)
    with pytest.raises(UnfitStore, match="ignores Range"), (tmp_path / "copy").open("wb") as file:
        store.load("large", file, 3500)


def test_an_object_that_comes_whole_is_taken_whole(quirky: Quirky, tmp_path: Path) -> None:
    server = quirky("no range")
    store = S3Store(URI, OPTIONS)
    server.objects["p/large"] = os.urandom(3500)
    store.get_file("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == server.objects["p/large"]


def test_what_is_not_implemented_is_no_passing_trouble(quirky: Quirky) -> None:
    quirky("nothing")
    with pytest.raises(StoreError, match=r"HTTP 501\): the server lacks what is asked of it"):
        S3Store(URI, OPTIONS).put("x", b"")
