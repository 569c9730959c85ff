from __future__ import annotations

import base64
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data.decode import to_tensor
from core.data.sentences import CorruptText, candidates, sentence
from core.data.source import DataError, open_source
from core.data.tsv import Table, Tables, feature, open_tables, route, write_index
from core.data.tsv_source import TsvSource
from core.folder import FileStore
from core.storage import StoreError, open_store


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def table(store: FileStore, key: str, *rows: tuple[str, str]) -> Table:
    store.put(key, "".join(f"{name}\t{payload}\n" for name, payload in rows).encode())
    write_index(store, key)
    return Table(store, key)


def png(colour: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, 0, 0)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_rows_behind_letters_of_several_bytes_are_found(store: FileStore) -> None:
    found = table(store, "a.tsv", ("ключ", "größe ☕"), ("b", "two"))
    assert store.get("a.lineidx") == b"0\n21\n"
    assert [found.pair(i) for i in range(len(found))] == [("ключ", "größe ☕"), ("b", "two")]


def test_an_index_of_characters_is_refused_with_the_way_to_mend_it(store: FileStore) -> None:
    table(store, "a.tsv", ("ключ", "größe"), ("b", "two"))
    store.put("a.lineidx", b"0\n11\n")
    opened = Table(store, "a.tsv")
    for row in range(2):
        with pytest.raises(DataError, match=r"a\.lineidx: does not match its table.*write_index"):
            opened.pair(row)


@pytest.mark.parametrize("index", [b"0\n5\n500\n", b"5\n0\n", b"1\n", b"", b"0\n0\n"])
def test_an_index_that_cannot_be_the_tables_is_refused_when_it_is_opened(store: FileStore, index: bytes) -> None:
    table(store, "a.tsv", ("a", "b"), ("c", "d"))
    store.put("a.lineidx", index)
    with pytest.raises(DataError, match="does not match its table"):
        Table(store, "a.tsv")


def test_a_table_without_index_or_with_a_broken_one_says_so(store: FileStore) -> None:
    store.put("a.tsv", b"a\tb\n")
    with pytest.raises(DataError, match=r"a\.lineidx: missing"):
        Table(store, "a.tsv")
    store.put("a.lineidx", b"zero\n")
    with pytest.raises(DataError, match="one decimal number a line"):
        Table(store, "a.tsv")


def test_text_in_another_encoding_is_an_error_that_names_the_row(store: FileStore) -> None:
    store.put("a.tsv", b"a\tfine\nb\tcaf\xe9\n")
    write_index(store, "a.tsv")
    opened = Table(store, "a.tsv")
    assert opened.pair(0) == ("a", "fine")
    with pytest.raises(DataError, match=r"a\.tsv: row 1 is not UTF-8"):
        opened.pair(1)


def test_a_list_of_rows_exposes_them_in_order_and_may_repeat_them(store: FileStore) -> None:
    table(store, "a.tsv", ("a", "0"), ("b", "1"), ("c", "2"))
    store.put("a.linelist", b"2\n0\n2\n")
    found = Tables([Table(store, "a.tsv")])
    assert [found.pair(i)[1] for i in range(len(found))] == ["0", "2", "2"]
    store.put("a.linelist", b"3\n")
    with pytest.raises(DataError, match="outside of the table's 3"):
        Table(store, "a.tsv")


def test_tables_are_numbered_through_and_survive_pickling(store: FileStore) -> None:
    parts = [table(store, "a.tsv", ("a", "0"), ("b", "1")), table(store, "b.tsv", ("c", "2"))]
    found = Tables(parts)
    assert found.pair(2) == ("c", "2")
    assert pickle.loads(pickle.dumps(found)).pair(1) == ("b", "1")
    with pytest.raises(IndexError):
        found.pair(3)


def test_base_names_decide_what_a_table_holds() -> None:
    found = route(["text/image_1.tsv", "image/text_1.feat.tsv", "", "labels.tsv", "/x/image-text_2.tsv"], "root")
    assert found["image"] == ["/x/image-text_2.tsv", "root/text/image_1.tsv"]
    assert found["text"] == ["/x/image-text_2.tsv"]
    assert found["text_feat"] == ["root/image/text_1.feat.tsv"]
    assert found["image_feat"] == []


def test_a_folder_of_tables_is_a_source_of_images(store: FileStore) -> None:
    table(store, "tsv/image_00.tsv", ("red", png(200)), ("broken", "bm90IGEgcGljdHVyZQ=="), ("none", "***"))
    source = open_source(f"file://{store.root}")
    assert isinstance(source, TsvSource)
    assert (len(source), source.classes, source.read(0).key, source.label(0)) == (3, [], "red", -1)
    data = source.read(0).data
    assert to_tensor(data)[0].unique().tolist() == [200]
    for broken in (1, 2):
        assert np.unique(source.picture(broken).reshape(-1, 3), axis=0).tolist() == [[122, 116, 104]]
        assert source.picture(broken).shape == (256, 256, 3)


def test_a_list_in_a_bucket_names_no_file_of_this_machine(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "secret.tsv").write_text("key\tsecret\n")
    (tmp_path / "secret.lineidx").write_text("0\n")
    theirs = open_store(bucket)
    theirs.put("image.list", f"{tmp_path}/secret.tsv\n".encode())
    with pytest.raises(DataError, match="a file of this machine; name tables of the bucket"):
        open_tables(theirs, "image")
    theirs.put("image.list", b"../secret.tsv\n")
    with pytest.raises(StoreError, match="is no key"):
        open_tables(theirs, "image")


def test_a_folder_with_pictures_stays_a_folder_of_pictures(store: FileStore) -> None:
    table(store, "notes_text_.tsv", ("a", "b"))
    store.put("red/1.png", base64.b64decode(png(3)))
    assert open_source(f"file://{store.root}").classes == ["red"]
    assert open_tables(store, "image") is None


@pytest.mark.parametrize("payload", ["%%%", "", "AAAA"])
def test_a_payload_that_is_no_vector_is_an_error(payload: str) -> None:
    with pytest.raises(DataError, match="row 7"):
        feature(payload, "row 7")


def test_draws_reach_every_sentence_of_a_payload() -> None:
    payload = '{"captions": ["a", "b", "c"]}'
    assert [sentence(payload, draw) for draw in (0.0, 0.34, 0.67, 0.999)] == ["a", "b", "c", "c"]
    assert len(set(candidates('{"tags": ["x", "y"]}'))) == 2 * 81
    assert candidates('{"task": "classification", "class_name": "a, b+c"}')[-1] == "a b c."


def test_half_a_character_in_a_sentence_is_replaced() -> None:
    assert candidates('{"captions": ["cut \\ud83d", "whole \\ud83d\\ude00"]}') == ["cut \ufffd", "whole \U0001f600"]
    assert candidates('"\\ude00 too"') == ["\ufffd too"]


@pytest.mark.parametrize(
    "payload",
    ["null", "[]", "3", '{"captions": []}', '{"caption": null}', '{"tags": [1]}', '"my task"', "[" * 100_000,
     "[" * 500 + '"a dog"' + "]" * 500, f'"{"a" * (1 << 20)}"'],
)  # fmt: skip
def test_a_payload_without_a_sentence_is_refused(payload: str) -> None:
    with pytest.raises(CorruptText, match="no sentence in"):
        candidates(payload)
