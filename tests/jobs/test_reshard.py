"""shards: images arrive whole, mixed, at the wanted size, and without the unreadable ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.data.source import open_source
from core.storage import open_store
from jobs import cli
from jobs.reshard import Reshard


@pytest.fixture
def many(tmp_path: Path) -> Path:
    for i in range(40):
        folder = tmp_path / "many" / ("a" if i < 20 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 40), (6 * i, 0, 0)).save(folder / f"{i:02d}.png")
    return tmp_path / "many"


def test_files_are_kept_as_they_are_with_their_labels(many: Path, root: str) -> None:
    assert cli.main(["shards", f"file://{many}", root]) == 0
    before, after = open_source(f"file://{many}"), open_source(root)
    assert after.classes == ["a", "b"]
    wanted = sorted((before.label(i), before.read(i).data) for i in range(len(before)))  # type: ignore[type-var]
    assert sorted((after.label(i), after.read(i).data) for i in range(len(after))) == wanted  # type: ignore[type-var]


def test_classes_are_mixed_in_an_order_that_is_always_the_same(many: Path) -> None:
    source = open_source(f"file://{many}")
    first, second = ([s[0] for s in Reshard(source, 0, print).samples()] for _ in range(2))
    assert first == second
    assert sorted(first) != first
    assert {key.split("/")[0] for key in first[:10]} == {"a", "b"}


def test_larger_images_are_resized_and_smaller_ones_left(photos: Path, root: str, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(photos / "cats" / "small.png")
    Image.new("L", (90, 60), 200).save(photos / "cats" / "grey.png")
    assert cli.main(["shards", f"file://{photos}", root, "--short-side", "32"]) == 0
    shards = open_source(root)
    sizes = [Image.open(io.BytesIO(bytes(shards.read(i).data))).size for i in range(len(shards))]
    assert sorted(sizes) == [(30, 20), (38, 32), (39, 32), (40, 32), (41, 32), (48, 32)]


def test_unreadable_images_are_left_out_and_named(photos: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cats" / "empty.jpg").write_bytes(b"")
    (photos / "dogs" / "cut.jpg").write_bytes((photos / "dogs" / "0.jpg").read_bytes()[:200])
    assert cli.main(["shards", f"file://{photos}", root]) == 0
    out = capsys.readouterr().out
    assert "4 images in 1 shards" in out
    assert "2 unreadable images left out" in out
    assert "cats/empty.jpg: empty file" in out
    assert f'SET="data.source={root}"' in out


def test_resizing_keeps_the_picture(tmp_path: Path, root: str) -> None:
    gradient = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (128, 1, 3))
    (tmp_path / "one").mkdir()
    Image.fromarray(gradient).save(tmp_path / "one" / "x.png")
    assert cli.main(["shards", f"file://{tmp_path}/one", root, "--short-side", "32"]) == 0
    small = np.asarray(Image.open(io.BytesIO(bytes(open_source(root).read(0).data)))).astype(int)
    assert abs(small[:, :, 0].mean(0) - np.linspace(3, 252, 32)).max() < 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SRC is not set"),
        (["/photos", "file:///x"], "SRC"),
        (["file:///x", "bucket"], "DST"),
        (["file:///x", "file:///y", "--short-side", "-1"], "SHORT_SIDE"),
        (["file:///not/there", "file:///y"], "no such folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_shards_are_not_written_over_others(photos: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(root).put("index.json", b"{}")
    assert cli.main(["shards", f"file://{photos}", root]) == 2
    assert "holds shards already" in capsys.readouterr().err
