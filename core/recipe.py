"""What a recipe holds: its groups of settings, their defaults, and how a stage sees them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

from omegaconf import OmegaConf

from core.merge import Overlay, merge, to_object, without
from core.models import known

SCHEMA = 1


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
    args: dict[str, Any] = field(default_factory=dict)  # for timm.create_model, and core.models.variants
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

    @property
    def lr_factor(self) -> float:
        """What learning rates are multiplied by for the size of the batch."""
        return self.batch / self.lr_batch if self.lr_batch else 1.0


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
    cache_dir: str = ""  # node-local shard cache, never stored; "" = RETORT_CACHE, else one in the temporary directory
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
    spool: str = ""  # of this node, or that nodes share, never stored; "" = RETORT_SPOOL, else a temporary one
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
    numerics: int = 0  # changes of core.numerics that it was resolved after; not set by hand
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
        overlay = Overlay(without(self.stages.get(name, {}), *PARTS), self.name, prefix=f"stages.{name}")
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
