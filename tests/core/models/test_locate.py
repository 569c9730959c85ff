from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.models.locate import digest, read_weights, record_key, weights_uri
from core.models.weights import WeightsError
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
