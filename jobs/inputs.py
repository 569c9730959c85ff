"""What a recipe needs and this machine or account lacks: everything at once, each with the way to provide it."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core.folder import FileStore
from core.storage import Store, StoreError, UnfitStore, local_path, open_object, open_store, resolve
from jobs import hub
from jobs.errors import NotReady, UserError, nearest, redact
from jobs.placement import allowed_ranks, typed
from jobs.record import Run, State
from jobs.steps import elsewhere, steps

if TYPE_CHECKING:
    from core.recipe import Recipe

PACKAGES = (
    "torch", "torchvision", "timm", "deepspeed", "boto3", "omegaconf", "safetensors", "google_crc32c", "PIL", "tqdm",
)  # fmt: skip
NO_CONDITIONS = "does not honour conditional puts (If-None-Match)"
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
    student = recipe.at(first := recipe.stage_names()[0]).student  # further stages go on from a checkpoint
    if student.weights:
        place = "" if student.weights == recipe.student.weights else f"stages.{first}."
        yield f"{place}student.weights", student.name, student.weights


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
        store, key = open_object(resolve(weights, root))
        if probe(store.uri).size(key) is None:
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
        if (path := local_path(place)) and not path.is_dir():
            return Missing(f"{field}: there is no folder {place}", how)
        if is_empty(place):
            return Missing(f"{field}: nothing lies under {place}", how)
    except StoreError as error:
        return Missing(f"{field}: {redact(str(error))}", how)
    return None


def is_empty(uri: str) -> bool:
    return next(iter(probe(uri).list()), None) is None


def probe(uri: str, **options: int) -> Store:
    """A store for one quick look: a bucket that does not answer soon is as good as missing.  options: of S3Options."""
    store = open_store(uri)
    if isinstance(store, FileStore):
        return store
    from core.bucket import S3Store
    from core.bucket_client import S3Options

    return S3Store(uri, S3Options(attempts=2, connect_timeout_s=3.0, read_timeout_s=10.0, **options))


def check_store(root: str) -> Missing | None:
    """What keeps a store from being used: no answer, no rights, or a server that lacks what Retort relies on."""
    how = (
        "check the address and the rights; another store: STORE=s3://bucket/prefix or STORE=file:///folder "
        "(credentials and endpoint come from the AWS variables and files)"
    )
    try:
        lack = _lack(root)
    except UnfitStore as error:
        return Missing(f"store: {redact(str(error))}", "use another server: STORE=s3://bucket/prefix or file:///folder")
    except StoreError as error:
        return Missing(f"store: {redact(str(error))}", how)
    return Missing(f"store: {root} {lack}", "use another server") if lack else None


def _lack(root: str) -> str:
    """What a store does otherwise than it must, tried on two objects so small that both lists and reads take parts."""
    key, store = f"checks/{uuid.uuid4().hex}", probe(root, page=1, range_bytes=1)
    keys = [f"{key}-1", f"{key}-2"]
    first = store.put_if_absent(keys[0], b"12")
    try:
        lack = _otherwise(store, key, keys) if first else NO_CONDITIONS
    except StoreError:
        with suppress(StoreError):
            store.delete(*keys)
        raise
    store.delete(*keys)
    return lack


def _otherwise(store: Store, key: str, keys: list[str]) -> str:
    if store.put_if_absent(keys[0], b"34"):
        return NO_CONDITIONS
    store.put(keys[1], b"34")
    with tempfile.TemporaryFile() as file:
        store.load(keys[0], file, 2)
        file.seek(0)
        if (file.read(), store.get(keys[0]), store.get_range(keys[1], 1, 1)) != (b"12", b"12", b"4"):
            return "gives other bytes than were put"
    return "" if [entry.key for entry in store.list(key)] == keys else "does not list what was put"


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
        f"submit on a machine with {'more ' * bool(gpus)}GPUs; fewer ranks: {typed(allowed_ranks(recipe), gpus)}; "
        'slowly, without a GPU: SET="launch.device=cpu"; the same code at toy size: PROFILE=smoke'
    )
    return [Missing(f"launch.device: cuda needs {wanted} GPU{'s' * (wanted > 1)}, this machine shows {gpus}", how)]
