"""The folder that keeps a store while it is not there holds others' files as well."""

from __future__ import annotations

from pathlib import Path

from core.storage import open_store
from jobs.mirror import Mirror


def test_a_store_is_found_again_as_it_was_left(tmp_path: Path) -> None:
    folder, first, second = (open_store(f"file://{tmp_path}/{name}") for name in ("mirror", "first", "second"))
    mirror = Mirror(folder, first)
    assert mirror.load() == 0
    for key in ("a", "b/c", "gone"):
        first.put(key, key.encode())
    mirror.save()
    mirror = Mirror(folder, second)
    assert mirror.load() == 3
    second.delete("gone")
    second.put("a", b"changed")
    mirror.save()
    assert {entry.key: folder.get(entry.key) for entry in folder.list()} == {"a": b"changed", "b/c": b"b/c"}


def test_what_others_put_or_changed_in_the_folder_stays(tmp_path: Path) -> None:
    folder, store = open_store(f"file://{tmp_path}/mirror"), open_store(f"file://{tmp_path}/store")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/photo").write_bytes(b"")
    for key in ("ours", "changed"):
        folder.put(key, b"")
    (tmp_path / "mirror/link").symlink_to(tmp_path / "elsewhere")
    mirror = Mirror(folder, store)
    assert mirror.load() == 2
    folder.put("theirs", b"")
    folder.put("changed", b"by somebody")
    store.delete("ours", "changed", "link/photo")
    mirror.save()
    assert {entry.key for entry in folder.list()} == {"changed", "link/photo", "theirs"}
