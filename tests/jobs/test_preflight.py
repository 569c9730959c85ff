"""Weights that do not fit are refused before anything is queued, and every verb says the same of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.config import load
from core.recipe import Recipe
from core.registry import complete
from core.storage import open_store
from jobs import cli, hub, inputs, preflight
from jobs.errors import NOT_READY, USER, NotReady
from jobs.record import Run

ARGS = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 2, "num_classes": 0}
FIELDS = ("teachers.big.weights", "student.weights")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Of the networks of `tiny_recipe`, at their own image size."""
    return timm.create_model("vit_tiny_patch16_224", **ARGS).state_dict()


def given(path: Path, *sets: str, **weights: str) -> Recipe:
    return complete(load(str(path), None, [*sets, *(f"{k.replace('__', '.')}={v}" for k, v in weights.items())]))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("verb", ["submit", "dry", "plan", "json", "doctor"])
def test_every_verb_refuses_weights_that_do_not_fit(
    verb: str, field: str, tiny_recipe: Path, root: str, tmp_path: Path, state: dict[str, Tensor],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("jobs.doctor.collective", lambda recipe: "not under test")
    torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, tmp_path / "w.ckpt")
    more = {"dry": ["--dry"], "json": ["--json"]}.get(verb, [])
    arguments = [str(tiny_recipe), "--store", root, "--set", f"{field}=file://{tmp_path}/w.ckpt", *more]
    code = cli.main([{"dry": "submit", "json": "plan"}.get(verb, verb), *arguments])
    shown = capsys.readouterr()
    assert code == (NOT_READY if verb == "doctor" else USER)
    text = json.loads(shown.out)["unfit"] if verb == "json" else shown.out + shown.err
    assert f"{field}: file://{tmp_path}/w.ckpt: weights (read as layout timm) do not fit VisionTransformer" in text
    assert "54 of the network's 54 names lie below 'model.'" in text
    assert len(re.findall(r"blocks\.\d", text)) <= 10 * text.count("do not fit")
    assert Run.list(root) == []


def test_weights_that_fit_are_compared_wherever_they_lie(
    tiny_recipe: Path, root: str, bucket: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        open_store(bucket).put_file(name, tmp_path / name)
    recipe = given(tiny_recipe, student__weights=f"file://{tmp_path}/w.pth",
                   teachers__big__weights=f"{bucket}/w.safetensors")  # fmt: skip
    assert preflight.check_weights(recipe, root) == []
    other = given(tiny_recipe, "teachers.big.args.depth=5", "train.img_size=48", student__weights=f"{bucket}/w.pth",
                  teachers__big__weights=f"{bucket}/w.safetensors")  # fmt: skip
    with pytest.raises(RuntimeError) as caught:
        preflight.check_weights(other, root)
    assert str(caught.value).startswith(f"teachers.big.weights: {bucket}/w.safetensors: weights (read as layout timm)")
    assert "missing: blocks.4.attn.proj.bias," in str(caught.value)
    assert "student.weights" not in str(caught.value), "its position table is fitted to other image sizes"


def test_a_part_of_several_files_and_an_index_without_one_are_told(
    tiny_recipe: Path, root: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    index = tmp_path / "model.safetensors.index.json"
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    index.write_text(json.dumps({"weight_map": names}))
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, tmp_path / name)
    whole = given(tiny_recipe, teachers__big__weights=f"file://{index}")
    assert preflight.check_weights(whole, root) == []
    part = given(tiny_recipe, teachers__big__weights=f"file://{tmp_path}/{names['cls_token']}")
    with pytest.raises(RuntimeError, match="one of several files: name their index, model.safetensors.index.json"):
        preflight.check_weights(part, root)
    (tmp_path / names["cls_token"]).unlink()
    with pytest.raises(RuntimeError, match="index.json: names files that are not there: model-00001-of-00002"):
        preflight.check_weights(whole, root)


def test_a_text_tower_that_is_none_is_told(
    tiny_recipe: Path, root: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    recipe = given(tiny_recipe, teachers__big__text=f"file://{tmp_path}/w.safetensors")
    with pytest.raises(RuntimeError, match=r"^teachers.big.text: file://.*: no CLIP text tower: positional_embedding"):
        preflight.check_weights(recipe, root)


def test_the_student_of_the_first_stage_may_have_weights_of_its_own(
    tiny_recipe: Path, root: str, tmp_path: Path
) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    stages = f"stages={{a: {{student: {{weights: 'file://{tmp_path}/w.safetensors'}}}}, b: {{}}}}"
    with pytest.raises(RuntimeError, match=r"^stages.a.student.weights: file://.*(\n.*)*unexpected: w$"):
        preflight.check_weights(given(tiny_recipe, stages), root)


def test_toy_weights_of_an_earlier_recipe_are_compared_too(root: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    recipe = complete(load("demo", "smoke", []))
    assert preflight.check_weights(recipe, root) == []
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    open_store(root).put_file("teachers/digits_masked.safetensors", tmp_path / "w.safetensors")
    with pytest.raises(RuntimeError, match="^teachers.digits_masked.weights: .*digits_masked.safetensors: weights"):
        preflight.check_weights(recipe, root)


# ---- the hub


class Hub(BaseHTTPRequestHandler):
    """Answers every request for a file alike, or with a file."""

    answer: tuple[int, str] = (404, "")
    file: bytes = b""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        first, _, last = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        self._answer(self.file[int(first) : int(last) + 1 if last else None])

    def _answer(self, data: bytes) -> None:
        status, code = self.answer
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        size = len(data) if self.command == "GET" else len(self.file)
        headers = {"ETag": '"0123"', "X-Repo-Commit": "0" * 40, "Content-Length": str(size)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A hub on this machine; what it is called with is what it answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/{filename}")

    def answer(status: int, code: str = "", file: bytes = b"") -> None:
        Hub.answer, Hub.file = (status, code), file

    yield answer
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "EntryNotFound", "the hub's repository me/net has no file model.safetensors"),
        (404, "", "the hub's repository me/net has no file model.safetensors"),
        (404, "RepoNotFound", "the hub has no public repository me/net"),
        (429, "", "the hub answers 429, too many requests, for me/net"),
        (503, "", "the hub answers 503 for me/net"),
        (403, "GatedRepo", "the weights me/net need their licence accepted"),
    ],
)
def test_what_the_hub_answers_is_told_as_that(
    status: int, code: str, said: str, tiny_recipe: Path, root: str, online: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    online(status, code)
    recipe = given(tiny_recipe, teachers__big__weights="hub:me/net")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    (lack,) = inputs.missing(recipe, root, gpus=0)
    assert lack.what.startswith(f"teachers.big.weights: {said}")
    with pytest.raises(NotReady, match=f"teachers.big.weights: {re.escape(said)}"):
        hub.stage(recipe, root, print)
    (note,) = preflight.check_weights(recipe, root)
    assert note.startswith(f"teachers.big.weights: not compared with its network: {said}")


def test_weights_on_the_hub_are_compared_before_they_are_fetched(
    tiny_recipe: Path, root: str, tmp_path: Path, state: dict[str, Tensor], online: Callable[..., None]
) -> None:
    recipe = given(tiny_recipe, teachers__big__weights="hub:me/net")
    save_file(state, tmp_path / "good.safetensors")
    online(200, file=(tmp_path / "good.safetensors").read_bytes())
    assert preflight.check_weights(recipe, root) == []
    save_file({f"model.{key}": value for key, value in state.items()}, tmp_path / "bad.safetensors")
    online(200, file=(tmp_path / "bad.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="^teachers.big.weights: hub:me/net: weights .* do not fit"):
        preflight.check_weights(recipe, root)
    assert list(open_store(root).list("weights/")) == []
