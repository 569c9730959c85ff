"""What make shards writes, read by the webdataset package itself, and what that package writes, read by us."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from core.data.originals import open_original
from core.data.reshard import Reshard, Settings
from core.data.source import open_source
from core.folder import FileStore
from tests.core.data.images import jpeg

pytestmark = pytest.mark.usefixtures("scans")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two tars written by webdataset: ten images with labels, the even ones with captions."""
    (tmp_path / "foreign").mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"foreign/x-{number}.tar")) as sink:
            for i in range(5 * number, 5 * number + 5):
                text = {"txt": f"größe {i}"} if i % 2 == 0 else {}
                sink.write({"__key__": f"n0{i % 3}/img{i}", "jpg": jpeg(i), "cls": i % 3, **text})
    return tmp_path / "foreign"


def shards(source: Path, target: Path, short: int = 0) -> list[str]:
    settings = Settings(short, shard_bytes=8_000)
    Reshard(open_original(f"file://{source}"), settings, print, 1).write(FileStore(target))
    return sorted(str(path) for path in target.glob("*.tar"))


def by_webdataset(tars: list[str]) -> list[dict[str, object]]:
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


def test_webdataset_reads_the_very_samples_that_we_read(foreign: Path, tmp_path: Path) -> None:
    tars = shards(foreign, tmp_path / "out")
    assert len(tars) > 1
    theirs, ours = by_webdataset(tars), open_source(f"file://{tmp_path}/out")
    assert len(theirs) == len(ours) == 10
    for i, sample in enumerate(theirs):
        assert sample["jpg"] == ours.read(i).data
        assert int(sample["cls"]) == ours.label(i)  # type: ignore[call-overload]
        assert bytes(sample.get("txt", b"")).decode() == ours.text(i)  # type: ignore[call-overload]


def test_nothing_is_lost_or_mistaken_on_the_way(foreign: Path, tmp_path: Path) -> None:
    theirs = {str(sample["__key__"]): sample for sample in by_webdataset(shards(foreign, tmp_path / "out"))}
    assert sorted(theirs) == sorted(f"n0{i % 3}/img{i}" for i in range(10))
    for i in range(10):
        sample = theirs[f"n0{i % 3}/img{i}"]
        assert sample["jpg"] == jpeg(i)
        assert sample["cls"] == str(i % 3).encode()
        assert sample.get("txt", b"") == (f"größe {i}".encode() if i % 2 == 0 else b"")


def test_resized_shards_decode_by_webdatasets_own_decoder(foreign: Path, tmp_path: Path) -> None:
    tars = shards(foreign, tmp_path / "out", short=12)
    decoded = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("jpg", "cls")
    for image, label in decoded:
        assert image.shape == (12, 16, 3)
        assert label in (0, 1, 2)


def test_names_with_dots_are_one_sample_each(tmp_path: Path) -> None:
    for i, name in enumerate(("a.b/x.1", "a.b/x.2", "a.b/x")):
        FileStore(tmp_path / "in").put(f"{name}.jpg", jpeg(i))
    samples = by_webdataset(shards(tmp_path / "in", tmp_path / "out"))
    assert sorted(bytes(s["jpg"]) for s in samples) == sorted(jpeg(i) for i in range(3))  # type: ignore[call-overload]
    assert all(set(sample) >= {"jpg", "cls"} for sample in samples)


def test_pixels_of_kept_files_are_untouched(foreign: Path, tmp_path: Path) -> None:
    sample = by_webdataset(shards(foreign, tmp_path / "out", short=500))[0]
    number = int(str(sample["__key__"]).partition("img")[2])
    theirs, before = (np.asarray(Image.open(io.BytesIO(data))) for data in (bytes(sample["jpg"]), jpeg(number)))  # type: ignore[call-overload]
    np.testing.assert_array_equal(theirs, before)
