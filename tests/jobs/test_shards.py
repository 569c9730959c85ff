"""shards: images arrive whole, mixed, at the wanted size, and without the unreadable ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from tarfile import SYMTYPE

import numpy as np
import pytest
from PIL import Image

from core.data.sole_writer import SoleWriter
from core.data.source import open_source
from core.storage import open_store
from jobs import cli
from tests.core.data.images import encode
from tests.core.data.tars import special, tar


def test_larger_images_are_resized_and_smaller_ones_left(photos: Path, root: str, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(photos / "cats" / "small.png")
    Image.new("L", (90, 60), 200).save(photos / "cats" / "grey.png")
    assert cli.main(["shards", f"file://{photos}", root, "--short", "32", "--workers", "1"]) == 0
    shards = open_source(root)
    sizes = [Image.open(io.BytesIO(bytes(shards.read(i).data))).size for i in range(len(shards))]
    assert sorted(sizes) == [(30, 20), (38, 32), (39, 32), (40, 32), (41, 32), (48, 32)]


def test_unreadable_images_are_left_out_and_named(photos: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "cats" / "empty.jpg").write_bytes(b"")
    (photos / "dogs" / "cut.jpg").write_bytes((photos / "dogs" / "0.jpg").read_bytes()[:200])
    assert cli.main(["shards", f"file://{photos}", root, "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "4 images in 1 shards" in out
    assert "2 unreadable images left out" in out
    assert f'SET="data.source={root}"' in out
    listed = [json.loads(line) for line in open_store(root).get("problems.jsonl").splitlines()]
    assert [(problem["kind"], problem["key"]) for problem in sorted(listed, key=str)] == [
        ("corrupt", "cats/empty.jpg"), ("corrupt", "dogs/cut.jpg"),
    ]  # fmt: skip


def test_resizing_keeps_the_picture(tmp_path: Path, root: str) -> None:
    gradient = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (128, 1, 3))
    (tmp_path / "one").mkdir()
    Image.fromarray(gradient).save(tmp_path / "one" / "x.png")
    assert cli.main(["shards", f"file://{tmp_path}/one", root, "--short", "32", "--workers", "1"]) == 0
    small = np.asarray(Image.open(io.BytesIO(bytes(open_source(root).read(0).data)))).astype(int)
    assert abs(small[:, :, 0].mean(0) - np.linspace(3, 252, 32)).max() < 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SRC is not set"),
        (["/photos", "file:///x"], "SRC"),
        (["file:///x", "bucket"], "DST"),
        (["file:///x", "file:///y", "--short", "-1"], "SHORT"),
        (["file:///x", "file:///y", "--quality", "101"], "QUALITY"),
        (["file:///x", "file:///y", "--workers", "-1"], "WORKERS"),
        (["file:///x", "file:///x/y"], "lies in SRC"),
        (["file:///not/there", "file:///y"], "no such folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["shards", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("way", ["photos", "photos/../photos", "link", "%70hotos"])
def test_a_target_in_the_source_is_refused_however_it_is_written(
    way: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert cli.main(["shards", f"file://{photos}", f"file://{tmp_path}/{way}/shards"]) == 2
    assert "lies in SRC" in capsys.readouterr().err
    assert not (photos / "shards").exists()


def test_shards_are_not_written_over_others(photos: Path, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(root).put("index.json", b"{}")
    assert cli.main(["shards", f"file://{photos}", root, "--workers", "1"]) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_what_is_finished_is_not_done_again_and_its_licence_is_shown(
    photos: Path, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shards", f"file://{photos}", root, "--workers", "1", "--licence", "CC BY 4.0, $(x)"]
    assert cli.main(command) == 0
    Path(root.removeprefix("file://"), "shard-000000.tar").unlink()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("licence: CC BY 4.0, $(x)") == 2
    assert json.loads(open_store(root).get("index.json"))["licence"] == "CC BY 4.0, $(x)"
    assert open_store(root).size("shard-000000.tar") is None, "not looked at again"


def test_one_split_of_tars_of_another_tool_is_rewritten(tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for split in ("train", "val"):
        images = [encode(Image.new("RGB", (40, 30), (60 * i, 0, 0)), "PNG") for i in range(3)]
        members = [pair for i, image in enumerate(images) for pair in ((f"{i}.png", image), (f"{i}.cls", str(i)))]
        open_store(f"file://{tmp_path}/in").put(f"x-{split}-0.tar", tar(*members, special("l.png", SYMTYPE, "/x")))
    command = ["shards", f"file://{tmp_path}/in", root, "--workers", "1", "--short", "15"]
    assert cli.main(command) == 2
    assert "choose one: SPLIT=train" in capsys.readouterr().err
    assert cli.main([*command, "--split", "val"]) == 0
    assert "1 files that are no sample passed over" in capsys.readouterr().out
    index = json.loads(open_store(root).get("index.json"))
    assert (index["split"], index["samples"], index["problems"]) == ("val", 3, {"skipped": 1})
    assert "link to '/x'" in open_store(root).get("problems.jsonl").decode()


def test_a_second_command_is_sent_away_while_the_first_works(
    photos: Path, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("core.data.sole_writer.BEAT_S", 0.3)
    with SoleWriter(open_store(root), print):
        assert cli.main(["shards", f"file://{photos}", root, "--workers", "1"]) == 3
    assert "writes here; wait until it has finished" in capsys.readouterr().err
    assert list(open_store(root).list()) == []
