"""Recipes: typed, strict, resolved in one order, and identified by a fingerprint of what the result depends on.

defaults <- base recipe <- recipe <- profile <- dotlist. Imports no torch, so a login node can read recipes at once;
the options of a method are checked by `core.methods.base.complete`, which does import it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from core.limits import check_value
from core.merge import ConfigError as ConfigError
from core.merge import Overlay, flatten, load_yaml, merge, nested, parse, read, to_object
from core.merge import nearest as nearest
from core.models import known

RECIPES = Path(__file__).resolve().parent.parent / "jobs" / "recipes"
SCHEMA = 1
# Groups that say where and how fast a run goes, not what comes out of it: they are left out of the fingerprint.
NOT_IDENTITY = ("store", "zero", "launch", "loader", "checkpoint", "log", "evaluate", "about")


@dataclass
class About:
    """What a reader of `make recipes` wants to know; no effect on the run."""

    paper: str = ""
    published: str = "none"
    gpu_hours: str = "unknown"


@dataclass
class Method:
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)  # the method's own Options dataclass checks these


@dataclass
class Student:
    name: str = "vit_base_patch16_224"  # any timm model, or a name of `make teachers`
    args: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model, and norm_eps
    drop_path: float = 0.0
    weights: str = ""  # "" = from scratch; else as Teacher.weights


@dataclass
class Teacher:
    name: str = ""  # timm model, or a name of `make teachers`, which fills in what is left at its default
    args: dict[str, Any] = field(default_factory=dict)
    weights: str = "hub"  # hub | hub:<id> | file:///x | s3://x | store:x | run:<id> | random
    text: str = ""  # weights of its text tower, a CLIP checkpoint in OpenAI's layout; "" = the file of `weights`
    cls: str = "token"  # token: class token | pooled: timm's pooled, pre-logits feature | projected: through the head
    norm: bool = True  # tokens after the final norm, else as the last block leaves them
    positions: str = "offset"  # table of another grid: offset: factors (n + 0.1) / m | size: n / m | antialias: timm's
    normalize: str = "student"  # student: same tensor as the student | own: this model's mean and std, folded in
    licence: str = "unknown"


@dataclass
class Data:
    source: str = ""  # folder of images or indexed shards: file:///x, s3://bucket/x, store:x
    heldout: str = ""  # images for the validation loss only
    features: str = ""  # tables of the images' vectors, row for row; "" = beside source (held-out: beside heldout)
    texts: str = ""  # tables of sentences, or of their vectors; "" = beside source
    merge: list[str] = field(default_factory=list)  # further sources, appended to the first
    weights: list[float] = field(default_factory=list)  # shares of source and merge in a batch; none = by their sizes
    classes: float = 1.0  # share of the classes that is used; which is drawn from the seed
    share: float = 1.0  # share of each class's images that is used
    samples: int = 0  # > their number: as many samples as this, made by going round the images again
    repeats: int = 1  # copies of an image in a batch, each with its own draws; an epoch has so many fewer images
    views: int = 0  # > 0: epoch e has the crops and colours of epoch e % views; stored features are of such views
    codec: str = "bf16"  # of stored features: fp32, bf16, fp16, or 8 bits with a scale per token: fp8, int8
    block: int = 8192  # samples per shuffle block
    pixels: str = "exact"  # exact: as the method's release makes them | fast: within a few grey levels, see core.data
    max_bad_share: float = 0.01  # stop when more than this share of samples, and more than ten, cannot be decoded


@dataclass
class Train:
    """One stage. Every field can be overridden under `stages.<name>`."""

    img_size: int = 224
    epochs: int = 100
    steps: int = 0  # > 0 overrides epochs
    batch: int = 512  # global
    micro_batch: int = 128  # canonical: losses are normalised, statistics merged and draws keyed per micro-batch
    lr: float = 3e-4
    lr_batch: int = 256  # lr is multiplied by batch / lr_batch; 0 = as it is
    min_lr: float = 1e-6
    warmup_epochs: float = 0.0
    warmup_steps: int = -1  # >= 0 overrides warmup_epochs
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    clip: float = 0.0  # 0 = off; how (global or per parameter) is the method's business
    precision: str = "bf16"  # bf16 | fp32
    max_bad_losses: int = 3  # stop after this many bad losses in a row
    explode: float = 20.0  # a loss of so many times its running mean is bad, as one that is not finite; 0 = off
    rewinds: int = 0  # times that a run may go back to its last good checkpoint and leave bad steps' samples out


@dataclass
class Zero:
    stage: int = 1


@dataclass
class Launch:
    launcher: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    ranks: int = 0  # 0 = one per GPU, or two on CPU
    min_ranks: int = 0  # Ray: an attempt may begin with so many when nodes are missing; 0 = with all or not at all
    gather_s: float = 90.0  # Ray: for which it waits for the others before it does
    threads: int = 0  # intra-op threads per rank on CPU; 0 = cores / ranks
    max_attempts: int = 3  # of one submission; on SLURM, such as fail
    backoff_s: float = 10.0  # pause before the second attempt, doubled before each further one, an hour at most
    deadline_h: float = 0.0  # no further attempt so long after the submission; 0 = none
    time_limit_min: float = 0.0  # an attempt saves and leaves after so long; 0 = none
    grace_s: float = 120.0  # that ranks may take to save and leave when asked to
    hang_s: float = 1800.0  # a rank without a step for so long hangs (thrice before the first step); 0 = never


@dataclass
class Loader:
    workers: int = 4  # processes per rank
    prefetch: int = 4  # micro-batches per worker
    cache_dir: str = ""  # node-local shard cache; "" = a folder in the system's temporary directory
    cache_gb: float = 200.0
    ahead: int = 32  # shards that a rank has fetched before they are read, cache permitting; 0 = none


@dataclass
class Checkpoint:
    every_steps: int = 1000
    keep: int = 2  # newest ones
    keep_every: int = 0  # and those whose step is a multiple of this; 0 = none
    keep_best: int = 0  # and so many with the lowest loss on held-out images
    pending: int = 4  # on their way to the store at once; further ones are passed over
    patience_s: float = 600.0  # store silent for so long, and `pending` used up: save on this node's disk and leave
    spool: str = ""  # folder of this node, or one that nodes share; "" = one in the system's temporary directory
    accept: list[str] = field(default_factory=list)  # fingerprints of other recipes whose checkpoints may be taken up


@dataclass
class Log:
    every_steps: int = 50
    flush_s: float = 30.0
    tensorboard: bool = True  # event files in the run's folder


@dataclass
class Evaluate:
    train: str = ""  # labelled images the probes learn from
    test: str = ""
    protocols: list[str] = field(default_factory=lambda: ["knn", "linear"])
    margin: float = 0.0  # top-1 points by which the student must beat an untrained one (0 = not asked for)
    seeds: int = 1  # untrained students to compare with
    students: int = 1  # seeds that `make demo` distils with


@dataclass
class Recipe:
    schema: int = SCHEMA
    name: str = ""
    about: About = field(default_factory=About)
    seed: int = 22
    prepare: str = ""  # module in core/prepare that makes missing inputs (toy data, toy teachers)
    method: Method = field(default_factory=Method)
    student: Student = field(default_factory=Student)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    features: str = "off"  # stored teacher outputs: off | auto: those that are there | require: or the run is refused
    train: Train = field(default_factory=Train)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)  # overlays of `train`, in order; none = one stage
    store: str = ""
    zero: Zero = field(default_factory=Zero)
    launch: Launch = field(default_factory=Launch)
    loader: Loader = field(default_factory=Loader)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def stage_names(self) -> list[str]:
        return list(self.stages) or ["main"]

    def stage(self, name: str) -> Train:
        """Settings of one stage: `train` with the stage's overlay.  Raises ConfigError for a wrong key or value."""
        overlay = Overlay(_without(self.stages.get(name, {}), *PARTS), self.name, prefix=f"stages.{name}")
        return cast(Train, to_object(merge(OmegaConf.structured(self.train), Train, overlay)))

    def at(self, name: str) -> Recipe:
        """The recipe as one stage sees it: with its own student, data or method (options of another start anew)."""
        parts = {}
        for part, values in self.stages.get(name, {}).items():
            if part in PARTS:
                kind = PARTS[part]
                afresh = part == "method" and values.get("name", self.method.name) != self.method.name
                start = Method() if afresh else getattr(self, part)
                overlay = Overlay(values, self.name, prefix=f"stages.{name}.{part}")
                parts[part] = to_object(merge(OmegaConf.structured(start), kind, overlay))
        if "student" in parts:
            parts["student"] = known.fill(parts["student"])
        return dataclasses.replace(self, **parts)


PARTS: dict[str, type] = {"method": Method, "student": Student, "data": Data}  # that a stage may have of its own
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of teachers and stages: part of keys, addresses and module names


def names() -> list[str]:
    """Recipes that come with Retort."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(name: str, profile: str = "", dotlist: list[str] | None = None) -> Recipe:
    """Resolve a recipe by name or by path of a YAML file.

    Raises ConfigError: unknown recipe, profile, key or value, with file, line and the nearest valid name.
    """
    path = _find(name)
    files = _collect(path, seen=())
    layers = [dataclasses.replace(f, values=_without(f.values, "base", "profiles")) for f in files]
    layers += _profile(profile, files) if profile else []
    layers += [_override(item) for item in dotlist or []]
    config = OmegaConf.structured(Recipe(name=re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")))
    for layer in layers:
        config = merge(config, Recipe, layer)
        for stage, values in layer.values.get("stages", {}).items():  # judged here, where the line is known
            place = f"stages.{stage}"
            values = layer.below(place, place, values).values
            merge(OmegaConf.structured(Train), Train, layer.below(place, place, _without(values, *PARTS)))
            for part in values.keys() & PARTS.keys():
                where = f"{place}.{part}"
                merge(OmegaConf.structured(PARTS[part]), PARTS[part], layer.below(where, where, values[part]))
    recipe = cast(Recipe, to_object(config))
    teachers = {key: known.fill(teacher) for key, teacher in recipe.teachers.items()}
    recipe = dataclasses.replace(recipe, student=known.fill(recipe.student), teachers=teachers)
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Everything that can be judged from the recipe alone.  Raises ConfigError."""
    if recipe.schema != SCHEMA:
        raise ConfigError(f"schema: this Retort reads recipes of schema {SCHEMA}, not {recipe.schema}")
    if not recipe.method.name:
        raise ConfigError("method.name: not set; a recipe names its method, for example `method: {name: unic}`")
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", recipe.name):
        raise ConfigError(f"name: {recipe.name!r} must be made of a-z, 0-9 and -, as it becomes part of addresses")
    if recipe.launch.ranks and recipe.launch.min_ranks > recipe.launch.ranks:
        raise ConfigError(f"launch.min_ranks: {recipe.launch.min_ranks} is above launch.ranks, {recipe.launch.ranks}")
    for group in ("teachers", "stages"):
        for name in getattr(recipe, group):
            if not re.fullmatch(NAME, name):
                raise ConfigError(f"{group}: the name {name!r} must be made of letters, digits, _ and -")
    flat = flatten(_without(to_dict(recipe), "stages"))
    for stage in recipe.stage_names():
        prefix = f"stages.{stage}" if recipe.stages else "train"
        flat |= _check_stage(recipe.stage(stage), prefix)
        own = recipe.at(stage)
        _check_weights(own.data)
        parts = recipe.stages.get(stage, {}).keys() & PARTS.keys()
        flat |= flatten({f"{prefix}.{part}": dataclasses.asdict(getattr(own, part)) for part in parts})
    for key, value in flat.items():
        check_value(key, value, PARTS)


def _check_stage(settings: Train, prefix: str) -> dict[str, Any]:
    if settings.micro_batch > 0 and settings.batch % settings.micro_batch:
        raise ConfigError(f"{prefix}.batch: {settings.batch} is not a multiple of micro_batch {settings.micro_batch}")
    if settings.steps == 0 and settings.epochs == 0:
        raise ConfigError(f"{prefix}: neither steps nor epochs is set")
    return {f"{prefix}.{k}": v for k, v in dataclasses.asdict(settings).items()}


def _check_weights(data: Data) -> None:
    if data.weights and len(data.weights) != 1 + len(data.merge):
        numbers, sources = len(data.weights), 1 + len(data.merge)
        advice = "give one for data.source and one for each of data.merge"
        raise ConfigError(f"data.weights: numbers {numbers}, sources {sources}; {advice}")
    for name, given in (("samples", data.samples), ("repeats", data.repeats > 1)):
        if data.weights and given:
            raise ConfigError(
                f"data.{name}: not together with data.weights, which go round small sources by themselves"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable again by `from_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))


def from_yaml(text: str, file: str = "recipe.yaml") -> Recipe:
    """A resolved recipe as stored in a run folder.  Raises ConfigError."""
    recipe = cast(Recipe, to_object(merge(OmegaConf.structured(Recipe), Recipe, parse(text, file))))
    check(recipe)
    return recipe


def fingerprint(recipe: Recipe) -> str:
    """Hex digest of all that the result depends on: not world size, ZeRO stage, launcher, store, logging."""
    identity = _without(to_dict(recipe), *NOT_IDENTITY, "train", "stages")
    # As a list, because the order of stages matters; resolved, because where a setting is written does not.
    identity["stages"] = [
        [name, *(dataclasses.asdict(x) for x in (recipe.stage(name), *(getattr(recipe.at(name), p) for p in PARTS)))]
        for name in recipe.stage_names()
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- where settings come from -------------------------------------------------------------------------------------


def _find(name: str, folder: Path | None = None) -> Path:
    """A recipe that comes with Retort, or a YAML file by path (a base's path counts from the file that names it)."""
    by_path = name.endswith((".yaml", ".yml"))
    path = (folder or Path()) / name if by_path else RECIPES / f"{name}.yaml"
    if not path.is_file() or not (by_path or name in names()):
        raise ConfigError(
            f"recipe {name!r} not found{nearest(name, names())} (known: {', '.join(names())}; or give the path of a "
            f"YAML file)"
        )
    return path.resolve() if folder else path


def _collect(path: Path, seen: tuple[Path, ...]) -> list[Overlay]:
    """The files of a recipe, its bases first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base recipes form a circle")
    own = read(path)
    base = own.values.get("base")
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise ConfigError(f"{own.place('base')}: base: give one recipe by name or path, not {base!r}")
    return [*_collect(_find(base, path.parent), (*seen, path.resolve())), own]


def _profile(profile: str, files: list[Overlay]) -> list[Overlay]:
    """The profile that all recipes share, then what the recipe's files add to it."""
    shared = {p.stem: p for p in (RECIPES / "profiles").glob("*.yaml")}
    own = [f.below("profiles", "", f.values.get("profiles")) for f in files]
    if profile not in shared and not any(profile in o.values for o in own):
        known = sorted(shared.keys() | {name for o in own for name in o.values})
        raise ConfigError(
            f"profile {profile!r} not found for {files[-1].file}{nearest(profile, known)} (known: {', '.join(known)})"
        )
    found = [read(shared[profile])] if profile in shared else []
    return found + [o.below(profile, "", o.values[profile]) for o in own if profile in o.values]


def _override(item: str) -> Overlay:
    key, sign, text = item.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"SET: {item!r} is not of the form key=value, for example train.steps=100")
    try:
        value = load_yaml(text) if text else ""  # key= empties a field
    except yaml.YAMLError:
        raise ConfigError(f"SET {key}: {text!r} is not a valid YAML value") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    return Overlay(nested(key, value), "SET")


def _without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in keys}
