"""What a recipe needs and this machine or account lacks: everything at once, each with the way to provide it."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.folder import FileStore
from core.storage import Store, StoreError, open_store, resolve
from jobs import hub
from jobs.errors import NotReady, UserError, nearest, redact
from jobs.record import Run, State
from jobs.steps import elsewhere, steps

if TYPE_CHECKING:
    from core.recipe import Recipe

PACKAGES = (
    "torch", "torchvision", "timm", "deepspeed", "boto3", "omegaconf", "safetensors", "google_crc32c", "PIL", "tqdm",
)  # fmt: skip
DATA_HOW = (
    'a folder of images: SET="data.source=file:///photos"; a bucket: SET="data.source=s3://bucket/images"; '
    "for large sets write shards once: make shards SRC=file:///photos DST=s3://bucket/name SHORT=256"
)


@dataclass(frozen=True)
class Missing:
    what: str
    how: str


def require(recipe: Recipe, root: str, gpus: int) -> None:
    """Raises NotReady, naming all that is missing and how to provide it."""
    lacks = missing(recipe, root, gpus)
    if lacks:
        lines = [f"  {n}. {lack.what}\n     -> {lack.how}" for n, lack in enumerate(lacks, 1)]
        count = "1 thing is" if len(lacks) == 1 else f"{len(lacks)} things are"
        raise NotReady("\n".join([f"{recipe.name} is not ready to run here: {count} missing", *lines]))


def missing(recipe: Recipe, root: str, gpus: int) -> list[Missing]:
    """Everything missing, in the order in which one would provide it. Takes seconds, whatever is unreachable."""
    made = set(provided(recipe))
    with ThreadPoolExecutor(16) as pool:
        weights = list(pool.map(lambda w: _weights(w, root, made), weights_fields(recipe)))
        data = list(pool.map(lambda d: _data(d, root, made), data_fields(recipe)))
        store = pool.submit(check_store, root)
        found = [*packages(), *_gpu(recipe, gpus), store.result(), *data, *weights]
    return [lack for lack in found if lack]


def weights_fields(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(field, timm model, weights) of the teachers and of a student that does not start from scratch."""
    for name, teacher in recipe.teachers.items():
        yield f"teachers.{name}.weights", teacher.name, teacher.weights
    if recipe.student.weights:
        yield "student.weights", recipe.student.name, recipe.student.weights


def data_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(field, URI) of the data of every stage; all but the training images may be left out."""
    stages = {stage: recipe.at(stage).data for stage in recipe.stage_names()}
    wanted = {("data" if data == recipe.data else f"stages.{stage}.data"): data for stage, data in stages.items()}
    for place, data in wanted.items():
        yield f"{place}.source", data.source
        yield from ((f"{place}.merge", uri) for uri in data.merge)
        yield from _given(place, heldout=data.heldout, features=data.features, texts=data.texts)
    yield from _given("evaluate", train=recipe.evaluate.train, test=recipe.evaluate.test)


def _given(place: str, **fields: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{place}.{field}", uri) for field, uri in fields.items() if uri)


def preparer(recipe: Recipe) -> Any | None:
    """The module that makes this recipe's toy inputs.  Raises UserError for an unknown one."""
    if not recipe.prepare:
        return None
    try:
        known = [m.name for m in pkgutil.iter_modules(importlib.import_module("core.prepare").__path__)]
    except ModuleNotFoundError:
        known = []
    if recipe.prepare not in known:
        hint = nearest(recipe.prepare, known)
        raise UserError(f"prepare: {recipe.prepare!r} is unknown{hint} (known: {', '.join(known)})")
    return importlib.import_module(f"core.prepare.{recipe.prepare}")


def provided(recipe: Recipe) -> list[str]:
    """URIs that the recipe's own preparation makes: not missing."""
    module = preparer(recipe)
    return list(module.provides(recipe)) if module else []


def _weights(wanted: tuple[str, str, str], root: str, made: set[str]) -> Missing | None:
    field, model, weights = wanted
    if weights == "random" or weights in made:
        return None
    elsewhere = f'SET="{field}=file:///weights.safetensors" or "{field}=s3://bucket/weights.safetensors" names a copy'
    try:
        if weights.startswith("run:"):
            return _run_weights(field, weights.removeprefix("run:"), root)
        if hub_id := hub.hub_id(model, weights):
            reason = "" if probe(root).size(hub.staged_key(hub_id)) is not None else hub.unreachable(hub_id)
            how = hub.HOW.format(hub_id=hub.source(hub_id))
            return Missing(f"{field}: {reason}", f"{how}; or {elsewhere}") if reason else None
        folder, _, key = resolve(weights, root).rpartition("/")
        if probe(folder).size(key) is None:
            return Missing(f"{field}: there is no file {weights}", f"put it there, or {elsewhere}")
    except StoreError as error:
        return Missing(f"{field}: {redact(str(error))}", elsewhere)
    return None


def _run_weights(field: str, run_id: str, root: str) -> Missing | None:
    run = Run(root, run_id)
    if not run.exists():
        return Missing(f"{field}: run {run_id} is not in {root}", f"make status{elsewhere(root)} lists them")
    state = run.last().state
    if state != State.SUCCEEDED:
        return Missing(f"{field}: run {run_id} is {state}", f"wait for it, or {steps(root, run_id, 'resume')}")
    if run.store.size("export/model.safetensors") is None:
        return Missing(f"{field}: the student of run {run_id} is not exported", steps(root, run_id, "export"))
    return None


def _data(wanted: tuple[str, str], root: str, made: set[str]) -> Missing | None:
    field, uri = wanted
    how = DATA_HOW.replace("data.source", field)
    if not uri:
        return Missing(f"{field} is not set: no images to learn from", how)
    if uri in made:
        return None
    try:
        place = resolve(uri, root)
        if place.startswith("file://") and not Path(place.removeprefix("file://")).is_dir():
            return Missing(f"{field}: there is no folder {place}", how)
        if is_empty(place):
            return Missing(f"{field}: nothing lies under {place}", how)
    except StoreError as error:
        return Missing(f"{field}: {redact(str(error))}", how)
    return None


def is_empty(uri: str) -> bool:
    return next(iter(probe(uri).list()), None) is None


def probe(uri: str) -> Store:
    """A store for one quick look: a bucket that does not answer soon is as good as missing."""
    store = open_store(uri)
    if isinstance(store, FileStore):
        return store
    from core.bucket import S3Store
    from core.bucket_client import S3Options

    return S3Store(uri, S3Options(attempts=2, connect_timeout_s=3.0, read_timeout_s=10.0))


def check_store(root: str) -> Missing | None:
    key = f"checks/{uuid.uuid4().hex}"
    how = (
        "check the address and the rights; another store: STORE=s3://bucket/prefix or STORE=file:///folder "
        "(credentials and endpoint come from the AWS variables and files)"
    )
    try:
        store = probe(root)
        good = store.put_if_absent(key, b"1") and not store.put_if_absent(key, b"2") and store.get(key) == b"1"
        store.delete(key)
    except StoreError as error:
        return Missing(f"store: {redact(str(error))}", how)
    why = f"store: {root} does not honour conditional puts (If-None-Match)"
    return None if good else Missing(why, "use another server")


def packages() -> list[Missing]:
    lacks = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return [Missing(f"Python packages: {', '.join(lacks)}", "make setup")] if lacks else []


def _gpu(recipe: Recipe, gpus: int) -> list[Missing]:
    if recipe.launch.device != "cuda":
        return []
    wanted = max(recipe.launch.ranks, 1)
    if gpus >= wanted:
        return []
    how = (
        'submit on a machine with GPUs; fewer ranks: SET="launch.ranks=1"; '
        'slowly, without a GPU: SET="launch.device=cpu"; the same code at toy size: PROFILE=smoke'
    )
    return [Missing(f"launch.device: cuda needs {wanted} GPU{'s' * (wanted > 1)}, this machine shows {gpus}", how)]
