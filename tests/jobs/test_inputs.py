"""What is missing: hub weights, data, stores; and what is not missing because something provides it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from core.prepare import digits
from core.recipe import Data, Evaluate, Launch, Recipe, Student, Teacher
from core.storage import open_store
from jobs import doctor, hub, inputs
from jobs.errors import NotReady, UserError
from jobs.record import Run, State
from tests.quirky import Quirky

ID = "timm/vit_tiny_patch16_224"


def recipe(photos: Path, **fields: object) -> Recipe:
    given = {"data": Data(source=f"file://{photos}"), "launch": Launch(device="cpu"), **fields}
    return Recipe(name="x", **given)  # type: ignore[arg-type]


def hub_recipe(photos: Path) -> Recipe:
    return recipe(photos, teachers={"t": Teacher(name="vit_tiny_patch16_224", weights="hub")})


def whats(chosen: Recipe, root: str) -> list[str]:
    return [lack.what for lack in inputs.missing(chosen, root, gpus=0)]


def test_a_folder_of_images_and_a_store_are_enough(photos: Path, root: str) -> None:
    assert whats(recipe(photos), root) == []
    inputs.require(recipe(photos), root, gpus=0)


def test_the_check_of_a_store_leaves_nothing_behind(root: str) -> None:
    assert inputs.check_store(root) is None
    assert list(open_store(root).list()) == []


def test_a_store_without_conditional_puts_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrites(self: object, key: str, data: bytes) -> bool:
        self.put(key, data)  # type: ignore[attr-defined]
        return True

    monkeypatch.setattr("core.folder.FileStore.put_if_absent", overwrites)
    lack = inputs.check_store(root)
    assert lack is not None
    assert "conditional" in lack.what


def test_the_check_of_a_bucket_tries_what_servers_lack_and_leaves_nothing_behind(quirky: Quirky) -> None:
    server = quirky()
    assert inputs.check_store("s3://bucket/p") is None
    assert server.objects == {}


@pytest.mark.parametrize(
    ("quirk", "words"),
    [("no token", "cuts a listing off"), ("same token", "cuts a listing off"), ("no time", "lists objects without"),
     ("no etag", "without ETag"), ("new etag", "ETag differs"), ("no conditions", "conditional puts"),
     ("no conditions, 400", "conditional puts"), ("ignores conditions", "conditional puts"),
     ("no range", "ignores Range"), ("other range", "ignores Range"), ("no total", "ignores Range")],
)  # fmt: skip
def test_doctor_tells_each_of_them(quirky: Quirky, quirk: str, words: str) -> None:
    server = quirky(quirk)
    found = doctor.store("s3://bucket/p")
    assert words in found.text
    assert "another" in found.fix
    assert server.objects == {}


def test_an_empty_folder_is_no_data(tmp_path: Path, root: str) -> None:
    (tmp_path / "empty").mkdir()
    assert "nothing lies under" in whats(recipe(tmp_path / "empty"), root)[0]


def test_escapes_of_a_uri_are_decoded_as_by_every_other_verb(tmp_path: Path, photos: Path, root: str) -> None:
    blank = tmp_path / "my photos"
    photos.rename(blank)
    (blank / "my weights").write_bytes(b"x")
    for uri in (blank.as_uri(), f"file://{blank}"):
        weights = Teacher(name="vit_tiny_patch16_224", weights=f"{uri}/my%20weights")
        assert whats(recipe(photos, data=Data(source=uri), teachers={"t": weights}), root) == []
    assert "there is no folder" in whats(recipe(photos, data=Data(source=f"{blank.as_uri()}%20x")), root)[0]


def test_data_in_a_bucket_are_looked_for_there(photos: Path, bucket: str) -> None:
    chosen = recipe(photos, data=Data(source=f"{bucket}/images"))
    assert "nothing lies under" in whats(chosen, bucket)[0]
    open_store(f"{bucket}/images").put("a.jpg", b"x")
    assert whats(chosen, bucket) == []


def test_one_thing_missing_is_counted_as_one(photos: Path, root: str) -> None:
    with pytest.raises(NotReady, match="1 thing is missing"):
        inputs.require(hub_recipe(photos), root, gpus=0)


def test_staged_hub_weights_are_there(photos: Path, root: str) -> None:
    assert "HF_HUB_OFFLINE" in whats(hub_recipe(photos), root)[0]
    open_store(root).put("weights/timm--vit_tiny_patch16_224/model.safetensors", b"x")
    assert whats(hub_recipe(photos), root) == []


def cached_weights(tmp_path: Path) -> None:
    """The hub's cache as its own client leaves it."""
    repository = tmp_path / "hub" / "models--timm--vit_tiny_patch16_224"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")


def test_weights_in_the_hub_cache_are_staged_into_the_store(
    photos: Path, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached_weights(tmp_path)
    assert whats(hub_recipe(photos), root) == []
    said: list[str] = []
    hub.stage(hub_recipe(photos), root, said.append)
    hub.stage(hub_recipe(photos), root, said.append)
    assert open_store(root).get(hub.staged_key(ID)) == b"weights"
    assert len(said) == 1


def test_a_hub_that_does_not_answer_is_said_within_seconds(
    photos: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{filename}"
    )
    assert "the hub does not answer" in whats(hub_recipe(photos), root)[0]


@pytest.mark.parametrize(
    ("weights", "found"),
    [("hub", ID), ("hub:someone/model", "someone/model"), ("random", ""), ("file:///x", ""), ("store:hub", "")],
)
def test_hub_ids(weights: str, found: str) -> None:
    assert hub.hub_id("vit_tiny_patch16_224", weights) == found


def test_the_student_of_an_earlier_run_must_be_exported(photos: Path, root: str, new_run: Callable[..., Run]) -> None:
    chosen = recipe(photos, student=Student(weights="run:demo-1"))
    assert "is not in" in whats(chosen, root)[0]
    run = new_run("demo-1")
    run.move(State.QUEUED, 1)
    assert "is queued" in whats(chosen, root)[0]
    run.move(State.RUNNING)
    run.move(State.SUCCEEDED)
    assert "not exported" in whats(chosen, root)[0]
    run.store.put("export/model.safetensors", b"x")
    assert whats(chosen, root) == []


def test_what_the_preparation_makes_is_not_missing(photos: Path, root: str) -> None:
    made = digits.provides(Recipe())
    data = next(uri for uri in made if "data/" in uri)
    weights = next(uri for uri in made if "teachers/" in uri)
    fields = {
        "data": Data(source=data, heldout=data), "evaluate": Evaluate(train=data, test=data),
        "teachers": {"t": Teacher(name="vit_tiny_patch16_224", weights=weights)},
    }  # fmt: skip
    assert whats(recipe(photos, prepare="digits", **fields), root) == []
    assert len(whats(recipe(photos, **fields), root)) == 5


def test_an_unknown_preparation_is_a_user_error(photos: Path, root: str) -> None:
    with pytest.raises(UserError, match="did you mean digits"):
        inputs.provided(recipe(photos, prepare="digit"))
    with pytest.raises(UserError, match="unknown"):
        inputs.provided(recipe(photos, prepare="../evil"))


def test_gpus_are_asked_for_only_when_they_are_named(photos: Path, root: str) -> None:
    wants = recipe(photos, launch=Launch(device="cuda", ranks=4))
    assert "cuda needs 4 GPUs, this machine shows 2" in inputs.missing(wants, root, gpus=2)[0].what
    assert inputs.missing(wants, root, gpus=4) == []
    assert whats(recipe(photos, launch=Launch(device="auto")), root) == []
