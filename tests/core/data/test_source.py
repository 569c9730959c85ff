import pickle
from pathlib import Path

import numpy as np
import pytest

from core.data.source import ArraySource, DataError, Source, open_source, passed_over
from core.data.subset import Merged, Repeated, of_images
from core.storage import StoreError, open_store
from tests.core.data.images import jpeg, pixels


def photos(tmp_path: Path, *names: str) -> Source:
    for i, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return open_source(f"file://{tmp_path}/photos")


def keys(source: Source) -> list[str]:
    return [source.read(i).key for i in range(len(source))]


def test_a_flat_folder_has_no_labels(tmp_path: Path):
    source = photos(tmp_path, "b.jpg", "a.jpg")
    assert keys(source) == ["a.jpg", "b.jpg"]
    assert source.classes == []
    assert [source.label(i) for i in range(2)] == [-1, -1]
    assert source.shard_sizes.tolist() == [1, 1]
    assert source.read(0).data == jpeg(1)


def test_class_folders_are_numbered_in_sorted_order(tmp_path: Path):
    source = photos(tmp_path, "dog/1.jpg", "cat/2.jpg", "dog/deep/er/3.jpg")
    assert source.classes == ["cat", "dog"]
    assert keys(source) == ["cat/2.jpg", "dog/1.jpg", "dog/deep/er/3.jpg"]
    assert [source.label(i) for i in range(3)] == [source.read(i).label for i in range(3)] == [0, 1, 1]


def test_files_outside_of_class_folders_have_no_label(tmp_path: Path):
    source = photos(tmp_path, "cat/1.jpg", "loose.jpg")
    assert [source.label(i) for i in range(2)] == [0, -1]


def test_any_case_of_suffix_and_any_name_is_read(tmp_path: Path):
    names = ["A.JPG", "b.JpEg", "c d.png", "e%20f.webp", "\u00fc.tiff"]
    source = photos(tmp_path, *names)
    assert keys(source) == sorted(names)
    assert all(source.read(i).data for i in range(5))


def test_hidden_and_other_files_are_ignored(tmp_path: Path):
    source = photos(tmp_path, "a.jpg", ".b.jpg", ".thumbs/c.jpg", "d/._e.jpg", "notes.txt", "jpg")
    assert keys(source) == ["a.jpg"]


def test_jpegs_of_any_suffix_are_read_and_files_of_no_image_s_suffix_told_by_kind(tmp_path: Path):
    names = ["a/1.jpg", "a/2.jfif", "a/3.JPE", "a/4.heic", "a/5.heic", "a/hash", ".x/6.heic"]
    source = photos(tmp_path, *names)
    assert keys(source) == ["a/1.jpg", "a/2.jfif", "a/3.JPE"]
    told = ["2 x .heic is no suffix of an image, the first a/4.heic", "1 x the name has no suffix, the first a/hash"]
    assert passed_over(source) == told
    assert passed_over(Repeated(of_images(Merged([source, source]), 1.0, 0), 20))[0].startswith("4 x .heic")


def test_a_folder_without_an_image_says_what_is_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"; 2 x .heic is no suffix of an image, the first 1.heic; give a folder"):
        photos(tmp_path, "1.heic", "2.heic")


def test_links_to_folders_are_followed(tmp_path: Path):
    photos(tmp_path, "cat/1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/feline").symlink_to(tmp_path / "photos/cat")
    source = open_source(f"file://{tmp_path}/set")
    assert keys(source) == ["feline/1.jpg"]


def test_a_folder_name_with_spaces_works(tmp_path: Path):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos/a.jpg").write_bytes(jpeg(0))
    assert len(open_source(f"file://{tmp_path}/my photos")) == 1
    assert len(open_source(f"file://{tmp_path}/my%20photos")) == 1


def test_an_empty_folder_is_explained(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/readme.txt").touch()
    with pytest.raises(DataError, match=r"photos: none of the 1 files found here is an image \(.jpg.*give a folder"):
        open_source(f"file://{tmp_path}/photos")


def test_a_missing_folder_is_explained_and_not_made(tmp_path: Path):
    with pytest.raises(DataError, match="photos: no such folder"):
        open_source(f"file://{tmp_path}/photos")
    assert not (tmp_path / "photos").exists()


def test_a_plain_path_is_answered_with_the_valid_forms(tmp_path: Path):
    with pytest.raises(StoreError, match="file://"):
        open_source(str(tmp_path))


def test_a_file_deleted_after_listing_reads_as_empty(tmp_path: Path):
    source = photos(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "photos/a.jpg").unlink()
    assert source.read(0).data == b""
    assert source.read(0).key == "a.jpg"


def test_a_prefix_of_a_bucket_is_a_folder(bucket: str):
    store = open_store(bucket)
    for i, key in enumerate(["set/cat/1.JPG", "set/dog/2.png", "set/.cache/3.png", "other/4.png"]):
        store.put(key, jpeg(i))
    source = open_source(f"{bucket}/set")
    assert keys(source) == ["cat/1.JPG", "dog/2.png"]
    assert source.classes == ["cat", "dog"]
    assert pickle.loads(pickle.dumps(source)).read(1).data == jpeg(1)


def test_an_empty_prefix_is_explained(bucket: str):
    with pytest.raises(DataError, match="nothing: none of the 0 files"):
        open_source(f"{bucket}/nothing")


def test_arrays_are_a_source():
    images = [pixels(0), pixels(1, 10, 12)[..., 0]]
    source = ArraySource(images, [1, 0], ["cat", "dog"])
    assert len(source) == 2
    assert source.read(1).label == source.label(1) == 0
    np.testing.assert_array_equal(source.read(0).data, images[0])
    assert ArraySource(np.zeros((3, 8, 8), np.uint8)).label(2) == -1


def test_arrays_need_one_label_per_image():
    with pytest.raises(DataError, match="3 images but 2 labels"):
        ArraySource(np.zeros((3, 8, 8), np.uint8), [0, 1])
