"""UDI: a ViT learns from the average of its own weights, with a second class token for what the first one leaves out.

Paper: arXiv 2407.17671 (ECCV 2024). As in DINO the class tokens of two large and several small crops predict the
teacher's class token of other crops; the second class token predicts a mixture of the teacher's image and patch
predictions; patches that two crops share, sampled and read through one more attention layer, predict each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError
from core.data.udi_crops import GLOBALS, LinkedCrops, Linking, local_names
from core.data.views import View
from core.ema import PREFIX, Average
from core.losses_udi import LEVELS, Rows, combine, project, udi_loss, warmup_temperature
from core.methods.base import Batch, Features, Info, Method, Report
from core.models.drop_path import use_sample_drop_path
from core.models.srs import TOKEN_STD, SampledBackbone, dense_maps, split_class_tokens
from core.models.udi_heads import Centre, ProjectionHead
from core.models.vit import as_vit
from core.optim import decay_groups
from core.schedules import warmup_cosine

if TYPE_CHECKING:
    from core.engine import Engine

PREFIXES = 2  # class tokens
BACKBONE = "backbone.backbone."  # of the ViT's weights
LAST_LAYER = "head.0.last_layer."


@dataclass
class UdiOptions:
    """Defaults are those of the released command for ViT-S, 300 epochs."""

    local_crops: int = 10
    local_size: int = 96
    scale: tuple[float, float] = (0.25, 1.0)  # share of the area, of the large crops
    local_scale: tuple[float, float] = (0.05, 0.25)
    window: int = 3  # tokens along a side of a sampling window
    local_window: int = 2
    srs_heads: int = 0  # of the sampled attention; 0 = as many as the student's
    hidden: int = 2048  # width of the head's inner layers
    layers: int = 3  # of the head, in front of the last one
    bottleneck: int = 256
    out: int = 65536
    norm_last_layer: bool = False  # keep the gains of the last layer at 1
    freeze_epochs: int = 1  # in which the last layer is not trained
    alpha: float = 0.5  # share of the patch predictions in the second token's target
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)  # of class, second class and patch level
    student_temperature: float = 0.1
    temperature: tuple[float, float] = (0.04, 0.07)  # of the teacher
    temperature_epochs: int = 30
    center_momentum: float = 0.9
    momentum: float = 0.996  # of the average, cosine to 1 over the stage
    weight_decay_end: float = 0.1
    released_slips: bool = False  # crops pulled as the released code does it


class UdiModel(nn.Module):
    """Backbone and head under their released names; as a student `forward`, as a teacher `teach`."""

    def __init__(self, backbone: SampledBackbone, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.ModuleList([head])

    def forward(self, batch: Batch) -> Rows:
        """cls, mixed (2, B, K), patch (2, B, s, K), local_cls, local_mixed (n, B, K): logits, float32 or wider."""
        large = torch.cat([batch.views[name] for name in GLOBALS])
        source, valid = batch.extra["source"], batch.extra["valid"]
        maps = dense_maps(source.unsqueeze(-1), valid.unsqueeze(-1), self._tokens(large))
        classes, patches = self.backbone(large, _by_view(maps))
        both = _apart(classes, len(GLOBALS))
        rows = {"cls": both[:, :, 0], "mixed": both[:, :, 1], "patch": _apart(patches, len(GLOBALS))}
        small = [batch.views[name] for name in batch.views if name not in GLOBALS]
        if small:
            each = _apart(self.backbone(torch.cat(small), None)[0], len(small))
            rows |= {"local_cls": each[:, :, 0], "local_mixed": each[:, :, 1]}
        return project(rows, cast(ProjectionHead, self.head[0]))

    @torch.no_grad()
    def teach(self, batch: Batch, alpha: float) -> Rows:
        """Logits of `core.losses_udi.combine`: the last layer is linear, so that bottlenecks are combined first."""
        return project(combine(*self.read(batch), alpha), cast(ProjectionHead, self.head[0]).last_layer)

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        """Bottlenecks and weights that `combine` takes, from one pass over the large crops in swapped order."""
        head = cast(ProjectionHead, self.head[0])
        dtype = next(head.mlp.parameters()).dtype
        large = torch.cat([batch.views[name] for name in reversed(GLOBALS)]).to(dtype)
        extra, tokens = batch.extra, self._tokens(large)
        maps, w_local = _by_view(dense_maps(extra["target"], extra["weight"], tokens)), None
        positions = maps.shape[1]
        if "local_target" in extra:
            local_maps = dense_maps(extra["local_target"], extra["local_weight"], tokens)  # (B, n, 2, s', N)
            maps = torch.cat([maps, _by_view(local_maps.transpose(1, 2).flatten(2, 3))], dim=1)
            w_local = extra["local_weight"].sum(-1).permute(1, 2, 0, 3)
        classes, patches = self.backbone(large, maps)
        cls, every = _apart(head.bottleneck(classes[:, 0]), 2), _apart(head.bottleneck(patches), 2)
        patch, local = every[:, :, :positions], None
        if w_local is not None:
            shape = (*every.shape[:2], len(w_local), -1, every.shape[-1])
            local = every[:, :, positions:].reshape(shape).permute(2, 0, 1, 3, 4)
        return cls, patch, local, extra["weight"].sum(-1).transpose(0, 1), w_local

    def _tokens(self, images: Tensor) -> int:
        patch_h, patch_w = self.backbone.backbone.patch_embed.patch_size
        return (images.shape[-2] // int(patch_h)) * (images.shape[-1] // int(patch_w))


def _apart(rows: Tensor, views: int) -> Tensor:
    """(views B, ...) -> (views, B, ...)."""
    return rows.view(views, -1, *rows.shape[1:])


def _by_view(maps: Tensor) -> Tensor:
    """(B, 2, M, N) -> (2 B, M, N), all images of the first view first."""
    return maps.transpose(0, 1).flatten(0, 1)


class Udi(Method):
    Options = UdiOptions
    per_parameter_clip = True
    needs_teachers = False
    teacher_view: ClassVar[str] = GLOBALS[0]
    options: UdiOptions
    teacher: Average

    def __init__(self, options: UdiOptions, settings: Any, steps: int) -> None:
        super().__init__(options, settings, steps)
        self.centre = Centre(len(LEVELS), options.out)
        self._pending: list[Tensor] = []  # means (L, K) of this step's micro-batches

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        o = self.options
        if not student.is_vit or student.prefix != PREFIXES or not student.has_cls:
            raise ConfigError(
                f"student.args: udi trains a ViT with two class tokens; {student.name} has {student.prefix} tokens "
                "in front of the patches: write args: {reg_tokens: 1}"
            )
        if teachers:
            raise ConfigError(f"teachers: udi learns from its own average; remove {', '.join(teachers)}")
        if o.local_size % student.patch:
            raise ConfigError(f"method.options.local_size: {o.local_size} is no multiple of patch {student.patch}")
        for name, grid, window in (("window", student.grid[0], o.window),
                                   ("local_window", o.local_size // student.patch, o.local_window)):  # fmt: skip
            if not 0 < window <= grid or grid < 2:
                raise ConfigError(f"method.options.{name}: {window} does not fit into {grid} x {grid} tokens")
        shares = {"alpha": o.alpha, "center_momentum": o.center_momentum, "momentum": o.momentum}
        if wrong := [name for name, value in shares.items() if not 0 <= value <= 1]:
            raise ConfigError(f"method.options.{wrong[0]}: must lie in 0..1, got {shares[wrong[0]]}")
        if min(o.student_temperature, *o.temperature) <= 0 or o.local_crops < 0:
            raise ConfigError("method.options: temperatures must be above 0, and local_crops at least 0")
        if o.layers < 1:
            raise ConfigError(f"method.options.layers: the head has at least one layer, got {o.layers}")
        if self.settings.lr == 0:
            raise ConfigError("train.lr: 0 would learn nothing")

    def initialise(self, student: nn.Module) -> None:
        """Class tokens at deviation 0.02, where timm has 1e-6."""
        vit = as_vit(student)
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=TOKEN_STD)

    def views(self) -> list[View]:
        chain = View(
            self.settings.img_size, solarise=0.2, box_passes=3, blur=0.1, blur_sigma=(0.1, 2.0), calm=(0.5, 0.75)
        )
        large = [dataclasses.replace(chain, name=name) for name in GLOBALS]
        small = [
            dataclasses.replace(chain, name=n, size=self.options.local_size)
            for n in local_names(self.options.local_crops)
        ]
        return large + small

    def crops(self) -> LinkedCrops:
        o, patch = self.options, self._patch
        link = Linking(self.settings.img_size // patch, o.local_size // patch)
        return LinkedCrops(link, o.local_crops, o.scale, o.local_scale, o.window, o.local_window,
                           released_slips=o.released_slips)  # fmt: skip

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        vit = as_vit(student)
        if vit.no_embed_class or isinstance(vit.norm, nn.Identity):
            raise ConfigError("student.args: udi's class tokens have positions and a final norm; leave no_embed_class "
                              "false and global_pool token")  # fmt: skip
        use_sample_drop_path(vit)
        self._patch = info.patch
        heads = self.options.srs_heads or int(cast(Any, vit.blocks[0]).attn.num_heads)
        if info.dim % heads:
            raise ConfigError(f"method.options.srs_heads: {heads} does not divide the student's width {info.dim}")
        return UdiModel(SampledBackbone(vit, heads), self._head(info))

    def attach(self, engine: Engine, rebuild: Callable[[], nn.Module]) -> None:
        dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
        self.teacher = Average(rebuild(), engine, dtype)

    def prepare(self, batch: Batch) -> Batch:
        """In evaluation all views show the same image: a sampled token matches itself, one small view is enough."""
        if batch.training:
            return batch
        views = {name: batch.views[name] for name in [*GLOBALS, *local_names(min(self.options.local_crops, 1))]}
        images = views[GLOBALS[0]]
        whole = self.crops().whole(len(images), len(views) - len(GLOBALS))
        extra = {name: torch.from_numpy(x).to(images.device) for name, x in whole.items()}
        return dataclasses.replace(batch, views=views, extra=extra)

    @torch.no_grad()
    def targets(self, features: dict[str, Features], batch: Batch) -> Rows:
        """Logits of the average network; their means are kept for `after_step`."""
        rows = cast(UdiModel, self.teacher.network).teach(batch, self.options.alpha)
        if batch.training:
            self._pending.append(rows["means"])
        return rows

    def losses(self, outputs: Rows, targets: Rows, batch: Batch) -> tuple[Tensor, Report]:
        o = self.options
        # The running centre moves far in the first steps; held-out losses before and after must not differ by that.
        center = self.centre.center if batch.training else targets["means"]
        return udi_loss(
            outputs, targets, batch.extra["valid"].transpose(0, 1), center, temperature=self.temperature(batch.epoch),
            student_temperature=o.student_temperature, weights=o.weights,
        )  # fmt: skip

    def temperature(self, epoch: int) -> float:
        """Of the teacher."""
        return warmup_temperature(epoch, *self.options.temperature, self.options.temperature_epochs)

    @torch.no_grad()
    def after_step(self, step: int, comm: Comm) -> Report:
        self.centre.update(comm.gather(torch.stack(self._pending)), self.options.center_momentum)
        self._pending = []
        self.teacher.update(self.schedules(step)["teacher_momentum"])
        return {"center_norm": self.centre.center.norm(dim=1).mean()}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The last layer apart: the optimiser does not see it in the first epochs."""
        named, decay = list(module.named_parameters()), self.settings.weight_decay
        groups = decay_groups(((n, p) for n, p in named if not n.startswith(LAST_LAYER)), decay)
        last = decay_groups(((n, p) for n, p in named if n.startswith(LAST_LAYER)), decay)[0]
        return [*groups, last | {"frozen_steps": self.options.freeze_epochs * self.epoch_steps}]

    def schedules(self, step: int) -> dict[str, float]:
        s, o = self.settings, self.options
        scale = s.batch / s.lr_batch if s.lr_batch else 1.0
        warmup = min(s.warmup_steps, self.steps)
        return {
            "lr": warmup_cosine(step, base=s.lr * scale, final=s.min_lr, steps=self.steps, warmup=warmup),
            "weight_decay": warmup_cosine(step, base=s.weight_decay, final=o.weight_decay_end, steps=self.steps),
            "teacher_momentum": warmup_cosine(step, base=o.momentum, final=1.0, steps=self.steps),
        }

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The average, which is the better network: its class tokens under timm's names."""
        prefix = PREFIX + BACKBONE
        return split_class_tokens({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def student_flops(self, forward: Callable[[int], float]) -> tuple[float, float]:
        large, small = forward(self.settings.img_size), forward(self.options.local_size)
        return len(GLOBALS) * large + self.options.local_crops * small, len(GLOBALS) * large

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        """Sampled attention on both large crops, and all rows of the student through the head."""
        o, patches = self.options, info.grid[0] * info.grid[1]
        sampled = (info.grid[0] // o.window) ** 2
        attention = 6.0 * patches * info.dim**2 + sampled * (2.0 * info.dim**2 + 8.0 * patches * info.dim)
        rows = len(GLOBALS) * (PREFIXES + sampled) + PREFIXES * o.local_crops
        with torch.device("meta"):
            return len(GLOBALS) * attention + self._head(info).flops(rows, rows)

    def to(self, device: torch.device) -> None:
        self.centre.to(device)

    def state(self) -> dict[str, Tensor]:
        return {"center": self.centre.center, **self.teacher.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.centre.center.copy_(state["center"])
        self.teacher.load_state(state)

    def _head(self, info: Info) -> ProjectionHead:
        o = self.options
        return ProjectionHead(info.dim, o.hidden, o.bottleneck, o.out, not o.norm_last_layer, o.layers)


METHOD = Udi
