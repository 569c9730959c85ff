"""Rewriting into shards: always the same result, with any number of workers and wherever it was interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data import reshard
from core.data.originals import open_original
from core.data.reshard import Reshard, Settings, mixed, summary
from core.data.source import ArraySource, DataError, Raw, Source, open_source
from core.data.subset import Merged
from core.folder import FileStore
from core.storage import open_store
from tests.core.data.images import encode, jpeg, pixels
from tests.core.data.tars import labelled

SMALL = Settings(shard_bytes=12_000)
DEEP = np.full((9, 9), 4095, np.uint16)  # white of 12 bits, in 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words at once, and writers that are soon taken for dead."""
    monkeypatch.setattr(reshard, "SAY_EVERY_S", 0.0)
    monkeypatch.setattr("core.data.sole_writer.BEAT_S", 0.3)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images in two classes, of which two are the same and one is broken."""
    root = tmp_path_factory.mktemp("many")
    for i in range(40):
        folder = root / ("a" if i < 20 else "b")
        folder.mkdir(exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    (root / "b/copy.jpg").write_bytes(jpeg(7))
    (root / "a/broken.jpg").write_bytes(jpeg(8)[:100])
    return root


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that rewriting `many` in one go by one worker gives."""
    root = tmp_path_factory.mktemp("whole")
    write(open_source(f"file://{many}"), root)
    return files(root)


def write(source: Source, root: Path, settings: Settings = SMALL, workers: int = 1) -> dict[str, object]:
    return Reshard(source, settings, lambda text: None, workers).write(FileStore(root))


def files(root: Path) -> dict[str, bytes]:
    return {entry.key: (root / entry.key).read_bytes() for entry in FileStore(root).list()}


def test_all_readable_files_are_kept_as_they_are_with_their_labels(many: Path, tmp_path: Path) -> None:
    index = write(open_source(f"file://{many}"), tmp_path)
    before, after = open_source(f"file://{many}"), open_source(f"file://{tmp_path}")
    assert after.classes == ["a", "b"]
    wanted = [(before.label(i), before.read(i).data) for i in range(len(before))]
    wanted.remove((0, jpeg(8)[:100]))
    assert sorted((after.label(i), after.read(i).data) for i in range(len(after))) == sorted(wanted)  # type: ignore[type-var]
    assert index["samples"] == 41
    assert len(after.shard_sizes) > 2


def test_nothing_but_shards_index_and_problems_is_left_behind(whole: dict[str, bytes]) -> None:
    assert sorted(whole)[:2] == ["index.json", "problems.jsonl"]
    assert all(name.startswith("shard-") for name in sorted(whole)[2:])
    index = json.loads(whole["index.json"])
    assert index["problems"] == {"corrupt": 1, "duplicate": 1}
    assert index["made"]["source"]


def test_problems_name_the_file_and_what_is_the_matter(whole: dict[str, bytes]) -> None:
    corrupt, duplicate = (json.loads(line) for line in whole["problems.jsonl"].splitlines())
    assert corrupt["kind"] == "corrupt"
    assert corrupt["key"] == "a/broken.jpg"
    assert corrupt["reason"]
    assert {duplicate["key"], duplicate["of"]} == {"a/07.jpg", "b/copy.jpg"}
    assert duplicate["reason"].startswith("same content, labels ")


def test_black_images_are_kept_and_counted_and_those_of_no_known_range_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, image in (("a", np.full((9, 9), 7, np.uint8)), ("b", np.zeros((9, 9), np.uint8)), ("c", DEEP)):
        Image.fromarray(image).save(tmp_path / f"in/{name}.png")
    index = write(open_source(f"file://{tmp_path}/in"), tmp_path / "out")
    assert (index["samples"], index["problems"]) == (2, {"black": 1, "corrupt": 1})
    assert "1 wholly black images, which are kept" in summary(index)


def test_classes_are_mixed(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in whole.items():
        FileStore(tmp_path).put(name, data)
    source = open_source(f"file://{tmp_path}")
    assert {source.label(i) for i in range(6)} == {0, 1}


def test_the_number_of_workers_does_not_matter(many: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    write(open_source(f"file://{many}"), tmp_path, workers=2)
    assert files(tmp_path) == whole


KILLED = """
import sys
from core.data import reshard, sole_writer
from core.data.source import open_source
from core.storage import open_store
reshard.CHUNK = 4
sole_writer.BEAT_S = 0.3
slow = lambda batch, limit: (__import__("time").sleep(0.3) or part for part in real(batch, limit))
real, reshard.batched = reshard.batched, slow
settings = reshard.Settings(shard_bytes=12_000)
reshard.Reshard(open_source(sys.argv[1]), settings, print, 1).write(open_store(sys.argv[2]))
"""


def test_a_killed_rewriting_goes_on_where_it_was_with_the_same_result(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, f"file://{many}", f"file://{tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "parts/000000.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = list((tmp_path / "parts").glob("*.json"))
    assert 0 < len(finished) < len(whole) // 2 - 1, "killed half way"
    kept = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    said: list[str] = []
    Reshard(open_source(f"file://{many}"), SMALL, said.append, 1).write(FileStore(tmp_path))
    assert files(tmp_path) == whole
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == kept, "not done again"
    assert any("going on behind" in text for text in said)


class Failing(ArraySource):
    """Breaks off at one sample, once."""

    def __init__(self, at: int) -> None:
        super().__init__([pixels(i) for i in range(40)], [i % 2 for i in range(40)], ["a", "b"])
        self.at = at

    def read(self, i: int) -> Raw:
        if i == self.at:
            raise KeyboardInterrupt
        return super().read(i)


@pytest.mark.parametrize("at", [0, 17, 39])
def test_an_interruption_anywhere_changes_nothing(tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard, "CHUNK", 4)
    with pytest.raises(KeyboardInterrupt):
        write(Failing(at), tmp_path / "broken")
    write(Failing(-1), tmp_path / "broken")
    write(Failing(-1), tmp_path / "whole")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_another_source_or_setting_is_refused_with_both_fingerprints(tmp_path: Path, finished: bool) -> None:
    first = Failing(-1 if finished else 39)
    if finished:
        write(first, tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            write(first, tmp_path)
    other = ArraySource(first.images, [0] * 40, ["a", "b"])
    with pytest.raises(DataError, match=f"{first.fingerprint()}.*{other.fingerprint()}"):
        write(other, tmp_path)
    with pytest.raises(DataError, match="quality 90, this command has quality 80"):
        write(first, tmp_path, Settings(quality=80, shard_bytes=12_000))


def test_a_store_in_a_bucket_works_the_same(many: Path, whole: dict[str, bytes], bucket: str) -> None:
    store = open_store(bucket)
    Reshard(open_source(f"file://{many}"), SMALL, print, 1).write(store)
    assert {entry.key: store.get(entry.key) for entry in store.list()} == whole


def test_progress_comes_with_rate_and_time_left(many: Path, tmp_path: Path) -> None:
    said: list[str] = []
    Reshard(open_source(f"file://{many}"), SMALL, said.append, 1).write(FileStore(tmp_path))
    assert re.fullmatch(r"42/42 images, \d+ img/s, 0\.0 min left", said[-1])


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    FileStore(tmp_path / "in").put("a.jpg", b"no picture")
    with pytest.raises(DataError, match="no samples to write"):
        write(open_source(f"file://{tmp_path}/in"), tmp_path / "out")


def test_images_over_the_pixel_bound_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.data.decode.MAX_PIXELS", 500)
    for name, side in (("small", 20), ("large", 40)):
        FileStore(tmp_path / "in").put(f"{name}.png", encode(pixels(0, side, side), "PNG"))
    assert write(open_source(f"file://{tmp_path}/in"), tmp_path / "out")["problems"] == {"corrupt": 1}
    (line,) = (tmp_path / "out/problems.jsonl").read_text().splitlines()
    assert "40 x 40 pixels are more than 500" in json.loads(line)["reason"]


@pytest.mark.parametrize(
    ("size", "short", "reason"),
    [((1, 600), 0, "600 x 1: over 500 times as long as wide"),
     ((5, 2000), 4, ""), ((300, 1600), 256, "1600 x 300 with 256 pixels across is longer than the 1000 of a JPEG")],
)  # fmt: skip
def test_strips_that_nothing_can_be_made_of_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], short: int, reason: str
) -> None:
    monkeypatch.setattr("core.data.convert.LONGEST", 1000 if short == 256 else 65500)
    for name, (height, width) in (("usual", (20, 20)), ("strip", size)):
        FileStore(tmp_path / "in").put(f"{name}.png", encode(pixels(0, height, width), "PNG"))
    index = write(open_source(f"file://{tmp_path}/in"), tmp_path / "out", Settings(short=short))
    assert index["problems"] == ({"corrupt": 1} if reason else {})
    assert reason in (tmp_path / "out/problems.jsonl").read_text()


def test_what_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    for i in range(3):
        store.put(f"shard-{i:06d}.tar", labelled([jpeg(i)]))
    before = files(tmp_path)
    source = open_original(f"file://{tmp_path}/shard-000000.tar")
    with pytest.raises(DataError, match=r"holds shard-000000.tar, which would be written over; choose another place"):
        write(source, tmp_path)
    assert files(tmp_path) == before
    FileStore(tmp_path / "out").put("parts/000000.json", b"{}")  # what rm leaves of one that was begun
    with pytest.raises(DataError, match=r"holds parts/000000.json"):
        write(source, tmp_path / "out")


def test_copies_are_told_with_the_first_of_them_however_many_shards_apart(tmp_path: Path) -> None:
    for i in range(12):
        FileStore(tmp_path / "in").put(f"{i:02d}.jpg", jpeg(i % 4))
    write(open_source(f"file://{tmp_path}/in"), tmp_path / "out", Settings(shard_bytes=3000))
    found = [json.loads(line) for line in (tmp_path / "out/problems.jsonl").read_text().splitlines()]
    assert len(found) == 8
    assert all(int(each["key"][:2]) % 4 == int(each["of"][:2]) % 4 and each["key"] != each["of"] for each in found)
    assert len({each["of"] for each in found}) == 4


def test_samples_of_one_name_get_keys_of_their_own(tmp_path: Path) -> None:
    for i, suffix in enumerate(("jpg", "jpeg", "JPG")):
        FileStore(tmp_path / "in").put(f"x.{suffix}", jpeg(i))
    write(open_source(f"file://{tmp_path}/in"), tmp_path / "out")
    names = subprocess.run(["tar", "tf", tmp_path / "out/shard-000000.tar"], capture_output=True, text=True).stdout
    assert sorted(names.split()) == ["x-1.jpg", "x-2.jpg", "x.jpg"]


class Lines(Source):
    """Only sizes: for the order."""

    def __init__(self, sizes: list[int], run: int) -> None:
        self.shard_sizes, self.classes, self.run = np.array(sizes), [], run

    def read(self, i: int) -> Raw:
        raise NotImplementedError

    label = fingerprint = read  # type: ignore[assignment]


@pytest.mark.parametrize(("sizes", "run"), [([1] * 30, 1), ([10, 1, 7, 16], 4), ([5], 64), ([4, 8], 4)])
def test_every_sample_comes_once_in_runs_that_never_cross_a_shard(sizes: list[int], run: int) -> None:
    order, ends = mixed(Lines(sizes, run))
    assert sorted(order) == list(range(sum(sizes)))
    shard = np.repeat(np.arange(len(sizes)), sizes)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        piece = order[start:end]
        assert len(set(shard[piece])) == 1
        assert (np.diff(piece) == 1).all()
        assert len(piece) <= run


def test_merged_sources_can_be_rewritten(tmp_path: Path) -> None:
    one = ArraySource([pixels(0)], [0], ["a"])
    assert write(Merged([one, one]), tmp_path)["problems"] == {"duplicate": 1}
