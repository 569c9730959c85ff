"""The CLIP whose vectors are stored for methods that train without it: its two towers, and what they depend on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import partial

import timm
import torch
from timm.layers.activations import QuickGELU
from torch import nn

from core.config import ConfigError
from core.features.about import About, of_teacher, weights_digest
from core.features.live import Live
from core.methods.base import Batch, Features, Info, Outputs
from core.models.locate import use_weights, weights_uri
from core.models.students import describe
from core.models.teachers import create_teacher, load_teachers
from core.models.text import TextTower, text_tower
from core.models.weights import WeightsError
from core.recipe import Recipe, Teacher
from core.storage import MissingObject

IMAGE, TOKENS = "image", "tokens"  # what the towers take: a view of a batch, and token ids in its `extra`
RANDOM_TEXT = {"width": 64, "layers": 2, "heads": 1}  # a text tower for `random` weights, which tell no size


@dataclass(frozen=True)
class Clip:
    """info: of its image tower, for whole images at its own size.  quick_gelu: the activation of both towers."""

    name: str
    teacher: Teacher
    info: Info
    quick_gelu: bool

    @property
    def text(self) -> str:
        """Weights of the text tower."""
        return self.teacher.text or self.teacher.weights

    def about_images(self, root: str) -> About:
        """Raises WeightsError, StoreError."""
        return of_teacher(self.name, self.teacher, self.info, root)

    def about_texts(self, root: str) -> About:
        """Raises WeightsError, StoreError."""
        try:
            weights = weights_digest(self.name, self.text, self.teacher.name, root)
        except MissingObject as error:
            raise WeightsError(f"{self._no_text(root)} {error}") from None
        return {"model": f"text tower of {self.teacher.name}", "weights": weights, "quick_gelu": self.quick_gelu}

    def image_tower(self, recipe: Recipe, root: str, device: torch.device, dtype: torch.dtype) -> Outputs:
        """Of `IMAGE` at its own size, normalised as a student's.  Raises WeightsError, StoreError, ConfigError."""
        alone = replace(recipe, teachers={self.name: self.teacher})
        loaded = load_teachers(alone, self.info, {self.name: self.info}, root, device, dtype)
        return Live(loaded[self.name], IMAGE)

    def text_tower(self, root: str, device: torch.device) -> Outputs:
        """Of `TOKENS`, in float32.  Raises WeightsError, StoreError."""
        return Sentences(self._text_tower(root).to(device))

    def _text_tower(self, root: str) -> TextTower:
        if self.text == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"text of {self.name}".encode()))
                tower = TextTower(**RANDOM_TEXT, dim=self.info.projection, quick_gelu=self.quick_gelu)
            return tower.eval().requires_grad_(False)
        try:
            return use_weights(self.text, self.teacher.name, root, partial(text_tower, quick_gelu=self.quick_gelu))
        except (MissingObject, WeightsError) as error:
            raise WeightsError(f"{self._no_text(root)} {error}") from None

    def _no_text(self, root: str) -> str:
        return (
            f"teachers.{self.name}.text: sentences need CLIP's text tower, which {weights_uri(self.text, '', root)} "
            "does not give; name a CLIP checkpoint in OpenAI's layout:"
        )


@dataclass(frozen=True)
class Sentences:
    """A text tower as a teacher: one vector for each sentence, no patch tokens."""

    tower: TextTower

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        vectors = self.tower(batch.extra[TOKENS]).float()
        return Features(vectors, vectors.new_empty(len(vectors), 0, vectors.shape[-1]))


def clip_of(teachers: dict[str, Teacher]) -> Clip:
    """The one teacher of a recipe.  Raises ConfigError when there are others, or when it gives no projected vectors."""
    if len(teachers) != 1:
        raise ConfigError(f"teachers: stored vectors are those of one teacher, the recipe has {len(teachers)}")
    ((name, teacher),) = teachers.items()
    field = f"teachers.{name}"
    if teacher.cls != "projected":
        raise ConfigError(f"{field}.cls: {teacher.cls} is in no space that sentences share; use {field}.cls=projected")
    with torch.device("meta"):
        model = create_teacher(teacher, field)
    info = describe(model, teacher.name, _own_size(teacher), field)
    return Clip(name, teacher, info, _has_quick_gelu(model))


def _own_size(teacher: Teacher) -> int:
    """Pixels a side of the images that its weights were trained with."""
    config = timm.get_pretrained_cfg(teacher.name)
    own = teacher.args.get("img_size") or (config.input_size[-1] if config else 224)
    return int(own)


def _has_quick_gelu(model: nn.Module) -> bool:
    return any(isinstance(part, QuickGELU) for part in model.modules())
