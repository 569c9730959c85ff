from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.models.locate import digest, outline, read_weights, record_key, recorded_digest, use_weights, weights_uri
from core.models.weights import WeightsError, load_strict
from core.storage import MissingObject, StoreError, open_store

ROOT = "s3://bucket/place"
NO_RECORD = ""


@pytest.mark.parametrize(
    ("weights", "uri"),
    [
        ("hub", f"{ROOT}/weights/timm--vit_small/model.safetensors"),
        ("hub:timm/vit_small.dino", f"{ROOT}/weights/timm--vit_small.dino/model.safetensors"),
        ("run:demo-0123456789", f"{ROOT}/runs/demo-0123456789/export/model.safetensors"),
        ("store:weights/x.pth", f"{ROOT}/weights/x.pth"),
        ("file:///x/y.pth", "file:///x/y.pth"),
        ("s3://other/y.safetensors", "s3://other/y.safetensors"),
    ],
)
def test_every_way_of_naming_weights_has_one_address(weights: str, uri: str) -> None:
    assert weights_uri(weights, "vit_small", ROOT) == uri


def test_both_kinds_of_files_are_read_from_any_store_with_their_digest(store_uri: str, tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        open_store(store_uri).put_file(f"weights/{name}", tmp_path / name)
        found = read_weights(f"store:weights/{name}", "any", store_uri)
        assert all(found[k].equal(v) for k, v in state.items())
        want = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert digest(f"store:weights/{name}", "any", store_uri) == want


def test_a_file_directly_below_the_root_folder_is_a_file_like_any_other() -> None:
    with pytest.raises(MissingObject, match="file:///no-such-weights.pth does not exist"):
        read_weights("file:///no-such-weights.pth", "any", NO_RECORD)


def test_weights_that_are_not_there_or_no_file_are_told_by_address(tmp_path: Path) -> None:
    with pytest.raises(MissingObject, match="x.pth"):
        read_weights(f"file://{tmp_path}/x.pth", "any", NO_RECORD)
    with pytest.raises(WeightsError, match="not the address of a file"):
        read_weights("file:///folder/", "any", ROOT)
    with pytest.raises(StoreError, match="'/tmp/x.pth' has no scheme: write file:///tmp/x.pth"):
        read_weights("/tmp/x.pth", "any", ROOT)
    with pytest.raises(StoreError, match="is no store"):
        read_weights("ftp://x/weights.pth", "any", NO_RECORD)


class Sneaky:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("made-by-a-weight-file",)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Sneaky()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="only plain data is read"):
        read_weights(f"file://{tmp_path}/x.pth", "any", NO_RECORD)
    assert not (tmp_path / "made-by-a-weight-file").exists()


@pytest.mark.parametrize("weights", ["store:weights/x.pth", "file://{}/x.pth"])
def test_the_hash_is_recorded_at_the_first_use_and_other_bytes_are_refused_later(
    weights: str, store_uri: str, tmp_path: Path
) -> None:
    weights = weights.format(tmp_path)

    def write(value: float) -> None:
        torch.save({"a": torch.full((3,), value)}, tmp_path / "x.pth")
        open_store(store_uri).put_file("weights/x.pth", tmp_path / "x.pth")

    write(1.0)
    first = digest(weights, "any", store_uri)
    key = record_key(weights_uri(weights, "any", store_uri), store_uri)
    assert open_store(store_uri).get(key).decode().split()[0] == first
    assert key.startswith("weights/x.pth.sha256" if weights.startswith("store:") else "weights/sha256/")
    read_weights(weights, "any", store_uri)
    write(2.0)
    with pytest.raises(WeightsError, match=f"not the file of its first use: .* recorded was {first}.* remove the"):
        read_weights(weights, "any", store_uri)
    open_store(store_uri).delete(key)
    assert read_weights(weights, "any", store_uri)["a"].equal(torch.full((3,), 2.0))


def test_a_file_that_is_no_weights_leaves_no_record_and_the_real_one_is_taken_later(
    store_uri: str, tmp_path: Path
) -> None:
    weights = f"file://{tmp_path}/x.safetensors"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 346000000\n"
    for nothing in (pointer.encode(), b"\x07" * 400):
        (tmp_path / "x.safetensors").write_bytes(nothing)
        for read in (read_weights, digest, recorded_digest):
            with pytest.raises(WeightsError, match=f"^{weights}: (a Git LFS pointer|damaged)") as caught:
                read(weights, "any", store_uri)
            assert "retort-weights-" not in str(caught.value), "a temporary file's name, which is gone by now"
    torch.save({"epoch": 3}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="x.safetensors: no weights found"):
        digest(weights, "any", store_uri)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert read_weights(weights, "any", store_uri)["a"].equal(torch.ones(2))


def test_weights_of_another_network_leave_no_record_either(tmp_path: Path) -> None:
    root, weights = f"file://{tmp_path}", "store:x.safetensors"

    def use(name: str, size: int) -> None:
        save_file({name: torch.ones(size)}, tmp_path / "x.safetensors")
        use_weights(weights, "any", root, partial(load_strict, torch.nn.PReLU()))

    for name, size in (("w", 1), ("weight", 2)):
        with pytest.raises(WeightsError, match=f"^{root}/x.safetensors: weights .* do not fit PReLU"):
            use(name, size)
    use("weight", 1)
    assert recorded_digest(weights, "any", root) == digest(weights, "any", root)


def sharded(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Two files and their index, as the hub has large weights."""
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_weights_in_several_files_are_read_by_their_index_and_held_to_their_first_use(
    store_uri: str, tmp_path: Path
) -> None:
    state = {f"blocks.{i}": torch.full((2,), float(i)) for i in range(5)}

    def put() -> None:
        sharded(tmp_path, state)
        for path in tmp_path.glob("model*"):
            open_store(store_uri).put_file(f"w/{path.name}", path)

    put()
    weights = "store:w/model.safetensors.index.json"
    found = read_weights(weights, "any", store_uri)
    assert found.keys() == state.keys()
    assert all(found[key].equal(value) for key, value in state.items())
    shapes = outline(weights_uri(weights, "any", store_uri))
    assert {key: value.shape for key, value in shapes.items()} == {key: value.shape for key, value in state.items()}
    state["blocks.3"] = torch.zeros(2)
    put()
    with pytest.raises(WeightsError, match="not the file of its first use"):
        read_weights(weights, "any", store_uri)
    open_store(store_uri).delete("w/model-00002-of-00002.safetensors")
    for read in (lambda: read_weights(weights, "any", store_uri), lambda: outline(weights_uri(weights, "", store_uri))):
        with pytest.raises((MissingObject, WeightsError), match="model-00002-of-00002.safetensors"):
            read()


def test_one_of_several_files_is_called_so(tmp_path: Path) -> None:
    sharded(tmp_path, {"weight": torch.ones(1), "bias": torch.ones(1)})
    weights = f"file://{tmp_path}/model-00002-of-00002.safetensors"
    with pytest.raises(WeightsError, match=r"one of several files: name their index, model.safetensors.index.json$"):
        use_weights(weights, "any", NO_RECORD, partial(load_strict, torch.nn.PReLU()))


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    for name in ("../secret.safetensors", f"{tmp_path}/secret.safetensors"):
        (tmp_path / "w" / "x.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        for read in (lambda uri: read_weights(uri, "any", NO_RECORD), outline):
            with pytest.raises(StoreError, match="is no key"):
                read(f"file://{tmp_path}/w/x.index.json")
