"""Recipes: typed, strict, resolved in one order, and identified by a fingerprint of what the result depends on.

defaults <- base recipe <- recipe <- profile <- dotlist. Imports no torch, so a login node can read recipes at once;
the options of a method are checked by `core.methods.base.complete`, which does import it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

RECIPES = Path(__file__).resolve().parent.parent / "jobs" / "recipes"
SCHEMA = 1
# Groups that say where and how fast a run goes, not what comes out of it: they are left out of the fingerprint.
NOT_IDENTITY = ("store", "zero", "launch", "loader", "checkpoint", "log", "evaluate", "about")


class ConfigError(ValueError):
    """A recipe, profile or override is wrong. The message names the field, the file and line, and the fix."""


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
    name: str = "vit_base_patch16_224"  # any timm model
    args: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model
    drop_path: float = 0.0
    weights: str = ""  # "" = from scratch; else as Teacher.weights


@dataclass
class Teacher:
    name: str = ""  # timm model
    args: dict[str, Any] = field(default_factory=dict)
    weights: str = "hub"  # hub | hub:<id> | file:///x | s3://x | store:x | run:<id> | random
    cls: str = "token"  # token: normed class token | pooled: timm's pooled, pre-logits feature
    normalize: str = "student"  # student: same tensor as the student | own: this model's mean and std, folded in
    licence: str = "unknown"


@dataclass
class Data:
    source: str = ""  # folder of images or indexed shards: file:///x, s3://bucket/x, store:x
    heldout: str = ""  # images for the validation loss only
    block: int = 8192  # samples per shuffle block
    max_bad_share: float = 0.01  # stop the run when more than this share of samples cannot be decoded


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
    max_bad_losses: int = 3  # stop after this many non-finite losses in a row


@dataclass
class Zero:
    stage: int = 1


@dataclass
class Launch:
    launcher: str = "auto"
    device: str = "auto"  # auto | cpu | cuda
    ranks: int = 0  # 0 = one per GPU, or two on CPU
    threads: int = 0  # intra-op threads per rank on CPU; 0 = cores / ranks
    max_attempts: int = 1


@dataclass
class Loader:
    workers: int = 4  # processes per rank
    prefetch: int = 4  # micro-batches per worker
    cache_dir: str = ""  # node-local shard cache; "" = a folder in the system's temporary directory
    cache_gb: float = 200.0


@dataclass
class Checkpoint:
    every_steps: int = 1000
    keep: int = 2


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
        base = OmegaConf.structured(self.train)
        return cast(Train, _to_object(_merge(base, self.stages.get(name, {}), f"stages.{name}", Path(self.name))))


CHOICES = {
    "train.precision": ("bf16", "fp32"), "zero.stage": (0, 1, 2, 3), "launch.device": ("auto", "cpu", "cuda"),
    "teachers.*.cls": ("token", "pooled"), "teachers.*.normalize": ("student", "own"),
}  # fmt: skip
POSITIVE = ("train.img_size", "train.batch", "train.micro_batch", "data.block", "checkpoint.every_steps",
            "checkpoint.keep", "log.every_steps", "evaluate.seeds")  # fmt: skip
NOT_NEGATIVE = ("train.epochs", "train.steps", "train.lr", "train.min_lr", "train.lr_batch", "train.weight_decay",
                "train.warmup_epochs", "train.eps", "train.clip", "launch.ranks", "launch.threads", "loader.workers",
                "seed", "student.drop_path", "data.max_bad_share")  # fmt: skip


def nearest(name: str, valid: list[str]) -> str:
    """A hint to append to an error: the nearest valid name, if one is near."""
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def names() -> list[str]:
    """Recipes that come with Retort."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(name: str, profile: str = "", dotlist: list[str] | None = None) -> Recipe:
    """Resolve a recipe by name or by path of a YAML file.

    Raises ConfigError: unknown recipe, profile, key or value, with file, line and the nearest valid name.
    """
    path = _find(name)
    config = OmegaConf.structured(Recipe(name=re.sub(r"[^a-z0-9-]+", "-", path.stem.lower())))
    overlays: list[tuple[Path, dict[str, Any]]] = []
    _collect(path, overlays, seen=())
    for file, content in overlays:
        config = _merge(config, {k: v for k, v in content.items() if k not in ("base", "profiles")}, "", file)
    if profile:
        for file, content in _profile(profile, path, overlays):
            config = _merge(config, content, "", file)
    for item in dotlist or []:
        config = _override(config, item)
    recipe = cast(Recipe, _to_object(config))
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Everything that can be judged from the recipe alone.  Raises ConfigError."""
    if recipe.schema != SCHEMA:
        raise ConfigError(f"schema: this Retort reads recipes of schema {SCHEMA}, not {recipe.schema}")
    if not recipe.method.name:
        raise ConfigError("method.name: not set; a recipe names its method, for example `method: {name: unic}`")
    flat = _flatten(dataclasses.asdict(recipe))
    for stage in recipe.stage_names():
        settings = recipe.stage(stage)
        prefix = f"stages.{stage}" if recipe.stages else "train"
        if settings.micro_batch > 0 and settings.batch % settings.micro_batch:
            raise ConfigError(
                f"{prefix}.batch: {settings.batch} is not a multiple of micro_batch {settings.micro_batch}"
            )
        if settings.steps == 0 and settings.epochs == 0:
            raise ConfigError(f"{prefix}: neither steps nor epochs is set")
        flat.update({f"{prefix}.{k}": v for k, v in dataclasses.asdict(settings).items()})
    for key, value in flat.items():
        _check_value(key, value)


def _check_value(key: str, value: Any) -> None:
    generic = re.sub(r"^stages\.[^.]+", "train", re.sub(r"^teachers\.[^.]+", "teachers.*", key))
    allowed = CHOICES.get(generic)
    if allowed and value not in allowed:
        hint = nearest(str(value), [str(a) for a in allowed])
        raise ConfigError(f"{key}: {value!r} is not one of {', '.join(map(str, allowed))}{hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")
    if generic in POSITIVE and value <= 0:
        raise ConfigError(f"{key}: must be above 0, got {value}")
    if generic in NOT_NEGATIVE and value < 0:
        raise ConfigError(f"{key}: must not be negative, got {value}")


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable again by `from_yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))


def from_yaml(text: str, file: str = "recipe.yaml") -> Recipe:
    """A resolved recipe as stored in a run folder."""
    merged = _merge(OmegaConf.structured(Recipe), yaml.safe_load(text), "", Path(file))
    return cast(Recipe, _to_object(merged))


def fingerprint(recipe: Recipe) -> str:
    """Hex digest of all that the result depends on: not world size, ZeRO stage, launcher, store, logging."""
    identity = {k: v for k, v in to_dict(recipe).items() if k not in NOT_IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- reading and merging ------------------------------------------------------------------------------------------


def _find(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    if not path.is_file() or (path.parent == RECIPES and name not in names() and not name.endswith((".yaml", ".yml"))):
        hint = nearest(name, names())
        raise ConfigError(
            f"recipe {name!r} not found{hint} (known: {', '.join(names())}; or give the path of a YAML file)"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of fields")
    return content


def _collect(path: Path, overlays: list[tuple[Path, dict[str, Any]]], seen: tuple[Path, ...]) -> None:
    """Append the overlays of a recipe, its bases first."""
    if path in seen:
        raise ConfigError(f"{path}: base recipes form a circle")
    content = _read(path)
    if base := content.get("base"):
        _collect(_find(str(base)), overlays, (*seen, path))
    overlays.append((path, content))


def _profile(
    profile: str, path: Path, overlays: list[tuple[Path, dict[str, Any]]]
) -> list[tuple[Path, dict[str, Any]]]:
    common = RECIPES / "profiles" / f"{profile}.yaml"
    found = [(common, _read(common))] if re.fullmatch(r"[a-z0-9-]+", profile) and common.is_file() else []
    found += [
        (file, content["profiles"][profile]) for file, content in overlays if profile in content.get("profiles", {})
    ]
    if not found:
        known = sorted({p.stem for p in (RECIPES / "profiles").glob("*.yaml")})
        raise ConfigError(f"profile {profile!r} not found for {path}; known: {', '.join(known)}")
    return found


def _override(config: DictConfig, item: str) -> DictConfig:
    key, sign, text = item.partition("=")
    if not sign or not key:
        raise ConfigError(f"SET: {item!r} is not of the form key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text) if text else ""  # key= empties a field
    except yaml.YAMLError:
        raise ConfigError(f"SET {key}: {text!r} is not a valid YAML value") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(config, nested, "", Path("SET"))


def _merge(config: DictConfig, overlay: dict[str, Any], prefix: str, file: Path) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(config, OmegaConf.create(overlay)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        _explain(error, config, overlay, prefix, file)


def _explain(error: Exception, config: DictConfig, overlay: dict[str, Any], prefix: str, file: Path) -> NoReturn:
    """Turn OmegaConf's refusal into field, file:line, reason and the nearest valid name."""
    key = str(getattr(error, "full_key", "") or "")
    valid = list(_flatten(cast(dict[str, Any], OmegaConf.to_container(config, throw_on_missing=False)), groups=True))
    unknown = [k for k in _flatten(overlay, groups=True) if k not in valid and not _open(k)]
    where = f"{prefix}.{key}" if prefix and key else key or prefix
    place = f"{file}{_line(file, key)}"
    if unknown and (not key or key in unknown):
        key = key or unknown[0]
        where = f"{prefix}.{key}" if prefix else key
        dotted = [f"{prefix}.{v}" if prefix else v for v in valid]
        leaf = [v for v in dotted if v.rpartition(".")[2] == key.rpartition(".")[2]]
        hint = nearest(where, dotted) or (f"; did you mean {leaf[0]}?" if leaf else "")
        raise ConfigError(f"{place}: unknown field {where}{hint}") from None
    where = where or next(iter(_flatten(overlay)), "")
    raise ConfigError(f"{place}: {where}: {str(error).splitlines()[0]}") from None


def _open(key: str) -> bool:
    """Fields whose keys are free: names of teachers and stages, options and timm arguments."""
    teacher = key.split(".")
    if teacher[0] == "teachers":
        known = {f.name for f in dataclasses.fields(Teacher)}
        return len(teacher) < 3 or teacher[2] in known
    return key.startswith(("stages.", "method.options.", "student.args."))


def _flatten(tree: dict[str, Any], prefix: str = "", groups: bool = False) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            if groups:
                flat[f"{prefix}{key}"] = value
            flat.update(_flatten(value, f"{prefix}{key}.", groups))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _line(file: Path, key: str) -> str:
    """`:LINE` of a dotted key in a YAML file, or nothing."""
    if not key or not file.is_file():
        return ""
    node: Any = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    line = 0
    for part in key.split("."):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = [(k, v) for k, v in pairs if k.value == part]
        if not match:
            break
        line, node = match[0][0].start_mark.line + 1, match[0][1]
    return f":{line}" if line else ""


def _to_object(config: DictConfig) -> Any:
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
