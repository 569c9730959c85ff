"""The labelled images of an evaluation, checked as soon as they can be: before a run is queued, not after it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from core.config import ConfigError
from core.data.classes import numbered_as
from core.data.shard_source import ShardSource
from core.data.source import DataError, Source, open_source
from core.data.tar_source import TarSource
from core.recipe import Recipe
from core.storage import resolve

if TYPE_CHECKING:
    from core.cache import ShardCache

NEED_CHOICE = frozenset(("linear",))  # protocols that choose their settings on a part of the training images


def labelled_sources(recipe: Recipe, root: str, where: str, cache: ShardCache | None = None) -> list[Source]:
    """Training and test images, with the same numbers for the same classes.

    where: the recipe's place, for messages.  Raises ConfigError: not set, no labels, other classes.
    """
    for field in ("train", "test"):
        if not getattr(recipe.evaluate, field):
            raise ConfigError(
                f"evaluate.{field}: not set in {where}; labelled images are needed, "
                f'for example SET="evaluate.{field}=s3://bucket/imagenet/{field}"'
            )
    wanted = (recipe.evaluate.train, recipe.evaluate.test)
    train, test = (open_source(resolve(uri, root), cache) for uri in wanted)
    for uri, source in zip(wanted, (train, test), strict=True):
        if not source.classes:
            raise ConfigError(
                f"evaluate: {uri} has no labels: its {len(source)} images lie in no class folder; use class folders or "
                "shards written with labels"
            )
    try:
        return [train, numbered_as(test, train.classes, (wanted[1], wanted[0]))]
    except DataError as error:
        raise ConfigError(f"evaluate: {error}") from None


def check_labels(recipe: Recipe, sources: list[Source]) -> None:
    """Refuse what the protocols cannot use, as far as labels are known without reading shards.  Raises ConfigError."""
    wanted = (recipe.evaluate.train, recipe.evaluate.test)
    for uri, source in zip(wanted, sources, strict=True):
        if isinstance(source, ShardSource) and not isinstance(source, TarSource):
            continue
        counts = Counter(source.label(i) for i in range(len(source)))
        if lost := counts[-1]:
            raise ConfigError(
                f"evaluate: some images have no label, {lost} of {len(source)} of {uri}; put each into the folder of "
                "its class"
            )
        if source is sources[0]:
            check_choice(recipe.evaluate.protocols, max(counts.values()))


def check_choice(protocols: list[str], most: int) -> None:
    """Refuse protocols that have nothing to choose by.  most: training images of the largest class."""
    if most < 2 and (names := sorted(NEED_CHOICE.intersection(protocols))):
        raise ConfigError(
            f"evaluate.protocols: {', '.join(names)} sets a part of each class aside to choose its learning rate, and "
            'no class of evaluate.train has two images; give more images, or SET="evaluate.protocols=[knn]"'
        )
